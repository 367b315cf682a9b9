"""Admission by the predicted peak of pages (NanoFlow, section 4.2.1).

A request is admitted if, with expected output lengths, the pages of all running requests never exceed the pool. If the
prediction is wrong, the scheduler preempts. `lengths.py` predicts lengths, `policies.py` has other ways to expect
some. All work on token counts only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from nanoflow.batch import Int64
from nanoflow.kvcache.sizes import PoolSize, chunk_pages, window_pages
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
        self._num_tokens, self._num_remaining = num_tokens, num_remaining
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

    def fits_in_windows(self, count: int, num_pages: int, most_each: int) -> bool:
        """Whether `num_pages` hold all that the first `count` requests will have, at most `most_each` of each."""
        last = self._num_tokens[:count] + self._num_remaining[:count] - 1
        return bool(np.minimum(-(-last // self._page_size), most_each).sum() <= num_pages)

    def _num_carries(self, d: Int64, q: Int64, moments: Int64) -> Int64:
        """For each end k, how many d of the requests up to k reach P - q_k. There are only P different q."""
        values, which = np.unique(q, return_inverse=True)
        counts = np.cumsum(d >= self._page_size - values[:, None], axis=1, dtype=np.int32)
        return counts[which, moments].astype(np.int64)


def num_admissible(
    running: Progress,
    candidates: Progress,
    expect: Callable[[Progress], Int64],
    *,
    pools: Sequence[PoolSize],
    page_size: int,
    max_batch_tokens: int,
    num_shared: Int64 | None = None,
    is_all_there: bool = True,
) -> int:
    """The largest number of candidates, taken in order, that can join the running requests within the predicted peak.

    It must fit into every pool. Where a window bounds what a request holds, two upper bounds of the peak are known:
    the peak without the window, and everybody's largest need at the same time.

    The peak grows with every request, so bisection finds the number; most often all can, or none. If nothing runs, the
    first may always join, if all pages are there: no request is accepted that does not fit alone, however wrong the
    prediction.

    Args:
        running, candidates: How far they are.
        expect: How many more tokens are expected of each, int64 [N], at least 1.
        pools: Of the KV groups.
        page_size: Tokens a page.
        max_batch_tokens: Token budget of an iteration.
        num_shared: int64 [candidates, groups], pages of each that running ones hold already, so that they need no room
            of their own; none if not given. When the last of those that hold them has left they do: a small error.
        is_all_there: No pages are missing in `pools` that will be free again soon.
    """
    everyone = running + candidates
    peak = PeakOfPages(everyone.num_tokens, expect(everyone), page_size)
    num_running, num_candidates = len(running.num_tokens), len(candidates.num_tokens)

    def fits(count: int, num_pages: int, window: int | None) -> bool:
        if window is not None:
            for_windows = num_pages - chunk_pages(max_batch_tokens, page_size)
            if peak.fits_in_windows(count, for_windows, window_pages(window, page_size)):
                return True
        return peak.fits(count, num_pages)

    shared = np.zeros((num_candidates + 1, len(pools)), dtype=np.int64)
    if num_shared is not None:
        np.cumsum(num_shared, axis=0, out=shared[1:])

    def can_join(count: int) -> bool:
        return all(
            fits(num_running + count, pool.num_pages + int(shared[count, group]), pool.window)
            for group, pool in enumerate(pools)
        )

    if can_join(num_candidates):
        return num_candidates
    if num_candidates == 0 or not can_join(1):
        return min(num_candidates, 1) if num_running == 0 and is_all_there else 0
    fitting = range(2, num_candidates)
    return 1 + bisect_left(fitting, True, key=lambda count: not can_join(count))
