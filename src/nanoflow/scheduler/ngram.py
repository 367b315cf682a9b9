"""Prompt look-up: how a sequence went on the last time that its last tokens stood in it.

Plain arrays: which requests are looked at, and what becomes of the find, is `drafts.py`'s.
"""

from __future__ import annotations

import numpy as np

from nanoflow.batch import Int32


def continuation(tokens: Int32, count: int, *, longest: int, shortest: int) -> Int32:
    """What followed the latest earlier place where the most of the last tokens stand.

    A match of `longest` tokens is looked for first, then shorter ones. Where the match is near the end, what follows
    it runs into the draft itself: a sequence with a period goes on with the period.

    Args:
        tokens: int32 [N].
        count: How many tokens to propose, at least 1.
        longest, shortest: Lengths of matches that are tried, 1 <= shortest <= longest.

    Returns:
        int32 [count]; empty if there is no match.
    """
    num_tokens = len(tokens)
    # Places behind an earlier token that is the same as the last one; `lengths` of the match that ends there.
    places = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1 if num_tokens > 1 else np.zeros(0, np.int64)
    best = 1 if len(places) else 0
    matching = places
    for length in range(2, min(longest, num_tokens - 1) + 1):
        matching = matching[matching >= length]
        matching = matching[tokens[matching - length] == tokens[num_tokens - length]]
        if not len(matching):
            break
        places, best = matching, length
    if best < shortest:
        return np.zeros(0, np.int32)
    start = int(places[-1])
    period = num_tokens - start
    return tokens[start + np.arange(count) % period]
