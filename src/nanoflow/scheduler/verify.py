"""Which of the tokens drawn in an iteration count: those that would have been drawn without drafts, and no others.

A request with a draft of d tokens has d + 1 draws in an iteration: one behind its last known token, and one behind
each token of the draft, each with the random number of its own position. A draw counts while all before it have been
what the draft said, since then it was drawn behind the right tokens. For a draft that is not random itself this is
rejection sampling: a draft token x is kept with probability p(x), otherwise the token has the distribution p without
x. As the random numbers are those of the positions, the tokens are even the same as without drafts.
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
    num_before, num_after = batch.draws_around
    followed_by = batch.token_ids[np.minimum(batch.logit_tokens + 1, batch.num_tokens - 1)]
    ends_here = (num_after == 0) | (token_ids != followed_by) | is_last
    num_ended = np.cumsum(ends_here) - ends_here
    is_counting: Bool = num_ended == num_ended[np.arange(len(token_ids)) - num_before]
    return is_counting
