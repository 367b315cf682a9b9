"""Whether drafts pay in an iteration: what they are expected to bring against what their tokens cost.

An iteration of few tokens takes as long as reading the weights does, so that some more are almost free; in a large
batch each token has its price, and the guesses that turn out wrong are paid for nothing. What drafts are likely to
bring is learnt by `drafts.py`; what an iteration takes is the engine's estimate (`plan/iteration_time.py`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime

# Before iterations have been measured: so many tokens take about as long as one on any device that we know.
MAX_TOKENS_UNMEASURED = 32
# An iteration with drafts begins only when the one before has been read: the device has nothing to do meanwhile.
HOST_GAP_S = 0.5e-3
# Latest batches of each kind that are kept; the median of a few is not moved by one that was disturbed.
_NUM_KEPT = 9
_LEAST_TIME_S = 1e-9
# After so many batches that were formed without drafts, though there were some, one gets them.
_LEAST_PATIENCE, _MOST_PATIENCE = 32, 1024


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


class Gain:
    """Decides for or against drafts, by the engine's estimate and by how far drafts have been off it.

    The estimate has no term for what is special about drafts, and what it says of them hangs on which batches it was
    fitted to. So the last iterations with drafts and without are kept, and what both took is compared with what the
    estimate says of them now. Where drafts are declined, nothing is learnt of them: now and then one is tried.
    """

    def __init__(self) -> None:
        self._plain: deque[tuple[BatchShape, float]] = deque(maxlen=_NUM_KEPT)
        self._drafted: deque[tuple[BatchShape, float]] = deque(maxlen=_NUM_KEPT)
        self._num_declined, self._patience = 0, _LEAST_PATIENCE

    def allows(self, shape: BatchShape, drafts: list[Draft], iteration_time: IterationTime | None) -> bool:
        """Whether a batch shall have these drafts.

        Args:
            shape: Without drafts; each request that samples gets a token.
            drafts: Of some of its decodes.
            iteration_time: None if nothing has been measured: then the number of tokens is bounded.
        """
        drafted = with_drafts(shape, drafts)
        if iteration_time is None:
            return drafted.num_tokens <= MAX_TOKENS_UNMEASURED
        num_expected = shape.num_sampled + sum(draft.expected for draft in drafts)
        time_s = iteration_time.predict_s(shape)
        drafted_s = iteration_time.predict_s(drafted) * self.correction(iteration_time)
        if num_expected * time_s > shape.num_sampled * (drafted_s + HOST_GAP_S):
            self._patience = _LEAST_PATIENCE
            return True
        # Not even tokens that cost nothing would pay: there is nothing to try.
        if num_expected * time_s <= shape.num_sampled * (time_s + HOST_GAP_S):
            return False
        self._num_declined += 1
        return self._num_declined > self._patience

    def correction(self, iteration_time: IterationTime) -> float:
        """How much longer batches with drafts take than the estimate says, compared with those without."""
        if not self._plain or not self._drafted:
            return 1.0
        drafted, plain = (
            median(time_s / max(iteration_time.predict_s(shape), _LEAST_TIME_S) for shape, time_s in latest)
            for latest in (self._drafted, self._plain)
        )
        return drafted / plain

    def note_time(self, shape: BatchShape, time_s: float, *, is_drafted: bool) -> None:
        """A batch without parts of prompts has taken so long."""
        if time_s > 0:
            (self._drafted if is_drafted else self._plain).append((shape, time_s))

    def note_formed(self) -> None:
        """A batch has drafts: if it was a try, the next one comes later, unless drafts pay by then."""
        if self._num_declined > self._patience:
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self._num_declined = 0
