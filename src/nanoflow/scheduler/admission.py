"""Admission by the predicted peak of pages (NanoFlow, section 4.2.1).

A request is let in when, by what is known and expected of output lengths, the pages of all running requests will at no
time exceed the pool. The prediction may be wrong; then the scheduler preempts. This file holds the whole prediction:
it knows token counts only, neither rows nor requests (`rows.py`) nor their queue (`waiting.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from nanoflow.batch import Bool, Int64

_AVERAGED_REQUESTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far N requests are, in tokens.

    Attributes:
        num_tokens: int64 [N], prompt and generated.
        num_generated: int64 [N].
        max_remaining: int64 [N], tokens that may still be generated.
        is_exact: bool [N], all of them will be (end of sequence is ignored).
    """

    num_tokens: Int64
    num_generated: Int64
    max_remaining: Int64
    is_exact: Bool

    def __add__(self, other: Progress) -> Progress:
        """These requests, then those."""
        return Progress(
            num_tokens=np.concatenate((self.num_tokens, other.num_tokens)),
            num_generated=np.concatenate((self.num_generated, other.num_generated)),
            max_remaining=np.concatenate((self.max_remaining, other.max_remaining)),
            is_exact=np.concatenate((self.is_exact, other.is_exact)),
        )


class OutputLength:
    """What is expected of output lengths, learnt from the requests that have finished.

    The average is plain over the first 256 finished requests and exponential with weight 1/256 from then on: right at
    once, and it follows a workload that changes.
    """

    def __init__(self) -> None:
        self._num_finished = 0
        self._average = 0.0

    def observe(self, num_generated: int) -> None:
        """A request has finished with so many tokens."""
        self._num_finished += 1
        self._average += (num_generated - self._average) / min(self._num_finished, _AVERAGED_REQUESTS)

    def expected_remaining(self, progress: Progress) -> Int64:
        """Tokens that each request is expected to generate still, int64 [N], at least 1.

        The rule: what is missing to the average, and at least a quarter of what the request has generated already (one
        that has outlived the average will go on for a while, the longer the older it is); never more than it may. If
        nothing has finished yet, or the length is exact: all that it may.
        """
        expected = progress.max_remaining
        if self._num_finished:
            missing = np.ceil(self._average - progress.num_generated).astype(np.int64)
            likely = np.maximum(missing, progress.num_generated // 4)
            expected = np.where(progress.is_exact, expected, np.minimum(likely, expected))
        return np.maximum(expected, 1, dtype=np.int64)


class PeakOfPages:
    """Most pages ever in use if each of N requests generates a token an iteration and leaves at its end.

    Between two ends the pages only grow, so the peak is at one of the N moments just before a request ends. When the
    k-th request in order of ending, latest first, is about to end, those with r >= r_k are there and each has s + r_k
    tokens, the last of which is never computed and needs no place:

        peak = max over k of sum over i with r_i >= r_k of ceil((s_i + r_k - 1) / P), P the tokens of a page

    With s_i - 1 = P c_i + d_i and r_k - 1 = P m_k + q_k the pages of request i are c_i + m_k + 1, and one more if
    d_i + q_k >= P. So running sums of c give the peak up to a page a request; what is left to count, for the moments
    whose bounds leave the question open, is how many of the first k have such a d.

    The order is found once, for all requests; the peak may then be asked for any number of the first.

    Args:
        num_tokens: int64 [N], s: tokens of each request now, its whole prompt among them.
        num_remaining: int64 [N], r: tokens that it will still generate, at least 1.
        page_size: Tokens a page.
    """

    def __init__(self, num_tokens: Int64, num_remaining: Int64, page_size: int) -> None:
        self._page_size = page_size
        self._latest_first = np.argsort(-num_remaining)
        s, r = (values[self._latest_first] - 1 for values in (num_tokens, num_remaining))
        self._c, self._m = s // page_size, r // page_size
        self._d, self._q = s - self._c * page_size, r - self._m * page_size

    def fits(self, count: int, num_pages: int) -> bool:
        """Whether the peak of the first `count` requests is at most `num_pages`."""
        chosen = np.flatnonzero(self._latest_first < count)
        k = np.arange(1, len(chosen) + 1)
        least = np.cumsum(self._c[chosen]) + k * (self._m[chosen] + 1)
        open_moments = np.flatnonzero(least + k > num_pages)
        if len(open_moments) == 0:
            return True
        if (least > num_pages).any():
            return False
        d, q = self._d[chosen[: open_moments[-1] + 1]], self._q[chosen[open_moments]]
        return not (least[open_moments] + self._num_carries(d, q, open_moments) > num_pages).any()

    def _num_carries(self, d: Int64, q: Int64, moments: Int64) -> Int64:
        """For each moment k, how many d of those up to k reach P - q_k. There are only P different q."""
        values, which = np.unique(q, return_inverse=True)
        counts = np.cumsum(d >= self._page_size - values[:, None], axis=1, dtype=np.int32)
        return counts[which, moments].astype(np.int64)


def num_admissible(
    running: Progress, candidates: Progress, lengths: OutputLength, *, num_pages: int, page_size: int
) -> int:
    """How many of the candidates, from the first, can join the running ones: the most whose predicted peak fits.

    The peak grows with every request, so bisection finds the number; most often all can, or none. If nothing runs, the
    first may always join: no request is accepted that does not fit alone, however wrong the prediction.
    """
    everyone = running + candidates
    peak = PeakOfPages(everyone.num_tokens, lengths.expected_remaining(everyone), page_size)
    num_running, num_candidates = len(running.num_tokens), len(candidates.num_tokens)
    if peak.fits(num_running + num_candidates, num_pages):
        return num_candidates
    if num_candidates == 0 or not peak.fits(num_running + 1, num_pages):
        return min(num_candidates, 1) if num_running == 0 else 0
    fitting = range(2, num_candidates)
    return 1 + bisect_left(fitting, True, key=lambda count: not peak.fits(num_running + count, num_pages))
