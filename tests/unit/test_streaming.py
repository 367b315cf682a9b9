"""Events of a stream: the fast way to write one gives the same bytes as the slow way."""

from __future__ import annotations

import asyncio

import pytest

from nanoflow.server.streaming import EventTemplate, event
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
