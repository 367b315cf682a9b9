"""What is expected of output lengths, learnt from every token that is generated and from every request that leaves.

Lengths are known only when requests have ended, and short ones end first: an average of ended requests is too low at
the start. What can be counted without that bias is how often a request that has reached some length ends there. So this
file keeps, for ranges of lengths, how many requests got that far, how many tokens they generated there, and how many
ended there.
"""

from __future__ import annotations

import math

import numpy as np

from nanoflow.batch import Bool, Float64, Int64
from nanoflow.scheduler.progress import Progress

# Before anything has ended: this many tokens on average (or a part of what a request has, if that is more), as if so
# many requests had shown it, and at least a part of one in every range.
_PRIOR_TOKENS = 256
_PRIOR_OUTLIVED = 0.25
_PRIOR_REQUESTS = 4.0
_LEAST_ARRIVALS = 0.25
# So many ends are remembered at least, twice as many at most.
_REMEMBERED_ENDS = 256
# The predicted peak lets every request stay as long as it is told here. Were that the mean, those that leave early
# would be counted as if they stayed: of N requests whose lengths know no age, with mean m, the peak is N * m / e tokens
# and not N * m. Simulated loads of chats bear this part out: more wastes pages, less preempts.
_COUNTED = 1 / math.e
# Every preemption says that too little was counted: it raises the part, up to a most, and ends bring it back.
_MORE_BY_PREEMPTION = 1.2
_MOST_COUNTED = 1.5
_BACK_BY_END = 0.02
# Lengths from here on are one range.
_LONGEST = 1 << 17


class OutputLength:
    """Expected output lengths.

    An end is whatever takes a request away: end of sequence, its own length, a stop string that the front end found, a
    cancel, a client's time-out. They all count alike, since what is asked here is how long a request will hold its
    pages, not how long its answer would have become.
    """

    def __init__(self) -> None:
        edges = _edges()
        self._start, self._width = edges[:-1], np.diff(edges)
        self._range_of = np.repeat(np.arange(len(self._start)), self._width)
        mean = np.maximum(_PRIOR_TOKENS, self._start * _PRIOR_OUTLIVED)
        arrivals = np.maximum(_PRIOR_REQUESTS * np.exp(-self._start / _PRIOR_TOKENS), _LEAST_ARRIVALS)
        ends = arrivals * -np.expm1(-self._width / mean)
        # float64 [3, ranges]: requests that got there, tokens, ends.
        self._prior = np.stack((arrivals, ends * mean, ends))
        self._seen = np.zeros_like(self._prior)
        self._counted = _COUNTED
        self._remaining: Float64 | None = None

    def observe_tokens(self, num_generated: Int64, is_last: Bool) -> None:
        """Requests have got a token: their number of tokens with it, int64 [N], and whether it was their last."""
        ranges = self._ranges(num_generated - 1)
        self._seen[0] += self._count(ranges[num_generated - 1 == self._start[ranges]])
        self._seen[1] += self._count(ranges)
        self._end(ranges[is_last])

    def observe_end(self, num_generated: int) -> None:
        """A request has left with so many tokens, at least 1, after they were observed."""
        self._end(self._ranges(np.array([num_generated - 1])))

    def observe_preemption(self) -> None:
        """Pages have run out."""
        self._counted = min(self._counted * _MORE_BY_PREEMPTION, _MOST_COUNTED)

    def counted_remaining(self, progress: Progress) -> Int64:
        """Tokens that each request is counted to generate still, int64 [N], at least 1 and at most what it may.

        If the length is exact: all that it may. Otherwise 1 / e of what is expected, more after preemptions.
        """
        remaining = self._by_range()
        ranges = self._ranges(progress.num_generated)
        into = np.minimum((progress.num_generated - self._start[ranges]) / self._width[ranges], 1.0)
        likely = remaining[ranges] + (remaining[ranges + 1] - remaining[ranges]) * into
        likely = np.minimum(np.ceil(self._counted * likely).astype(np.int64), progress.max_remaining)
        return np.maximum(np.where(progress.is_exact, progress.max_remaining, likely), 1, dtype=np.int64)

    def _ranges(self, num_generated: Int64) -> Int64:
        return self._range_of[np.minimum(num_generated, _LONGEST - 1)]

    def _count(self, ranges: Int64) -> Int64:
        return np.bincount(ranges, minlength=len(self._start))

    def _end(self, ranges: Int64) -> None:
        self._remaining = None
        if len(ranges) == 0:
            return
        self._seen[2] += self._count(ranges)
        self._counted = _COUNTED + (self._counted - _COUNTED) * (1 - _BACK_BY_END) ** len(ranges)
        if self._seen[2].sum() > 2 * _REMEMBERED_ENDS:
            # A workload changes: what is old counts less and less.
            self._seen *= 0.5

    def _by_range(self) -> Float64:
        """Tokens expected from the start of each range on, and from the end of the last.

        A request that gets to a range generates the mean number of tokens there and, if it gets through, those that are
        expected from the range's end on.
        """
        if self._remaining is None:
            arrivals, tokens, ends = self._seen + self._prior
            within, through = np.minimum(tokens / arrivals, self._width), np.maximum(1.0 - ends / arrivals, 0.0)
            remaining = np.empty(len(self._start) + 1)
            remaining[-1] = _LONGEST * _PRIOR_OUTLIVED
            for place in range(len(self._start) - 1, -1, -1):
                remaining[place] = within[place] + through[place] * remaining[place + 1]
            self._remaining = remaining
        return self._remaining


def _edges() -> Int64:
    """Ranges of 8 tokens to 32, then four an octave."""
    octaves = 32 * 2 ** np.arange(0, np.log2(_LONGEST / 32) + 0.125, 0.25)
    return np.concatenate(([0, 8, 16, 24], np.round(octaves))).astype(np.int64)
