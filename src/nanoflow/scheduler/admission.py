"""Admission by the predicted peak of pages (NanoFlow, section 4.2.1).

A request is let in when, by what is known and expected of output lengths, the pages of all running requests will at no
time exceed the pool. The prediction may be wrong; then the scheduler preempts. This file holds the whole prediction:
it knows token counts only, neither rows nor requests (`rows.py`) nor their queue (`waiting.py`).
"""

from __future__ import annotations

from bisect import bisect_right
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


def predicted_peak_pages(num_tokens: Int64, num_remaining: Int64, page_size: int) -> int:
    """Most pages ever in use if each of N requests generates a token an iteration and leaves at its end.

    Between two ends the pages only grow, so the peak is at one of the N moments just before a request ends. When the
    k-th request in order of ending, latest first, is about to end, those with r >= r_k are there and each has s + r_k
    tokens, the last of which is never computed and needs no place:

        peak = max over k of sum over i with r_i >= r_k of ceil((s_i + r_k - 1) / page_size)

    With r_k = m * page_size + q the sum is k * m plus the k-th running sum of ceil((s_i + q - 1) / page_size), and
    there are only `page_size` different q: a table of N x page_size running sums gives all N moments at once.

    Args:
        num_tokens: int64 [N], s: tokens of each request now, its whole prompt among them.
        num_remaining: int64 [N], r: tokens that it will still generate, at least 1.
        page_size: Tokens a page.
    """
    if len(num_tokens) == 0:
        return 0
    latest_first = np.argsort(-num_remaining)
    s, r = num_tokens[latest_first], num_remaining[latest_first]
    m, q = np.divmod(r, page_size)
    held = np.cumsum((s[:, None] + (np.arange(page_size) + page_size - 2)) // page_size, axis=0)
    k = np.arange(len(s))
    return int((held[k, q] + (k + 1) * m).max())


def num_admissible(
    running: Progress, candidates: Progress, lengths: OutputLength, *, num_pages: int, page_size: int
) -> int:
    """How many of the candidates, from the first, can join the running ones: the most whose predicted peak fits.

    The peak grows with every request, so bisection finds the number in log2 evaluations. If nothing runs, the first
    may always join: no request is accepted that does not fit alone, however wrong the prediction.
    """
    everyone = running + candidates
    remaining = lengths.expected_remaining(everyone)
    num_running, num_candidates = len(running.num_tokens), len(candidates.num_tokens)

    def peak(count: int) -> int:
        total = num_running + count
        return predicted_peak_pages(everyone.num_tokens[:total], remaining[:total], page_size)

    num_fitting = bisect_right(range(1, num_candidates + 1), num_pages, key=peak)
    return max(num_fitting, min(num_candidates, 1) if num_running == 0 else 0)
