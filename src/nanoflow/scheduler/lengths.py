"""Expected output lengths, learnt from every generated token and every ended request.

The mean length of ended requests is too low at first, because short requests end first. How often a request that has
reached some length ends there can be counted without this bias. So for each range of lengths this file counts the
requests that reached it, the tokens that they generated in it, and the requests that ended in it.
"""

from __future__ import annotations

import math

import numpy as np

from nanoflow.batch import Bool, Float64, Int64
from nanoflow.scheduler.progress import Progress

# Prior: this mean number of remaining tokens (or a part of the tokens so far, if that is more), weighted as this many
# observed requests, and in every range as at least a part of one.
_PRIOR_TOKENS = 256
_PRIOR_OUTLIVED = 0.25
_PRIOR_REQUESTS = 4.0
_LEAST_ARRIVALS = 0.25
# After twice as many ends, all counts are halved.
_REMEMBERED_ENDS = 256
# The predicted peak assumes that every request generates as many tokens as we say here. With the mean, requests that
# end early would be counted as if they stayed. For N requests with exponentially distributed lengths of mean m, the
# peak is N * m / e tokens rather than N * m. Simulated chat loads confirm this factor: a larger one wastes pages, a
# smaller one preempts more.
_COUNTED = 1 / math.e
# A preemption means that too little was counted: it raises the factor, up to a maximum; ends bring it back.
_MORE_BY_PREEMPTION = 1.2
_MOST_COUNTED = 1.5
_BACK_BY_END = 0.02
# Lengths from here on share one range.
_LONGEST = 1 << 17


class OutputLength:
    """Expected output lengths.

    An end is anything that removes a request: end of sequence, its maximum length, a stop string, a cancellation, a
    client's time-out. All count alike, because the question is how long a request occupies its pages.
    """

    def __init__(self) -> None:
        edges = _edges()
        self._start, self._width = edges[:-1], np.diff(edges)
        self._range_of = np.repeat(np.arange(len(self._start)), self._width)
        mean = np.maximum(_PRIOR_TOKENS, self._start * _PRIOR_OUTLIVED)
        arrivals = np.maximum(_PRIOR_REQUESTS * np.exp(-self._start / _PRIOR_TOKENS), _LEAST_ARRIVALS)
        ends = arrivals * -np.expm1(-self._width / mean)
        # float64 [3, ranges]: requests that reached the range, tokens generated in it, ends in it.
        self._prior = np.stack((arrivals, ends * mean, ends))
        self._seen = np.zeros_like(self._prior)
        self._counted = _COUNTED
        self._remaining: Float64 | None = None

    def observe_tokens(self, num_generated: Int64, is_last: Bool) -> None:
        """Count one token of each request: tokens generated so far, int64 [N]; whether it was the last, bool [N]."""
        ranges = self._ranges(num_generated - 1)
        self._seen[0] += self._count(ranges[num_generated - 1 == self._start[ranges]])
        self._seen[1] += self._count(ranges)
        self._end(ranges[is_last])

    def observe_end(self, num_generated: int) -> None:
        """Count the end of a request after `num_generated` tokens (at least 1), which were observed before."""
        self._end(self._ranges(np.array([num_generated - 1])))

    def observe_preemption(self) -> None:
        """Note a preemption: pages have run out."""
        self._counted = min(self._counted * _MORE_BY_PREEMPTION, _MOST_COUNTED)

    def counted_remaining(self, progress: Progress) -> Int64:
        """Tokens that each request is assumed to generate from now on, int64 [N], from 1 to the most that it may.

        If lengths are exact, the most that it may. Otherwise the expected number / e, and more after preemptions.
        """
        return self._counting(self._counted * self._expected(progress), progress)

    def held_remaining(self, progress: Progress) -> Int64:
        """The same, but so that a request's prompt leaves with it too.

        Of N requests with s tokens each and lengths of mean m to come, N exp(-t / m) are there after t tokens with
        s + t each, at most N (s + c) in all, with c = m (exp(x) / e - x) and x = s / m up to 1. More after preemptions.
        """
        mean = np.maximum(self._expected(progress), 1.0)
        part = np.minimum(progress.num_tokens / mean, 1.0)
        return self._counting(mean * (self._counted * np.exp(part) - part), progress)

    def _expected(self, progress: Progress) -> Float64:
        """Mean number of tokens to come, float64 [N]."""
        remaining = self._by_range()
        ranges = self._ranges(progress.num_generated)
        into = np.minimum((progress.num_generated - self._start[ranges]) / self._width[ranges], 1.0)
        return np.asarray(remaining[ranges] + (remaining[ranges + 1] - remaining[ranges]) * into)

    def _counting(self, likely: Float64, progress: Progress) -> Int64:
        """Whole numbers from 1 to the most that each may generate, and that where lengths are exact."""
        counted = np.minimum(np.ceil(likely).astype(np.int64), progress.max_remaining)
        return np.maximum(np.where(progress.is_exact, progress.max_remaining, counted), 1, dtype=np.int64)

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
            # Old observations lose weight, as workloads change.
            self._seen *= 0.5

    def _by_range(self) -> Float64:
        """Expected remaining tokens at the start of each range, and at the end of the last one.

        A request at the start of a range generates the mean number of tokens within the range and, if it reaches the
        end of the range, the tokens expected from there.
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
    """Bounds of the ranges: 8 tokens each up to 32, then four ranges per factor of 2."""
    octaves = 32 * 2 ** np.arange(0, np.log2(_LONGEST / 32) + 0.125, 0.25)
    return np.concatenate(([0, 8, 16, 24], np.round(octaves))).astype(np.int64)
