"""The sampler: from logits to tokens, with each request's own parameters.

A draw is one upload, of numbers of the drawn rows, and one launch, whatever the rows ask for. Log probabilities are
another launch, for the rows that asked. Nothing here waits for the device: the host knows which rows need what, and
`readback.py` reads the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import DenseBatch, Joined
from nanoflow.device.transfer import to_device
from nanoflow.executor.constraints import Constraints
from nanoflow.executor.sampling_state import SamplingState, table_bytes
from nanoflow.grammars.compiled import Grammars
from nanoflow.kernels.dispatch import sample_kernels_for
from nanoflow.kernels.sample import SampleTables


def sampling_bytes(num_rows: int, vocab_size: int, device: torch.device, num_logits: int | None = None) -> int:
    """Upper bound of the device memory of sampling: tables of its rows and workspace of its kernels, in bytes.

    Args:
        num_rows, vocab_size: Rows of the state table; tokens of the model's vocabulary.
        device: Device of the tables.
        num_logits: Maximum number of draws at once; `num_rows` if not given.
    """
    workspace = sample_kernels_for(device).workspace_bytes(num_logits or num_rows, vocab_size)
    return table_bytes(num_rows, vocab_size) + workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Tokens drawn, all on the device.

    Attributes:
        token_ids: int64 [S].
        best: float32 [S], the largest logit of each row; not finite if the model's output is not.
        logprob_places: Indices in S with log probabilities, each with its number of most probable tokens.
        logprobs: Token ids, log probabilities and ranks at these indices, as from `kernels.sample.top_logprobs`.
        errors: Message by index in S, for requests that failed before the draw; their tokens are meaningless.
    """

    token_ids: Tensor
    best: Tensor
    logprob_places: list[tuple[int, int]]
    logprobs: tuple[Tensor, ...]
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Sampling state of every row; draws tokens.

    Args:
        num_rows, vocab_size: Rows of the state table; tokens of the model's vocabulary.
        device: Of the logits.
        grammars: Compiles grammars of requests; None if no request has one.
    """

    def __init__(
        self, *, num_rows: int, vocab_size: int, device: torch.device, grammars: Grammars | None = None
    ) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._kernels = sample_kernels_for(device)
        self._state = SamplingState(num_rows=num_rows, vocab_size=vocab_size, device=device)
        self._constraints = Constraints(num_rows=num_rows, vocab_size=vocab_size, device=device, grammars=grammars)
        self._wants_logprobs = np.zeros(num_rows, np.bool_)
        self._num_logprobs = np.zeros(num_rows, np.int64)
        # Message by row for requests that failed when they joined, until the row is assigned again.
        self._errors: dict[int, str] = {}

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile the kernels for logits of a type before a request waits for them; no row changes."""
        logits = torch.zeros(1, self._vocab_size, dtype=dtype, device=self._device)
        numbers = _uploaded(self._state.numbers(np.zeros(1, np.int32), np.zeros(1, np.int32)), self._device)
        token_ids, _ = self._kernels.largest(logits)
        for adjusts in (False, True):
            self._kernels.choose(logits, numbers, self._state.tables, adjusts=adjusts)
        self.score(logits, token_ids, 1)

    def join(self, joined: Sequence[Joined]) -> None:
        """Assign rows to requests."""
        for request in joined:
            self._errors.pop(request.row, None)
        self._errors |= self._state.join(joined) | self._constraints.join(joined)
        for request in joined:
            self._wants_logprobs[request.row] = request.params.logprobs is not None
            self._num_logprobs[request.row] = request.params.logprobs or 0

    def sample(self, batch: DenseBatch, logits: Tensor) -> Drawn:
        """Draw a token for each entry of `batch.sampled` from its logits [S, V], which have the model's type.

        Requests with several draws have neither penalties nor bad words, since these record one token a row and launch.
        """
        rows = batch.rows[batch.sampled]
        self._state.restrict(rows)
        followed_by = batch.followed_by
        numbers, masks = self._state.numbers(rows, batch.drawn_positions), self._constraints.masks(rows, followed_by)
        numbers["mask"] = masks.numbers
        # A grammar that can only end goes before `min_tokens`.
        numbers["first_free_stop"][masks.must_end] = 0
        token_ids, best = self._choose(logits, numbers, replace(self._state.tables, masks=masks.words))
        self._state.note(rows, token_ids)
        self._constraints.note(token_ids)
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
            errors=masks.errors
            | {
                place: self._errors[row]
                for place, row in enumerate(rows.tolist() if self._errors else ())
                if row in self._errors
            },
        )

    def score(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
        """Log probabilities of given tokens (int64 [N]) and of the most probable ones, from their logits [N, V]."""
        places = torch.arange(len(logits), device=self._device)
        return self._kernels.top_logprobs(logits, places, token_ids, num_top)

    def _choose(self, logits: Tensor, numbers: NDArray[np.void], tables: SampleTables) -> tuple[Tensor, Tensor]:
        """Chosen token and largest adjusted logit of each row, both [S]."""
        adjusts = _adjusts(numbers)
        if not adjusts and not numbers["scale"].any():
            return self._kernels.largest(logits)
        uploaded = _uploaded(numbers, self._device)
        return self._kernels.choose(logits, uploaded, tables, adjusts=adjusts)


def _uploaded(numbers: NDArray[np.void], device: torch.device) -> Tensor:
    """`NUMBERS` [S], at least one, as int32 [S, 18] on the device."""
    return to_device(numbers.view(np.int32).reshape(len(numbers), -1), device)


def _adjusts(numbers: NDArray[np.void]) -> bool:
    """Whether any row changes its logits before the draw."""
    if any(numbers[name].any() for name in ("has_penalties", "is_restricted", "num_biases", "mask")):
        return True
    return bool(((numbers["num_edits"] > 0) & (numbers["position"] < numbers["first_free_stop"])).any())
