"""Events of a stream: the fast way to write one gives the same bytes as the slow way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from nanoflow.outputs import RequestOutput
from nanoflow.request import RequestError, SamplingParams
from nanoflow.server.errors import ApiError, ClientDisconnectedError
from nanoflow.server.generation import Call, News
from nanoflow.server.streaming import EventTemplate, event, while_connected
from nanoflow.server.turnstile import Turnstile


@pytest.mark.parametrize(
    "text", ["", "a", 'quo"te\\', "line\nbreak\r\x00\x1f\x7f", "naïve 東京 \U0001f600", "\u2028</script>"]
)
def test_a_template_gives_the_events_of_its_chunks(text: str) -> None:
    def chunk(text: str) -> dict[str, object]:
        return {"id": "a", "created": 5, "model": 'mo"del', "choices": [{"index": 0, "text": text, "logprobs": None}]}

    assert EventTemplate(chunk).fill(text) == event(chunk(text))


def test_a_burst_passes_the_turnstile_in_order_and_a_few_a_turn() -> None:
    async def run() -> list[int]:
        turnstile, turn, turns = Turnstile(3), 0, list[int]()

        async def caller(number: int) -> None:
            await turnstile.pass_through()
            turns.append(turn)
            order.append(number)

        order: list[int] = []
        tasks = [asyncio.create_task(caller(number)) for number in range(10)]
        await asyncio.sleep(0)
        tasks[4].cancel()
        while len(order) < 9:
            turn += 1
            await asyncio.sleep(0)
        assert order == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        return [turns.count(number) for number in sorted(set(turns))]

    assert asyncio.run(run()) == [3, 3, 3]


def test_work_for_a_client_that_has_gone_is_cancelled() -> None:
    """And waited for, however long it would have gone on."""

    async def run() -> list[str]:
        seen: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        async def receive() -> dict[str, object]:
            return {"type": "http.disconnect"}

        with pytest.raises(ClientDisconnectedError):
            await asyncio.wait_for(while_connected(receive, work()), 5)
        return seen

    assert asyncio.run(run()) == ["cancelled"]


class RefusingEngine:
    """Has an output for a prompt at once, unless the prompt is refused; "failing" fails in the engine."""

    async def generate(self, prompt: str, *_: object, request_id: str, streams: bool) -> AsyncIterator[RequestOutput]:
        if prompt == "refused":
            raise RequestError("the prompt is refused")
        output = RequestOutput(request_id=request_id, prompt=prompt, prompt_token_ids=[1], outputs=[])
        output.error = "no finite logits" if prompt == "failing" else None
        yield output


def first_news(*prompts: str) -> News:
    async def first() -> News:
        engine: Any = RefusingEngine()
        call = Call(engine=engine, prompts=prompts, params=SamplingParams(), call_id="c")
        async with aclosing(call.news()) as news:
            return await anext(news)

    return asyncio.run(first())


@pytest.mark.parametrize("prompts", [("refused",), ("a", "b", "refused")])
def test_a_prompt_that_is_refused_is_told_before_what_others_have_generated(prompts: tuple[str, ...]) -> None:
    """Nothing has been shown yet, so the answer can still have the status of an error."""
    assert first_news("a", "b")[0] == 0
    with pytest.raises(ApiError, match="the prompt is refused") as error:
        first_news(*prompts)
    assert error.value.status == 400


def test_a_request_that_failed_in_the_engine_is_an_error_of_the_server() -> None:
    with pytest.raises(ApiError, match="the request failed: no finite logits") as error:
        first_news("failing")
    assert error.value.status == 500
