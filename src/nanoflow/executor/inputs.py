"""From a `DenseBatch` (numpy, from the scheduler) to the index tensors that kernels take (torch, on the device)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import DenseBatch
from nanoflow.device.transfer import to_device
from nanoflow.graph.graph import RopeSpec
from nanoflow.kernels.launch import BatchInputs, PrefillInputs


class InputBuilder:
    """Makes index tensors; keeps the rotary frequencies and the last sampled token of every row on the device."""

    def __init__(self, rope: RopeSpec, *, num_rows: int, device: torch.device) -> None:
        self._device = device
        self._inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)
        self._attention_factor = rope.attention_factor
        self._last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def build(self, batch: DenseBatch) -> BatchInputs:
        """Index tensors of a batch. Tokens that are fed back never pass through the host."""
        angles = self._to_device(batch.positions).float()[:, None] * self._inv_freq
        return BatchInputs(
            num_tokens=batch.num_tokens,
            num_decodes=batch.num_decodes,
            token_ids=self._token_ids(batch),
            cos=angles.cos() * self._attention_factor,
            sin=angles.sin() * self._attention_factor,
            slots=self._to_device(batch.slots),
            page_tables=self._to_device(batch.page_tables).long(),
            query_start=batch.query_start.tolist(),
            context_len=batch.context_len.tolist(),
            decode_context_len=self._to_device(batch.context_len[: batch.num_decodes]).long(),
            prefills=PrefillInputs(
                first_request=batch.num_decodes,
                query_start=self._to_device(batch.query_start[batch.num_decodes :]),
                context_len=self._to_device(batch.context_len[batch.num_decodes :]),
            ),
            logit_tokens=self._to_device(batch.query_start[batch.sampled + 1]).long() - 1,
        )

    def feed_back(self, rows: NDArray[np.int32], token_ids: Tensor) -> None:
        """Remember the tokens (int64 [S]) just sampled for these rows (int32 [S])."""
        self._last_token[self._to_device(rows).long()] = token_ids

    def _token_ids(self, batch: DenseBatch) -> Tensor:
        token_ids = self._to_device(batch.token_ids).long()
        fed_back = np.flatnonzero(batch.is_fed_back)
        if len(fed_back):
            row_of_token = np.repeat(batch.rows, np.diff(batch.query_start))
            token_ids[self._to_device(fed_back)] = self._last_token[self._to_device(row_of_token[fed_back]).long()]
        return token_ids

    def _to_device(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(array, self._device)
