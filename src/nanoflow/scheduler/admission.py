"""Admission by the predicted peak of pages (NanoFlow, section 4.2.1).

A request is admitted if, with expected output lengths, the pages of all running requests never exceed the pool. If the
prediction is wrong, the scheduler preempts. `lengths.py` predicts lengths. Both files work on token counts only.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from nanoflow.batch import Int64
from nanoflow.scheduler.lengths import OutputLength
from nanoflow.scheduler.progress import Progress


class PeakOfPages:
    """Largest number of pages in use if each of N requests generates a token an iteration and leaves at its end.

    Pages only grow between two ends, so the peak is just before one of the N ends. Sort requests by end, latest first.
    When request k is about to end, the requests i with r_i >= r_k are present, each with s_i + r_k tokens. The last of
    these tokens is never computed and needs no slot:

        peak = max over k of sum over i with r_i >= r_k of ceil((s_i + r_k - 1) / P), with P tokens in a page

    With s_i - 1 = P c_i + d_i and r_k - 1 = P m_k + q_k, request i has c_i + m_k + 1 pages, and one more if d_i + q_k
    >= P. So cumulative sums of c give the peak up to one page per request. Only at ends where these bounds do not
    decide the question we count how many of the first k requests have such a d.

    The requests are sorted once; then the peak can be computed for any number of the first requests.

    Args:
        num_tokens: int64 [N], s: tokens of each request now, including its whole prompt.
        num_remaining: int64 [N], r: tokens that it will still generate, at least 1.
        page_size: P, tokens of a page.
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
        """For each end k, how many d of the requests up to k reach P - q_k. There are only P different q."""
        values, which = np.unique(q, return_inverse=True)
        counts = np.cumsum(d >= self._page_size - values[:, None], axis=1, dtype=np.int32)
        return counts[which, moments].astype(np.int64)


def num_admissible(
    running: Progress, candidates: Progress, lengths: OutputLength, *, num_pages: int, page_size: int
) -> int:
    """The largest number of candidates, taken in order, that can join the running requests within the predicted peak.

    The peak grows with every request, so bisection finds the number; usually all can join, or none. If nothing runs,
    the first may always join, because every accepted request fits alone.
    """
    everyone = running + candidates
    peak = PeakOfPages(everyone.num_tokens, lengths.counted_remaining(everyone), page_size)
    num_running, num_candidates = len(running.num_tokens), len(candidates.num_tokens)
    if peak.fits(num_running + num_candidates, num_pages):
        return num_candidates
    if num_candidates == 0 or not peak.fits(num_running + 1, num_pages):
        return min(num_candidates, 1) if num_running == 0 else 0
    fitting = range(2, num_candidates)
    return 1 + bisect_left(fitting, True, key=lambda count: not peak.fits(num_running + count, num_pages))
