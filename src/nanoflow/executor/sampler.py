"""The sampler: from logits to tokens, with each request's own parameters.

Parameters of a request lie in arrays, one place a row, written when it joins. What is rare (penalties, biases, minimum
length, log probabilities) costs only the rows that asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import DenseBatch, Joined, SampledTokens, TopLogprobs
from nanoflow.kernels import sample

Rows = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenCounts:
    """What each row has seen: int32 [rows, V] generated, bool [rows, V] in the prompt."""

    generated: Tensor
    is_in_prompt: Tensor


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

    def sample(self, batch: DenseBatch, logits: Tensor) -> tuple[Tensor, SampledTokens]:
        """Draw a token for each request of `batch.sampled`.

        Args:
            batch: The batch.
            logits: [S, V] in the model's type.

        Returns:
            Tokens int64 [S] on the device, and the result for the host.
        """
        rows, positions = batch.rows[batch.sampled], batch.context_len[batch.sampled]
        raw = logits.float()
        adjusted = self._adjust(raw, rows, positions)
        best, token_ids = adjusted.max(dim=-1)
        is_sound = torch.isfinite(best).cpu().numpy()
        drawn = np.flatnonzero((self._temperature[rows] > 0) & is_sound)
        if len(drawn):
            token_ids[self._to_device(drawn)] = self._draw(adjusted, rows, positions, drawn)
        self._count_drawn(rows, token_ids)
        # The host sync of the iteration: its tokens are what the caller waits for.
        host_ids = token_ids.int().cpu().numpy()
        result = SampledTokens(
            token_ids=host_ids,
            logprobs=self._logprobs(raw, rows, token_ids),
            errors={int(i): "the model gave no finite logits" for i in np.flatnonzero(~is_sound)},
        )
        return token_ids, result

    def _adjust(self, raw: Tensor, rows: Rows, positions: NDArray[np.int32]) -> Tensor:
        """Logits with biases, minimum lengths and penalties applied; `raw` itself if nobody asked."""
        biased = [i for i, row in enumerate(rows.tolist()) if row in self._bias] if self._bias else []
        held_back = np.flatnonzero(positions < self._first_free_stop[rows]).tolist()
        penalised = np.flatnonzero(self._has_penalties[rows])
        if not biased and not held_back and not len(penalised):
            return raw
        adjusted = raw.clone()
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

    def _draw(self, logits: Tensor, rows: Rows, positions: NDArray[np.int32], places: NDArray[np.intp]) -> Tensor:
        at = rows[places]
        uniforms = sample.uniform(self._seed[at], positions[places].astype(np.int64))
        return sample.draw(
            logits[self._to_device(places)],
            self._to_device(self._temperature[at]),
            self._to_device(self._top_k[at]),
            self._to_device(self._top_p[at]),
            self._to_device(self._min_p[at]),
            self._to_device(uniforms),
        )

    def _logprobs(self, raw: Tensor, rows: Rows, token_ids: Tensor) -> dict[int, TopLogprobs]:
        places = np.flatnonzero(self._wants_logprobs[rows])
        if not len(places):
            return {}
        num_top = self._num_logprobs[rows[places]]
        at = self._to_device(places)
        top = sample.top_logprobs(raw[at], token_ids[at], int(num_top.max()))
        return {
            int(place): TopLogprobs(
                token_ids=top.token_ids[i : i + 1, : 1 + num_top[i]],
                logprobs=top.logprobs[i : i + 1, : 1 + num_top[i]],
                ranks=top.ranks[i : i + 1],
            )
            for i, place in enumerate(places)
        }

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
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
