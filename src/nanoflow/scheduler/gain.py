"""Whether drafts pay in an iteration: what they are expected to bring against what their tokens cost.

An iteration of few tokens takes as long as reading the weights does, so that some more are almost free; in a large
batch each token has its price, and the guesses that turn out wrong are paid for nothing. What drafts are likely to
bring is learnt by `drafts.py`; what an iteration takes is the engine's estimate (`plan/iteration_time.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime

# Before iterations have been measured: so many tokens take about as long as one on any device that we know.
MAX_TOKENS_UNMEASURED = 32
# An iteration with drafts begins only when the one before has been read: the device has nothing to do meanwhile.
HOST_GAP_S = 0.5e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft that could be verified.

    Attributes:
        num_tokens: Of the draft, at least 1.
        context: Tokens in the cache with the request's last token, without the draft.
        expected: How many of its tokens will probably count.
    """

    num_tokens: int
    context: int
    expected: float


def with_drafts(shape: BatchShape, drafts: list[Draft]) -> BatchShape:
    """A batch whose decodes get these drafts: each becomes a part of a prompt with 1 + its number of tokens."""
    num_tokens = sum(draft.num_tokens for draft in drafts)
    pairs = sum(
        (1 + draft.num_tokens) * draft.context + draft.num_tokens * (draft.num_tokens + 1) // 2 for draft in drafts
    )
    return BatchShape(
        num_tokens=shape.num_tokens + num_tokens,
        num_decode_tokens=shape.num_decode_tokens - len(drafts),
        decode_context=shape.decode_context - sum(draft.context for draft in drafts),
        prefill_context=shape.prefill_context + pairs,
        prefill_kv_tokens=shape.prefill_kv_tokens + sum(draft.context + draft.num_tokens for draft in drafts),
        num_sampled=shape.num_sampled + num_tokens,
    )


def pays(shape: BatchShape, drafts: list[Draft], iteration_time: IterationTime | None) -> bool:
    """Whether a batch of this shape gives more tokens a second with the drafts than without.

    Args:
        shape: Without drafts; each request that samples gets a token.
        drafts: Of some of its decodes.
        iteration_time: None if nothing has been measured: then the number of tokens is bounded.
    """
    drafted = with_drafts(shape, drafts)
    if iteration_time is None:
        return drafted.num_tokens <= MAX_TOKENS_UNMEASURED
    expected = sum(draft.expected for draft in drafts)
    time_s = iteration_time.predict_s(shape)
    drafted_s = iteration_time.predict_s(drafted) + HOST_GAP_S
    return (shape.num_sampled + expected) * time_s > shape.num_sampled * drafted_s
