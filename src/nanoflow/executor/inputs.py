"""From a `DenseBatch` (numpy, from the scheduler) to the index tensors that kernels take (torch, on the device).

In two steps, since a CUDA graph can hold only the second: `load` lays out and copies what the host knows, `derive`
computes the rest on the device, where the tokens sampled last are. What reads these tensors is in `kernels/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import DenseBatch, Int32
from nanoflow.device.transfer import Uploader, to_device
from nanoflow.graph.graph import RopeSpec
from nanoflow.kernels.launch import BatchInputs, DecodeInputs, HostLengths, PrefillInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """Room for a batch; what it does not fill is padding.

    Attributes:
        num_tokens: T.
        num_decodes: D, tokens from the first on that may be decodes.
        num_prefills: R, requests with more than one token.
    """

    num_tokens: int
    num_decodes: int
    num_prefills: int

    @staticmethod
    def of(batch: DenseBatch) -> BatchSize:
        """Exactly as large as a batch."""
        return BatchSize(
            num_tokens=batch.num_tokens,
            num_decodes=batch.num_decodes,
            num_prefills=batch.num_requests - batch.num_decodes,
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the parts of `LoadedBatch.numbers`: five of T, then D, R + 1 and R."""
        return *((self.num_tokens,) * 5), self.num_decodes, self.num_prefills + 1, self.num_prefills


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBatch:
    """What the host knows of a batch, on the device.

    Attributes:
        size: How large it is with its padding.
        numbers: int32, one after the other: token ids, rows to feed back from, whether to do so, positions and slots
            of T tokens; contexts of D decodes; starts of R prefills and the end; their contexts.
        decode_tables, prefill_tables: int32 [D, P] and [R, P]; a padding request may have no row.
        logit_tokens: int32 [S].
        first_prefill_token: No token before it is of a prefill.
        host: Lengths for kernels that loop on the host; None if the batch is for a CUDA graph.
    """

    size: BatchSize
    numbers: Tensor
    decode_tables: Tensor
    prefill_tables: Tensor
    logit_tokens: Tensor
    first_prefill_token: int
    host: HostLengths | None


class InputBuilder:
    """Makes index tensors; keeps the rotary frequencies and the last sampled token of every row on the device."""

    def __init__(self, rope: RopeSpec, *, num_rows: int, device: torch.device) -> None:
        self._device = device
        self._uploader = Uploader(device)
        self._inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)
        self._attention_factor = rope.attention_factor
        self._last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def build(self, batch: DenseBatch) -> BatchInputs:
        """Index tensors of a batch, without padding."""
        return self.derive(self.load(batch, BatchSize.of(batch)))

    def load(self, batch: DenseBatch, size: BatchSize) -> LoadedBatch:
        """Lay a batch out at a size that has room for it, and copy it while the device still works on the one before.

        Page tables come without padding.
        """
        numbers, tables = _numbers(batch, size), np.ascontiguousarray(batch.page_tables)
        logit_tokens = batch.query_start[batch.sampled + 1] - 1
        parts = self._uploader.upload(np.concatenate((numbers, logit_tokens, tables.reshape(-1)), dtype=np.int32))
        uploaded, logits, pages = torch.split(parts, [len(numbers), len(logit_tokens), tables.size])
        pages = pages.view(tables.shape)
        query_start, context_len = batch.query_start.tolist(), batch.context_len.tolist()
        return LoadedBatch(
            size=size,
            numbers=uploaded,
            decode_tables=pages[: batch.num_decodes],
            prefill_tables=pages[batch.num_decodes :],
            logit_tokens=logits,
            first_prefill_token=batch.num_decodes,
            host=HostLengths(
                decode_context_len=context_len[: batch.num_decodes],
                prefill_query_start=query_start[batch.num_decodes :],
                prefill_context_len=context_len[batch.num_decodes :],
            ),
        )

    def derive(self, loaded: LoadedBatch) -> BatchInputs:
        """The rest, on the device alone. Tokens that are fed back never pass through the host."""
        parts = torch.split(loaded.numbers, list(loaded.size.lengths))
        token_ids, rows, is_fed_back, positions, slots, decode_contexts, query_start, prefill_contexts = parts
        fed_back = self._last_token.index_select(0, rows)
        angles = positions.float()[:, None] * self._inv_freq
        return BatchInputs(
            token_ids=torch.where(is_fed_back.bool(), fed_back, token_ids.long()),
            cos=angles.cos() * self._attention_factor,
            sin=angles.sin() * self._attention_factor,
            slots=slots,
            decodes=DecodeInputs(page_tables=loaded.decode_tables, context_len=decode_contexts),
            prefills=PrefillInputs(
                page_tables=loaded.prefill_tables, query_start=query_start, context_len=prefill_contexts
            ),
            first_prefill_token=loaded.first_prefill_token,
            logit_tokens=loaded.logit_tokens,
            host=loaded.host,
        )

    def feed_back(self, rows: Int32, token_ids: Tensor) -> None:
        """Remember the tokens (int64 [S]) just sampled for these rows (int32 [S])."""
        self._last_token[to_device(rows, self._device).long()] = token_ids


def _numbers(batch: DenseBatch, size: BatchSize) -> NDArray[np.int32]:
    """The numbers of a batch in the layout of `LoadedBatch`, padding filled in."""
    row_of_token = np.repeat(batch.rows, np.diff(batch.query_start))
    parts: tuple[tuple[NDArray[Any], int], ...] = (
        (batch.token_ids, 0),
        (np.where(batch.is_fed_back, row_of_token, 0), 0),
        (batch.is_fed_back, 0),
        (batch.positions, 0),
        # No place in the cache: nothing is appended.
        (batch.slots, -1),
        (batch.context_len[: batch.num_decodes], 0),
        (batch.query_start[batch.num_decodes :], batch.num_tokens),
        (batch.context_len[batch.num_decodes :], 0),
    )
    numbers = np.empty(sum(size.lengths), np.int32)
    start = 0
    for (values, padding), length in zip(parts, size.lengths, strict=True):
        numbers[start : start + len(values)] = values
        numbers[start + len(values) : start + length] = padding
        start += length
    return numbers
