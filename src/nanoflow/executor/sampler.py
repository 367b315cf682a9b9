"""The sampler: from logits to tokens, with each request's own parameters.

A draw is one upload, of the numbers of the rows that are drawn, and one launch, whatever the rows ask for; log
probabilities are another launch, for the rows that asked. Nothing here waits for the device: which rows need what is
known on the host, and tokens are read back by `readback.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import DenseBatch, Joined
from nanoflow.device.transfer import to_device
from nanoflow.executor.sampling_state import SamplingState, table_bytes
from nanoflow.kernels.dispatch import sample_kernels_for


def sampling_bytes(num_rows: int, vocab_size: int, device: torch.device, num_logits: int | None = None) -> int:
    """Device memory that sampling takes at most: the tables of its rows, and the work space of its kernels.

    Args:
        num_rows, vocab_size: Of the state table and of the model.
        device: Where it is.
        num_logits: Most draws at once; one a row if not given.
    """
    workspace = sample_kernels_for(device).workspace_bytes(num_logits or num_rows, vocab_size)
    return table_bytes(num_rows, vocab_size) + workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Tokens drawn, all on the device.

    Attributes:
        token_ids: int64 [S].
        best: float32 [S], the largest logit of each row; not finite if the model's output is not.
        logprob_places: Places in S with log probabilities, with how many of the most probable tokens each wants.
        logprobs: Token ids, log probabilities and ranks at these places, as `kernels.sample.top_logprobs` gives them.
        errors: Places in S whose request failed before the draw, with why: its token means nothing.
    """

    token_ids: Tensor
    best: Tensor
    logprob_places: list[tuple[int, int]]
    logprobs: tuple[Tensor, ...]
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Holds the sampling state of every row and draws tokens."""

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._kernels = sample_kernels_for(device)
        self._state = SamplingState(num_rows=num_rows, vocab_size=vocab_size, device=device)
        self._wants_logprobs = np.zeros(num_rows, np.bool_)
        self._num_logprobs = np.zeros(num_rows, np.int64)
        # What went wrong when requests joined, by row; until the row has another tenant.
        self._errors: dict[int, str] = {}

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile what draws from logits of a type run, before a request waits for it; no row is changed."""
        logits = torch.zeros(1, self._vocab_size, dtype=dtype, device=self._device)
        numbers = _uploaded(self._state.numbers(np.zeros(1, np.int32), np.zeros(1, np.int32)), self._device)
        token_ids, _ = self._kernels.largest(logits)
        for adjusts in (False, True):
            self._kernels.choose(logits, numbers, self._state.tables, adjusts=adjusts)
        self.score(logits, token_ids, 1)

    def join(self, joined: Sequence[Joined]) -> None:
        """Give rows to requests."""
        for request in joined:
            self._errors.pop(request.row, None)
        self._errors |= self._state.join(joined)
        for request in joined:
            self._wants_logprobs[request.row] = request.params.logprobs is not None
            self._num_logprobs[request.row] = request.params.logprobs or 0

    def sample(self, batch: DenseBatch, logits: Tensor) -> Drawn:
        """Draw a token for each entry of `batch.sampled` from its logits [S, V] in the model's type.

        Requests that draw several have neither penalties nor bad words: these are noted once a row and launch.
        """
        rows = batch.rows[batch.sampled]
        self._state.restrict(rows)
        token_ids, best = self._choose(logits, self._state.numbers(rows, batch.drawn_positions))
        self._state.note(rows, token_ids)
        places = np.flatnonzero(self._wants_logprobs[rows])
        num_top = self._num_logprobs[rows[places]]
        logprobs: tuple[Tensor, ...] = ()
        if len(places):
            at = to_device(places, self._device)
            logprobs = self._kernels.top_logprobs(logits, at, token_ids[at], int(num_top.max()))
        return Drawn(
            token_ids=token_ids,
            best=best,
            logprob_places=list(zip(places.tolist(), num_top.tolist(), strict=True)),
            logprobs=logprobs,
            errors={place: self._errors[row] for place, row in enumerate(rows.tolist()) if row in self._errors}
            if self._errors
            else {},
        )

    def score(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
        """Log probabilities of given tokens (int64 [N]) and the most probable ones, by their logits [N, V]."""
        places = torch.arange(len(logits), device=self._device)
        return self._kernels.top_logprobs(logits, places, token_ids, num_top)

    def _choose(self, logits: Tensor, numbers: NDArray[np.void]) -> tuple[Tensor, Tensor]:
        """Chosen token and largest adjusted logit of each row, [S] both."""
        adjusts = _adjusts(numbers)
        if not adjusts and not numbers["scale"].any():
            return self._kernels.largest(logits)
        uploaded = _uploaded(numbers, self._device)
        return self._kernels.choose(logits, uploaded, self._state.tables, adjusts=adjusts)


def _uploaded(numbers: NDArray[np.void], device: torch.device) -> Tensor:
    """`NUMBERS` [S], at least one, as int32 [S, 16] on the device."""
    return to_device(numbers.view(np.int32).reshape(len(numbers), -1), device)


def _adjusts(numbers: NDArray[np.void]) -> bool:
    """Whether any row looks at logits other than the model gives them."""
    if numbers["has_penalties"].any() or numbers["is_restricted"].any() or numbers["num_biases"].any():
        return True
    return bool(((numbers["num_edits"] > 0) & (numbers["position"] < numbers["first_free_stop"])).any())
