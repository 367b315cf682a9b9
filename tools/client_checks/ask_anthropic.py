"""Anthropic's Python client: messages, streams, counts of tokens and errors."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import anthropic

TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


def check_answers(client: anthropic.Anthropic, model: str) -> None:
    """Whole answers and streams agree."""
    wanted: dict[str, Any] = {
        "model": model,
        "max_tokens": 8,
        "extra_body": {"temperature": 0},
        "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "def "}]}],
        "metadata": {"user_id": "someone"},
    }
    whole = client.messages.create(**wanted)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 8 and whole.content[0].type == "text"
    with client.messages.stream(**wanted) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert text == whole.content[0].text == streamed.content[0].text
    assert streamed.stop_reason == whole.stop_reason and streamed.usage.output_tokens == 8
    asked = {name: wanted[name] for name in ("model", "system", "messages")}
    num_tokens = client.messages.count_tokens(**asked).input_tokens
    usage = whole.usage
    assert num_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    begun = [*wanted["messages"], {"role": "assistant", "content": "import "}]
    assert client.messages.create(**{**wanted, "messages": begun, "stop_sequences": ["\n"]}).stop_reason


def check_errors(client: anthropic.Anthropic, model: str) -> None:
    """Errors are those of the library's classes."""
    good = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "a"}]}
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}
    for wrong, kind in (
        ({"model": "no-such-model"}, anthropic.NotFoundError),
        ({"max_tokens": 20_000}, anthropic.BadRequestError),
        ({"messages": [{"role": "user", "content": [image]}]}, anthropic.BadRequestError),
        # The embedded model's template has no tools.
        ({"tools": [TOOL]}, anthropic.BadRequestError),
    ):
        for is_stream in (False, True):
            try:
                client.messages.create(**{**good, "stream": is_stream, **wrong})
            except kind as error:
                assert error.body["error"]["message"] and error.body["type"] == "error", error
            else:
                raise AssertionError(f"not refused: {str(wrong)[:80]}")
    try:
        client.with_options(api_key="wrong").messages.create(**good)
        raise AssertionError("a wrong key is let in")
    except anthropic.AuthenticationError as error:
        assert error.body["error"]["type"] == "authentication_error"


async def check_asynchronous(root_url: str, key: str, model: str) -> None:
    """Several at once, with the key as a bearer's token, and a stream that is left early."""
    asked = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
    async with anthropic.AsyncAnthropic(base_url=root_url, auth_token=key, max_retries=0) as client:
        answers = await asyncio.gather(*(client.messages.create(**asked) for _ in range(4)))
        assert all(answer.stop_reason for answer in answers)
        async with client.messages.stream(**{**asked, "max_tokens": 500}) as stream:
            async for _ in stream:
                break


def main(root_url: str, key: str) -> None:
    """Run all checks."""
    with anthropic.Anthropic(base_url=root_url, api_key=key, max_retries=0) as client:
        # The embedded model has one name, which any client can look up.
        model = client.models.list().data[0].id
        check_answers(client, model)
        check_errors(client, model)
        asyncio.run(check_asynchronous(root_url, key, model))


if __name__ == "__main__":
    main(*sys.argv[1:3])
