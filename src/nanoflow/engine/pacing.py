"""When the readers of running requests are woken: `Stream` waits for one request's news, `Pacer` wakes many at once.

Sending one piece of a stream costs the same however many tokens are in it. So there is a pause after each round of
sending, in which tokens gather, to be sent together. The pause is ten times as long as the round: sending takes about a
tenth of the event loop's time, or more if the longest pause allowed is shorter. With few streams, rounds and pauses are
shorter than the gaps between tokens, so each token is sent at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from nanoflow.outputs import RequestOutput

# The pause after a round of sending, as a multiple of the round's duration.
PAUSE_RATIO = 10.0
# Streams that are woken before other tasks of the event loop run; fewer if they begin or end, which costs more.
_STREAMS_A_SLICE = 128
_URGENT_A_SLICE = 32


class Stream:
    """One reader of one request.

    Args:
        output: The request's output, which grows in place.
        is_whole: If true, the reader is woken only when the output is finished.
    """

    __slots__ = ("_has_news", "_waiter", "is_marked", "is_started", "is_urgent", "is_whole", "output")

    def __init__(self, output: RequestOutput, *, is_whole: bool = False) -> None:
        self.output = output
        self.is_whole = is_whole
        self.is_started = False
        self.is_marked = self.is_urgent = False
        self._has_news = False
        self._waiter: asyncio.Future[None] | None = None

    async def news(self) -> None:
        """Wait until the reader is woken; returns at once if it was woken while it was busy."""
        if not self._has_news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._has_news = False

    def wake(self) -> None:
        """Wake the reader."""
        self.is_marked = self.is_urgent = False
        self.is_started = self._has_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pacer:
    """Wakes streams in rounds. To be used in one event loop.

    After a round there is a pause of `PAUSE_RATIO` times its duration, at most `interval_s`, before the next round.
    The first token and the end of a request do not wait for a round.

    Args:
        interval_s: Longest pause; 0 for no pauses.
        clock: Seconds, monotonic.
    """

    def __init__(self, interval_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._marked: list[Stream] = []
        self._urgent: deque[Stream] = deque()
        self._is_planned = False
        self._next_s = 0.0

    def note(self, stream: Stream) -> None:
        """Note that a stream's output has grown or ended."""
        if stream.output.finished or not (stream.is_started or stream.is_whole):
            if not stream.is_urgent:
                self._hurry(stream)
        elif not (stream.is_marked or stream.is_whole):
            stream.is_marked = True
            self._marked.append(stream)
            if not self._is_planned:
                self._plan()

    def _hurry(self, stream: Stream) -> None:
        stream.is_urgent = True
        if not self._urgent:
            asyncio.get_running_loop().call_soon(self._wake_urgent)
        self._urgent.append(stream)

    def _wake_urgent(self) -> None:
        for _ in range(min(len(self._urgent), _URGENT_A_SLICE)):
            self._urgent.popleft().wake()
        if self._urgent:
            asyncio.get_running_loop().call_soon(self._wake_urgent)

    def _plan(self) -> None:
        self._is_planned = True
        loop, wait_s = asyncio.get_running_loop(), self._next_s - self._clock()
        if wait_s > 0:
            loop.call_later(wait_s, self._begin)
        else:
            # After the other outputs of the same iteration.
            loop.call_soon(self._begin)

    def _begin(self) -> None:
        marked, self._marked = self._marked, []
        self._wake(marked, 0, self._clock())

    def _wake(self, marked: list[Stream], start: int, begin_s: float) -> None:
        for stream in marked[start : start + _STREAMS_A_SLICE]:
            # The end of its request may have woken it meanwhile.
            if stream.is_marked:
                stream.wake()
        # The readers that were just woken run before this.
        loop, start = asyncio.get_running_loop(), start + _STREAMS_A_SLICE
        if start < len(marked):
            loop.call_soon(self._wake, marked, start, begin_s)
        else:
            loop.call_soon(self._end, begin_s)

    def _end(self, begin_s: float) -> None:
        now_s = self._clock()
        self._next_s = now_s + min(PAUSE_RATIO * (now_s - begin_s), self._interval_s)
        self._is_planned = False
        if self._marked:
            self._plan()
