"""langchain-openai: chat and completion models, invoked, streamed, batched and asynchronous."""

from __future__ import annotations

import asyncio
import sys

import openai
from langchain_openai import ChatOpenAI, OpenAI


def main(root_url: str, key: str) -> None:
    """Run all checks."""
    options = {"base_url": f"{root_url}/v1", "api_key": key, "max_tokens": 8, "temperature": 0, "max_retries": 0}
    model = openai.OpenAI(base_url=f"{root_url}/v1", api_key=key).models.list().data[0].id
    chat = ChatOpenAI(model=model, stream_usage=True, **options)
    answer = chat.invoke([("system", "Python."), ("human", "def ")])
    assert answer.usage_metadata["output_tokens"] > 0 and answer.response_metadata["finish_reason"]
    pieces = list(chat.stream([("system", "Python."), ("human", "def ")]))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) > 0
    assert len(chat.batch(["a", "b", "c"])) == 3
    assert asyncio.run(chat.ainvoke("def ")).text is not None
    assert chat.bind(stop=["\n"], logprobs=True).invoke("def ").response_metadata["logprobs"]["content"] is not None
    text = OpenAI(model=model, **options).invoke("import ")
    assert "".join(OpenAI(model=model, **options).stream("import ")) == text
    try:
        chat.invoke("a " * 100_000)
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded", error
    else:
        raise AssertionError("not refused: a prompt beyond the context")


if __name__ == "__main__":
    main(*sys.argv[1:3])
