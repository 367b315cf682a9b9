"""How many tokens of background requests an iteration may have: what interactive ones leave of its time.

Background requests have the priority "batch" (`priorities.py`). Interactive ones get their tokens first, and background
ones, decodes before prompts and the oldest first, fill the rest of the token budget as long as the predicted time of
the iteration (`plan/iteration_time.py`) keeps within the bounds of the pace:

1. With decodes of interactive requests: the longest gap between tokens.
2. With a longest time to the first token: a part of it, as a request that comes now waits for the iterations that are
   under way, learnt from how many first tokens are late; and while prompts of interactive requests are computed, no
   more than the time that the one in the greatest hurry can still lose.

Without interactive requests there is no bound but that of 2. Without a prediction there is none but the token budget.
HyGen (https://arxiv.org/abs/2501.14808) and ConServe (https://arxiv.org/abs/2410.01228) do so too: online work first,
then offline tokens up to a budget of time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanoflow.batch import Float64, Int64
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.scheduler.pace import Pace

# A request that arrives waits for the iteration on the device and for the one that is formed, before its own: at first
# an iteration may take a third of the time to the first token. Each first token that is late makes that part smaller,
# and each in time a little larger again, so that about one in a hundred is late: requests come in bursts.
_MOST_PART, _LEAST_PART = 1 / 3, 1 / 48
_LESS_BY_LATE, _MORE_IN_TIME = 0.9, 1.001
# Whatever the bounds say, background requests get so many tokens after so long without any: they never stand still
# while there is room in the token budget.
_LEAST_TOKENS = 64
_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What N requests of one class could compute now; arrays are int64 [N], in the order in which they get tokens.

    Attributes:
        rows: Rows of the requests, those with one pending token first.
        num_before: Tokens that are computed.
        num_pending: Known tokens that are not.
    """

    rows: Int64
    num_before: Int64
    num_pending: Int64

    def taken(self, num_tokens: int) -> Int64:
        """How many tokens each gets if all together get so many, int64 [N]."""
        if len(self.rows) == 0:
            return self.num_pending
        ahead = np.cumsum(self.num_pending) - self.num_pending
        taken: Int64 = np.clip(num_tokens - ahead, 0, self.num_pending)
        return taken

    def __add__(self, other: Part) -> Part:
        """These requests, then those."""
        return Part(
            rows=np.concatenate((self.rows, other.rows)),
            num_before=np.concatenate((self.num_before, other.num_before)),
            num_pending=np.concatenate((self.num_pending, other.num_pending)),
        )

    def and_a_prompt(self, num_tokens: int) -> Part:
        """The same, and behind them the beginning of a prompt of so many tokens."""
        return Part(
            rows=np.append(self.rows, 0),
            num_before=np.append(self.num_before, 0),
            num_pending=np.append(self.num_pending, num_tokens),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hurry:
    """Interactive requests that wait for their first token, N of them, in the order in which they get tokens.

    Attributes:
        arrival_s: float64 [N], when each came.
        num_behind: int64 [N], tokens that are still to be computed after this iteration until each has its first token.
    """

    arrival_s: Float64
    num_behind: Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundCounts:
    """Since the start.

    Attributes:
        num_tokens: Tokens computed for background requests, again ones too.
        num_all_tokens: Tokens computed for all requests.
    """

    num_tokens: int = 0
    num_all_tokens: int = 0


class Background:
    """Bounds background tokens of each iteration, and counts them.

    Args:
        clock: Seconds, monotonic: the clock of `Request.arrival_s`.
        is_there: Says whether there are background requests, running or waiting.

    Attributes:
        counts: Of the iterations so far.
    """

    def __init__(self, clock: Callable[[], float], is_there: Callable[[], bool]) -> None:
        self._clock, self._is_there = clock, is_there
        self._served_s = clock()
        self._predicted_s = self._in_flight_s = 0.0
        self._part = _MOST_PART
        self.counts = BackgroundCounts()

    def max_tokens(
        self, pace: Pace, max_batch_tokens: int, first: Part, taken: Int64, behind: Part, hurry: Callable[[], Hurry]
    ) -> int:
        """Most tokens of background requests in the next iteration.

        Tokens that remain when all running ones have theirs are counted as the beginning of a new prompt.

        Args:
            pace: The bounds.
            max_batch_tokens: The token budget.
            first, taken: Interactive requests, and the tokens that each of them gets (int64 [N]).
            behind: Background requests.
            hurry: Says which of the interactive ones have no token yet; asked only where it matters.
        """
        room = max_batch_tokens - int(taken.sum())
        iteration_time = pace.iteration_time
        if iteration_time is None or room <= 0 or not self._is_there():
            return max(room, 0)
        now_s = self._clock()
        has_decodes = bool(len(first.rows)) and int(first.num_pending[0]) == 1
        bound_s = self._bound_s(pace, iteration_time, max_batch_tokens, hurry, has_decodes=has_decodes, now_s=now_s)
        fixed, filling = _shape(first, taken), behind.and_a_prompt(max_batch_tokens)

        def time_s(num_tokens: int) -> float:
            return iteration_time.predict_s(_sum(fixed, _shape(filling, filling.taken(num_tokens))))

        found = room
        if time_s(room) > bound_s:
            found = max(bisect_right(range(room + 1), bound_s, key=time_s) - 1, 0)
        if now_s > self._served_s + _PATIENCE_S:
            found = max(found, min(_LEAST_TOKENS, room))
        self._predicted_s = time_s(min(found, int(behind.num_pending.sum())))
        return found

    def note_formed(self, num_tokens: int, num_all_tokens: int) -> None:
        """An iteration has been formed, with so many tokens of background requests, and so many in all."""
        self._in_flight_s, self._predicted_s = self._predicted_s, 0.0
        if num_tokens or not self._is_there():
            self._served_s = self._clock()
        self.counts = BackgroundCounts(
            num_tokens=self.counts.num_tokens + num_tokens,
            num_all_tokens=self.counts.num_all_tokens + num_all_tokens,
        )

    def note_first_tokens(self, pace: Pace, arrival_s: Float64) -> None:
        """Interactive requests that came at these times (float64 [N]) have got their first token now."""
        if pace.max_ttft_s is not None and len(arrival_s):
            num_late = int(np.count_nonzero(self._clock() - arrival_s > pace.max_ttft_s))
            changed = self._part * _LESS_BY_LATE**num_late * _MORE_IN_TIME ** (len(arrival_s) - num_late)
            self._part = min(max(changed, _LEAST_PART), _MOST_PART)

    def _bound_s(
        self,
        pace: Pace,
        iteration_time: IterationTime,
        max_batch_tokens: int,
        hurry: Callable[[], Hurry],
        *,
        has_decodes: bool,
        now_s: float,
    ) -> float:
        """Longest time of an iteration with background tokens."""
        bounds = [math.inf]
        if has_decodes and pace.max_itl_s is not None:
            bounds.append(pace.max_itl_s)
        if pace.max_ttft_s is not None:
            bounds.append(pace.max_ttft_s * self._part)
            waiting = hurry()
            if len(waiting.arrival_s):
                prompt = BatchShape(num_tokens=max_batch_tokens, prefill_context=max_batch_tokens**2 // 2)
                token_s = iteration_time.predict_s(prompt) / max_batch_tokens
                start_s = now_s + self._in_flight_s
                left_s = waiting.arrival_s + pace.max_ttft_s - start_s - waiting.num_behind * token_s
                bounds.append(float(left_s.min()))
        return min(bounds)


def _shape(part: Part, taken: Int64) -> BatchShape:
    """The sizes of a batch of these requests alone, each with so many tokens (int64 [N])."""
    is_decode = part.num_pending == 1
    before, of_prompt = part.num_before, np.where(is_decode, 0, taken)
    decodes = taken * is_decode
    return BatchShape(
        num_tokens=int(taken.sum()),
        num_decode_tokens=int(decodes.sum()),
        decode_context=int((decodes * (before + 1)).sum()),
        prefill_context=int((of_prompt * before + of_prompt * (of_prompt + 1) // 2).sum()),
        num_sampled=int(np.count_nonzero((taken == part.num_pending) & (taken > 0))),
    )


def _sum(one: BatchShape, other: BatchShape) -> BatchShape:
    return BatchShape(
        num_tokens=one.num_tokens + other.num_tokens,
        num_decode_tokens=one.num_decode_tokens + other.num_decode_tokens,
        decode_context=one.decode_context + other.decode_context,
        prefill_context=one.prefill_context + other.prefill_context,
        num_sampled=one.num_sampled + other.num_sampled,
    )
