"""Copies the result of an iteration from the device to the host: tokens, log probabilities, vectors of prompts.

A `PendingTokens` is made when the work of an iteration has been queued, and read when the engine needs the tokens. In
between the device computes and the host forms the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nanoflow.batch import SampledTokens, TopLogprobs
from nanoflow.device.transfer import Readback
from nanoflow.executor.sampler import Drawn

Scores = tuple[Tensor, ...]


class PendingTokens:
    """The result of an iteration that may still run.

    Args:
        drawn: Result of the sampler.
        prompt_scores: One entry for each of `DenseBatch.prompt_scores`: the fields of `TopLogprobs`, in slices.
        pooled: As `SampledTokens.pooled`.
    """

    def __init__(self, drawn: Drawn, prompt_scores: Sequence[Sequence[Scores]], pooled: Sequence[Tensor] = ()) -> None:
        self._logprob_places, self._errors = drawn.logprob_places, drawn.errors
        self._slices_of_prompt = [len(slices) for slices in prompt_scores]
        scores = [tensor for slices in prompt_scores for fields in slices for tensor in fields]
        self._readback = Readback([drawn.token_ids.int(), drawn.best, *drawn.logprobs, *scores, *pooled])

    def read(self) -> SampledTokens:
        """Wait for the iteration and return its tokens."""
        arrays = iter(self._readback.wait())
        token_ids, best = next(arrays), next(arrays)
        top = _top(arrays) if self._logprob_places else None
        prompt_logprobs = tuple(
            TopLogprobs.concatenate([_top(arrays) for _ in range(count)]) for count in self._slices_of_prompt
        )
        return SampledTokens(
            token_ids=token_ids,
            logprob_places=self._logprob_places,
            logprobs=top,
            prompt_logprobs=prompt_logprobs,
            pooled=tuple(arrays),
            errors={int(i): _why(best[i]) for i in np.flatnonzero(~np.isfinite(best))} | self._errors,
        )


def _why(best: np.float32) -> str:
    """Message for a row whose largest logit is not finite."""
    return "there is no token that may be chosen" if np.isneginf(best) else "the model gave no finite logits"


def _top(arrays: Any) -> TopLogprobs:
    return TopLogprobs(token_ids=next(arrays), logprobs=next(arrays), ranks=next(arrays))
