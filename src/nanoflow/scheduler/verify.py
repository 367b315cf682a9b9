"""Which of the tokens drawn in an iteration count: those that would have been drawn without drafts, and no others.

A request with a draft of d tokens draws d + 1 times in an iteration: behind its last token and behind each token of the
draft, always with the random number of the position. A draw counts while all before it have been what the draft said,
for then it was drawn behind the right tokens. The draft itself is not random, so this is rejection sampling: a draft
token x is kept with probability p(x), and otherwise the token has the distribution p without x. Since the random
numbers belong to positions, the tokens are even the same as without drafts.
"""

from __future__ import annotations

import numpy as np

from nanoflow.batch import Bool, DenseBatch, Int32


def counting_draws(batch: DenseBatch, token_ids: Int32, is_last: Bool) -> Bool:
    """Which draws count, bool [S]: the first of each request, and each further one whose predecessors were right.

    Args:
        batch: With S draws.
        token_ids: int32 [S], drawn.
        is_last: bool [S], the draw ends its request: none behind it counts.
    """
    if not batch.num_draft_tokens:
        return np.ones(len(token_ids), dtype=np.bool_)
    num_before, num_after = batch.draws_around
    followed_by = batch.token_ids[np.minimum(batch.logit_tokens + 1, batch.num_tokens - 1)]
    ends_here = (num_after == 0) | (token_ids != followed_by) | is_last
    num_ended = np.cumsum(ends_here) - ends_here
    is_counting: Bool = num_ended == num_ended[np.arange(len(token_ids)) - num_before]
    return is_counting
