"""Decides whether drafts pay in an iteration: their expected gain against the cost of their tokens.

An iteration with few tokens takes as long as reading the weights, so a few more tokens are almost free. In a large
batch each token costs time, and wrong guesses waste it. `drafts.py` estimates the expected gain; the engine's model of
iterations (`plan/iteration_time.py`) predicts their time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime

# While no iteration has been measured: up to this many tokens take about as long as one on all devices we know.
MAX_TOKENS_UNMEASURED = 32
# An iteration with drafts starts only after the previous one has been read; for this time the device idles.
HOST_GAP_S = 0.5e-3
# Number of recent batches of each kind that are stored. One disturbed batch does not change the median of a few.
_NUM_KEPT = 9
_LEAST_TIME_S = 1e-9
# One batch gets drafts after this many batches that had drafts available and were formed without.
_LEAST_PATIENCE, _MOST_PATIENCE = 32, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft that could be verified.

    Attributes:
        num_tokens: Tokens of the draft, at least 1.
        context: Tokens in the cache including the request's last token, without the draft.
        expected: Expected number of accepted tokens.
    """

    num_tokens: int
    context: int
    expected: float


def with_drafts(shape: BatchShape, drafts: list[Draft]) -> BatchShape:
    """The shape of a batch with these drafts: a decode with a draft becomes a prefill of 1 + its number of tokens."""
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
    """Decides for or against drafts by predicted times, corrected by their error on recent batches with drafts.

    The prediction has no term for drafts, and its error on them depends on the batches it was fitted to. So the last
    iterations with and without drafts are stored, and their times are compared with the present prediction. While
    drafts are declined nothing is learnt about them, so one is tried from time to time.
    """

    def __init__(self) -> None:
        self._plain: deque[tuple[BatchShape, float]] = deque(maxlen=_NUM_KEPT)
        self._drafted: deque[tuple[BatchShape, float]] = deque(maxlen=_NUM_KEPT)
        self._num_declined, self._patience = 0, _LEAST_PATIENCE

    def allows(self, shape: BatchShape, drafts: list[Draft], iteration_time: IterationTime | None) -> bool:
        """Whether a batch should have these drafts.

        Args:
            shape: The batch without drafts; each request that samples gets one token.
            drafts: Drafts for some of its decodes.
            iteration_time: Predicts times; None if nothing has been measured, and then the number of tokens is limited.
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
        # If drafts would not pay even if their tokens cost nothing, they are not tried.
        if num_expected * time_s <= shape.num_sampled * (time_s + HOST_GAP_S):
            return False
        self._num_declined += 1
        return self._num_declined > self._patience

    def correction(self, iteration_time: IterationTime) -> float:
        """Measured / predicted time of batches with drafts, divided by the same ratio of batches without."""
        if not self._plain or not self._drafted:
            return 1.0
        drafted, plain = (
            median(time_s / max(iteration_time.predict_s(shape), _LEAST_TIME_S) for shape, time_s in latest)
            for latest in (self._drafted, self._plain)
        )
        return drafted / plain

    def note_time(self, shape: BatchShape, time_s: float, *, is_drafted: bool) -> None:
        """Learn the seconds that a batch of decodes and drafts took."""
        if time_s > 0:
            (self._drafted if is_drafted else self._plain).append((shape, time_s))

    def note_formed(self) -> None:
        """Note a batch with drafts. If it was a trial, the next trial comes later unless drafts pay by then."""
        if self._num_declined > self._patience:
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self._num_declined = 0
