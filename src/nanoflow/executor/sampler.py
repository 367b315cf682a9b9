"""The sampler: from logits to tokens, with each request's own parameters.

Parameters of a request lie in arrays, one place a row, written when it joins. What is rare (penalties, biases, minimum
length, log probabilities) costs only the rows that asked for it. Nothing here waits for the device: which rows need
what is known on the host, and tokens are read back by `readback.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import DenseBatch, Joined
from nanoflow.device.transfer import to_device
from nanoflow.kernels import sample

Rows = NDArray[np.int32]
# Logits worked on at once by what needs copies of them in higher precision: half a gigabyte in all.
_MAX_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenCounts:
    """What each row has seen: int32 [rows, V] generated, bool [rows, V] in the prompt."""

    generated: Tensor
    is_in_prompt: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Tokens drawn, all on the device.

    Attributes:
        token_ids: int64 [S].
        best: float32 [S], the largest logit of each row; not finite if the model's output is not.
        logprob_places: Places in S with log probabilities, with how many of the most probable tokens each wants.
        logprobs: Token ids, log probabilities and ranks at these places, as `kernels.sample.top_logprobs` gives them.
    """

    token_ids: Tensor
    best: Tensor
    logprob_places: list[tuple[int, int]]
    logprobs: tuple[Tensor, ...]


class Sampler:
    """Holds the sampling state of every row and draws tokens."""

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._num_rows, self._vocab_size, self._device = num_rows, vocab_size, device
        self._seed = np.zeros(num_rows, np.uint64)
        self._temperature = np.zeros(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int64)
        self._top_p = np.ones(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._penalties = np.zeros((num_rows, 3), np.float32)
        self._has_penalties = np.zeros(num_rows, np.bool_)
        self._first_free_stop = np.zeros(num_rows, np.int64)
        self._wants_logprobs = np.zeros(num_rows, np.bool_)
        self._num_logprobs = np.zeros(num_rows, np.int64)
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}
        self._stop_ids: dict[int, Tensor] = {}
        self._counts: _TokenCounts | None = None

    def join(self, joined: Joined) -> None:
        """Give a row to a request."""
        row, params = joined.row, joined.params
        self._seed[row] = joined.seed % 2**64
        self._temperature[row] = 0.0 if params.is_greedy else params.temperature
        self._top_k[row], self._top_p[row], self._min_p[row] = params.top_k, params.top_p, params.min_p
        self._penalties[row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self._has_penalties[row] = params.has_penalties
        # Before this position no stop token may be drawn.
        self._first_free_stop[row] = joined.num_prompt_tokens + params.min_tokens
        self._wants_logprobs[row] = params.logprobs is not None
        self._num_logprobs[row] = params.logprobs or 0
        self._stop_ids[row] = torch.tensor(joined.stop_token_ids, dtype=torch.int64, device=self._device)
        self._bias.pop(row, None)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=self._device)
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=self._device)
            self._bias[row] = ids, values
        if params.has_penalties:
            self._count_tokens(joined)

    def sample(self, batch: DenseBatch, logits: Tensor) -> Drawn:
        """Draw a token for each request of `batch.sampled` from its logits [S, V] in the model's type."""
        rows, positions = batch.rows[batch.sampled], batch.context_len[batch.sampled]
        chosen = [self._choose(logits[part], rows[part], positions[part]) for part in self._parts(rows, positions)]
        best, token_ids = (torch.cat(tensors) for tensors in zip(*chosen, strict=True))
        self._count_drawn(rows, token_ids)
        wants_logprobs = np.flatnonzero(self._wants_logprobs[rows])
        num_top = self._num_logprobs[rows[wants_logprobs]]
        return Drawn(
            token_ids=token_ids,
            best=best.float(),
            logprob_places=list(zip(wants_logprobs.tolist(), num_top.tolist(), strict=True)),
            logprobs=self._logprobs(logits, token_ids, wants_logprobs, int(num_top.max(initial=0))),
        )

    def _parts(self, rows: Rows, positions: NDArray[np.int32]) -> list[slice]:
        """Rows to work on at once: all, if each just takes the largest logit; else as many as memory is meant for."""
        is_plain = not self._bias and not self._has_penalties[rows].any() and not self._temperature[rows].any()
        if is_plain and (positions >= self._first_free_stop[rows]).all():
            return [slice(0, len(rows))]
        return _slices(len(rows), self._vocab_size)

    def _choose(self, logits: Tensor, rows: Rows, positions: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Largest logit and chosen token of each row, [S] both."""
        adjusted = self._adjust(logits, rows, positions)
        best, token_ids = adjusted.max(dim=-1)
        is_drawn = self._temperature[rows] > 0
        is_filtered = (self._top_k[rows] > 0) | (self._top_p[rows] < 1) | (self._min_p[rows] > 0)
        # A row takes the path of its own parameters, never of its neighbours': its draw may not depend on them.
        for places, filters in (
            (np.flatnonzero(is_drawn & ~is_filtered), ()),
            (np.flatnonzero(is_drawn & is_filtered), (self._top_k, self._top_p, self._min_p)),
        ):
            if len(places):
                token_ids[self._to_device(places)] = self._draw(adjusted, rows, positions, places, filters)
        return best, token_ids

    def _adjust(self, raw: Tensor, rows: Rows, positions: NDArray[np.int32]) -> Tensor:
        """Logits with biases, minimum lengths and penalties applied, float32; `raw` itself if nobody asked."""
        biased = [i for i, row in enumerate(rows.tolist()) if row in self._bias] if self._bias else []
        held_back = np.flatnonzero(positions < self._first_free_stop[rows]).tolist()
        penalised = np.flatnonzero(self._has_penalties[rows])
        if not biased and not held_back and not len(penalised):
            return raw
        adjusted = raw.to(torch.float32, copy=True)
        for i in biased:
            ids, values = self._bias[int(rows[i])]
            adjusted[i, ids] += values
        if len(penalised):
            adjusted[self._to_device(penalised)] = self._penalise(adjusted, rows, penalised)
        for i in held_back:
            adjusted[i, self._stop_ids[int(rows[i])]] = -torch.inf
        return adjusted

    def _penalise(self, logits: Tensor, rows: Rows, places: NDArray[np.intp]) -> Tensor:
        assert self._counts is not None
        chosen, at = logits[self._to_device(places)], self._to_device(rows[places]).long()
        repetition, presence, frequency = self._to_device(self._penalties[rows[places]]).unbind(-1)
        counts, is_in_prompt = self._counts.generated[at], self._counts.is_in_prompt[at]
        sample.apply_penalties(chosen, counts, is_in_prompt, repetition, presence, frequency)
        return chosen

    def _draw(
        self,
        logits: Tensor,
        rows: Rows,
        positions: NDArray[np.int32],
        places: NDArray[np.intp],
        filters: tuple[NDArray[np.generic], ...],
    ) -> Tensor:
        at = rows[places]
        uniforms = self._to_device(sample.uniform(self._seed[at], positions[places].astype(np.int64)))
        chosen, temperature = logits[self._to_device(places)].float(), self._to_device(self._temperature[at])
        if not filters:
            return sample.draw(chosen, temperature, uniforms)
        top_k, top_p, min_p = (self._to_device(column[at]) for column in filters)
        return sample.draw_filtered(chosen, temperature, top_k, top_p, min_p, uniforms)

    def _logprobs(self, raw: Tensor, token_ids: Tensor, places: NDArray[np.intp], num_top: int) -> tuple[Tensor, ...]:
        if not len(places):
            return ()
        parts = []
        for part in _slices(len(places), self._vocab_size):
            at = self._to_device(places[part])
            parts.append(sample.top_logprobs(raw[at], token_ids[at], num_top))
        return tuple(torch.cat(fields) for fields in zip(*parts, strict=True))

    def _count_tokens(self, joined: Joined) -> None:
        """Count a joining request's tokens; the two tables exist from the first request with penalties on."""
        if self._counts is None:
            shape = (self._num_rows, self._vocab_size)
            self._counts = _TokenCounts(
                generated=torch.zeros(shape, dtype=torch.int32, device=self._device),
                is_in_prompt=torch.zeros(shape, dtype=torch.bool, device=self._device),
            )
        token_ids = self._to_device(joined.token_ids).long()
        prompt, generated = token_ids[: joined.num_prompt_tokens], token_ids[joined.num_prompt_tokens :]
        self._counts.is_in_prompt[joined.row].zero_()[prompt] = True
        self._counts.generated[joined.row] = torch.bincount(generated, minlength=self._vocab_size).int()

    def _count_drawn(self, rows: Rows, token_ids: Tensor) -> None:
        places = np.flatnonzero(self._has_penalties[rows])
        if len(places):
            assert self._counts is not None
            self._counts.generated[self._to_device(rows[places]).long(), token_ids[self._to_device(places)]] += 1

    def _to_device(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(array, self._device)


def _slices(num_rows: int, vocab_size: int) -> list[slice]:
    """Cut rows so that no part has more than `_MAX_ELEMENTS` logits; no rows are one empty part."""
    step = max(1, _MAX_ELEMENTS // vocab_size)
    return [slice(first, first + step) for first in range(0, max(num_rows, 1), step)]
