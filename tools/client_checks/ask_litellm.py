"""litellm: an OpenAI-compatible server as its providers `openai`, `text-completion-openai` and `hosted_vllm`."""

from __future__ import annotations

import asyncio
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its list of prices would be fetched from elsewhere

import litellm
import openai


def main(root_url: str, key: str) -> None:
    """Run all checks."""
    base = {"api_base": f"{root_url}/v1", "api_key": key, "max_tokens": 8, "temperature": 0, "num_retries": 0}
    name = openai.OpenAI(base_url=base["api_base"], api_key=key).models.list().data[0].id
    messages = [{"role": "user", "content": "def "}]
    for provider in ("openai", "hosted_vllm"):
        asked = {"model": f"{provider}/{name}", "messages": messages, **base}
        answer = litellm.completion(**asked)
        assert answer.usage.completion_tokens > 0 and answer.choices[0].finish_reason in ("stop", "length")
        pieces = litellm.completion(**asked, stream=True)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == answer.choices[0].message.content
        assert asyncio.run(litellm.acompletion(**asked)).choices[0].message.content == text
        check_errors(asked)
    text = litellm.text_completion(model=f"text-completion-openai/{name}", prompt="import ", **base).choices[0].text
    assert isinstance(text, str)


def check_errors(asked: dict[str, object]) -> None:
    """Errors are those that its fallbacks look for."""
    long = [{"role": "user", "content": "a " * 100_000}]
    for fields, kind in (
        ({"messages": long}, litellm.ContextWindowExceededError),
        ({"max_tokens": 10_000_000}, litellm.ContextWindowExceededError),
        ({"api_key": "wrong"}, litellm.AuthenticationError),
        ({"model": "openai/no-such-model"}, litellm.NotFoundError),
        ({"temperature": -1}, litellm.BadRequestError),
    ):
        try:
            litellm.completion(**{**asked, **fields})
        except kind:
            continue
        raise AssertionError(f"not refused: {str(fields)[:80]}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
