"""The official Python client: completions, chats, responses, streams, models, raw answers and errors."""

from __future__ import annotations

import asyncio
import sys

import openai


def check_answers(client: openai.OpenAI, model: str) -> None:
    """Whole answers and streams agree."""
    whole = client.completions.create(model=model, prompt="import ", max_tokens=8, temperature=0, n=2, logprobs=2)
    assert len(whole.choices) == 2 and whole.usage is not None and whole.usage.completion_tokens == 16
    assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.tokens or ()) == 8
    stream = client.completions.create(model=model, prompt="import ", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    messages = [{"role": "user", "content": "def "}]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    assert chat.choices[0].message.role == "assistant" and chat.choices[0].finish_reason in ("stop", "length")
    pieces = client.chat.completions.create(
        model=model,
        messages=messages,
        max_completion_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(pieces)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == (
        chat.choices[0].message.content
    )
    assert chunks[-1].usage == chat.usage


def check_responses(client: openai.OpenAI, model: str) -> None:
    """Responses: whole, as a stream, kept, gone on from, and forgotten."""
    whole = client.responses.create(model=model, input="def ", max_output_tokens=8, temperature=0, instructions="a")
    assert whole.status == "incomplete" and whole.usage is not None and whole.usage.output_tokens == 8
    assert client.responses.retrieve(whole.id).output_text == whole.output_text
    more = {"model": model, "input": "import ", "max_output_tokens": 8, "temperature": 0}
    last = client.responses.create(**more, previous_response_id=whole.id)
    *_, end = client.responses.create(**more, previous_response_id=whole.id, stream=True)
    assert end.type == "response.incomplete" and end.response.output_text == last.output_text
    assert [item.type for item in client.responses.input_items.list(last.id)] == ["message"]
    client.responses.delete(whole.id)
    try:
        client.responses.create(**more, previous_response_id=last.id)
        raise AssertionError("a conversation goes on without its beginning")
    except openai.NotFoundError as error:
        assert error.code == "previous_response_not_found" and error.param == "previous_response_id"


def check_errors(client: openai.OpenAI, model: str) -> None:
    """Errors are those of the library's classes, with the words that programs look for."""
    for wrong, kind, code in (
        ({"prompt": "a", "model": "no-such-model"}, openai.NotFoundError, "model_not_found"),
        ({"prompt": [7] * 100_000}, openai.BadRequestError, "context_length_exceeded"),
        ({"prompt": "a", "max_tokens": 10_000_000}, openai.BadRequestError, "context_length_exceeded"),
        ({"prompt": [10**8]}, openai.BadRequestError, None),
        ({"prompt": "a", "temperature": -1}, openai.BadRequestError, None),
    ):
        for is_stream in (False, True):
            try:
                client.completions.create(**{"model": model, "stream": is_stream, **wrong})
            except kind as error:
                assert error.code == code and error.param and error.request_id and error.type, error
                assert code != "context_length_exceeded" or "maximum context length" in error.message
            else:
                raise AssertionError(f"not refused: {str(wrong)[:80]}")
    try:
        client.with_options(api_key="wrong").models.list()
        raise AssertionError("a wrong key is let in")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key"


async def check_asynchronous(root_url: str, key: str, model: str) -> None:
    """Several at once, and a stream that is left early."""
    async with openai.AsyncOpenAI(base_url=f"{root_url}/v1", api_key=key, max_retries=0) as client:
        asked = [client.completions.create(model=model, prompt="x", max_tokens=4, seed=i) for i in range(8)]
        assert all(answer.choices[0].finish_reason for answer in await asyncio.gather(*asked))
        async with await client.completions.create(model=model, prompt="y", max_tokens=500, stream=True) as stream:
            async for _ in stream:
                break
        assert [one.id async for one in client.models.list()]


def main(root_url: str, key: str) -> None:
    """Run all checks."""
    with openai.OpenAI(base_url=f"{root_url}/v1", api_key=key, max_retries=0) as client:
        model = client.models.list().data[0].id
        assert client.models.retrieve(model).id == model
        raw = client.completions.with_raw_response.create(
            model=model, prompt="a", max_tokens=1, extra_headers={"x-request-id": "mine"}
        )
        assert raw.headers["x-request-id"] == "mine" and raw.parse().choices
        check_answers(client, model)
        check_responses(client, model)
        check_errors(client, model)
        asyncio.run(check_asynchronous(root_url, key, model))


if __name__ == "__main__":
    main(*sys.argv[1:3])
