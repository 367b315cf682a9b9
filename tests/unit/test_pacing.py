"""Rounds of waking: nothing waits in an idle loop, tokens gather in a busy one, first tokens and ends never wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from nanoflow.engine.pacing import PAUSE_RATIO, Pacer, Stream
from nanoflow.outputs import RequestOutput


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Reader:
    """Notes when it is woken; takes `cost_s` of the clock each time."""

    def __init__(self, clock: Clock, cost_s: float, *, is_whole: bool = False) -> None:
        self.output = RequestOutput(request_id="a", prompt=None, prompt_token_ids=[1], outputs=[])
        self.stream = Stream(self.output, is_whole=is_whole)
        self.woken_s: list[float] = []
        self._clock, self._cost_s = clock, cost_s
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while not self.output.finished:
            await self.stream.news()
            self._clock.now_s += self._cost_s
            self.woken_s.append(self._clock.now_s)


def run(body: Callable[[Clock], Awaitable[None]]) -> None:
    asyncio.run(body(Clock()))  # type: ignore[arg-type]


async def turns(count: int = 30) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_each_token_is_sent_alone_while_the_loop_has_time() -> None:
    async def body(clock: Clock) -> None:
        pacer, reader = Pacer(0.02, clock), Reader(clock, 0.0001)
        await turns()
        for _ in range(10):
            pacer.note(reader.stream)
            await turns()
            clock.now_s += 0.0001 * (PAUSE_RATIO + 1)
        assert len(reader.woken_s) == 10
        reader.task.cancel()

    run(body)


def test_tokens_gather_after_a_round_that_took_long() -> None:
    async def body(clock: Clock) -> None:
        pacer = Pacer(0.02, clock)
        readers = [Reader(clock, 0.001) for _ in range(300)]
        await turns()
        for _ in range(2):  # the first tokens, then a round
            for reader in readers:
                pacer.note(reader.stream)
            await turns()
        assert [len(reader.woken_s) for reader in readers] == [2] * 300
        for _ in range(5):
            for reader in readers:
                pacer.note(reader.stream)
            await turns()
        assert [len(reader.woken_s) for reader in readers] == [2] * 300
        # The pause is never longer than asked for, however long the round took.
        await asyncio.sleep(0.1)
        assert [len(reader.woken_s) for reader in readers] == [3] * 300
        for reader in readers:
            reader.task.cancel()

    run(body)


def test_first_tokens_and_ends_do_not_wait_for_a_round() -> None:
    async def body(clock: Clock) -> None:
        pacer = Pacer(10.0, clock)
        slow, new, ending = Reader(clock, 100.0), Reader(clock, 0.0), Reader(clock, 0.0)
        await turns()
        for reader in (slow, ending):
            pacer.note(reader.stream)
        await turns()
        pacer.note(slow.stream)
        await turns()
        pacer.note(ending.stream)
        pacer.note(new.stream)
        ending.output.finished = True
        pacer.note(ending.stream)
        await turns()
        assert (len(new.woken_s), len(ending.woken_s), ending.task.done()) == (1, 2, True)
        for reader in (slow, new):
            reader.task.cancel()

    run(body)


def test_a_reader_of_the_whole_is_woken_once() -> None:
    async def body(clock: Clock) -> None:
        pacer, reader = Pacer(0.0, clock), Reader(clock, 0.0, is_whole=True)
        for is_last in (False, False, True):
            reader.output.finished = is_last
            pacer.note(reader.stream)
            await turns()
        assert len(reader.woken_s) == 1

    run(body)


def test_a_busy_reader_gets_its_news_later() -> None:
    async def body(clock: Clock) -> None:
        pacer = Pacer(0.0, clock)
        stream = Stream(RequestOutput(request_id="a", prompt=None, prompt_token_ids=[1], outputs=[]))
        for _ in range(3):
            pacer.note(stream)
            await turns()
        await asyncio.wait_for(stream.news(), 1.0)
        waiting = asyncio.create_task(stream.news())
        await turns()
        assert not waiting.done()
        pacer.note(stream)
        await asyncio.wait_for(waiting, 1.0)

    run(body)


def test_a_first_token_waits_for_none_that_is_noted_again_and_again() -> None:
    """One turn of the loop wakes so many streams, and a stream counts once."""

    async def body(clock: Clock) -> None:
        pacer, often, once = Pacer(0.02, clock), Reader(clock, 0.0), Reader(clock, 0.0)
        await turns()
        for _ in range(200):
            pacer.note(often.stream)
        pacer.note(once.stream)
        await turns(3)
        assert len(often.woken_s) == len(once.woken_s) == 1
        for reader in (often, once):
            reader.task.cancel()

    run(body)
