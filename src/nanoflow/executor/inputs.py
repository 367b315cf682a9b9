"""From a `DenseBatch` (numpy, from the scheduler) to the index tensors of kernels (torch, on the device).

There are two steps, since a CUDA graph can contain only the second. `load` lays out and copies what the host knows;
`derive` computes the rest on the device, where the latest sampled tokens are. `kernels/` reads these tensors.

The page tables of all rows stay on the device. A batch brings the pages that its rows have got, a few for a thousand
decodes, and the tables of its requests are gathered there: what travels does not grow with the length of contexts.
A model with several KV groups has a table for each row in each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import DenseBatch, Int32
from nanoflow.device.transfer import Uploader, to_device
from nanoflow.executor.layout import Layout, lay_out
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.operation import KEY_BLOCK
from nanoflow.kernels.launch import BatchInputs, DecodeInputs, HostLengths, PageInputs, PrefillInputs, Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """Size of a batch with its padding.

    Attributes:
        num_tokens: T.
        num_decodes: D, places from the first on that may be decodes.
        num_prefills: R, parts of prompts and gaps between them.
    """

    num_tokens: int
    num_decodes: int
    num_prefills: int

    @staticmethod
    def of(layout: Layout) -> BatchSize:
        """The exact size of a batch, without padding."""
        return BatchSize(
            num_tokens=len(layout.places),
            num_decodes=layout.num_decodes,
            num_prefills=len(layout.chunk_requests),
        )

    def lengths(self, num_groups: int) -> tuple[int, ...]:
        """Lengths of the parts of `LoadedBatch.numbers`: five of T, then D, R + 1 and R, then T a further KV group."""
        of_requests = (self.num_decodes, self.num_prefills + 1, self.num_prefills)
        return *((self.num_tokens,) * 5), *of_requests, *((self.num_tokens,) * (num_groups - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTables:
    """Page tables of G KV groups: int32 [G, D, P] of decodes and [G, R, P] of parts of prompts."""

    decodes: Tensor
    prefills: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBatch:
    """A batch as the host knows it, copied to the device.

    Attributes:
        size: How large it is with its padding.
        numbers: int32, one after the other: token ids, rows to feed back from, whether to do so, positions and slots
            of T tokens; contexts of D decodes; starts of R parts of prompts and the end; their contexts; slots in
            further KV groups.
        tables: Page tables of the requests; a padding request may have no row.
        logit_tokens: int32 [S].
        first_prefill_token: All tokens before it are decodes.
        host: Lengths for kernels that loop on the host; None if the batch is for a CUDA graph.
    """

    size: BatchSize
    numbers: Tensor
    tables: RequestTables
    logit_tokens: Tensor
    first_prefill_token: int
    host: HostLengths | None


class InputBuilder:
    """Makes index tensors; keeps rotary frequencies, and each row's page table and last token, on the device.

    Args:
        ropes: Of the model.
        num_rows: Rows of the state table.
        device: Where.
        pages_per_row: Width of the page tables to begin with; they are made wider, at the cost of a copy, when a batch
            needs it.
        num_groups: KV groups of the model.
    """

    def __init__(
        self,
        ropes: Sequence[RopeSpec],
        *,
        num_rows: int,
        device: torch.device,
        pages_per_row: int = 0,
        num_groups: int = 1,
    ) -> None:
        self.num_groups = num_groups
        self._num_rows = num_rows
        self._device = device
        self._uploader = Uploader(device)
        # Angular frequencies of each rotary embedding, and the factor on its cos and sin.
        self._ropes = [
            (torch.tensor(rope.inv_freq, dtype=torch.float32, device=device), rope.attention_factor) for rope in ropes
        ]
        self._last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._page_tables = torch.zeros((num_groups * num_rows, pages_per_row), dtype=torch.int32, device=device)

    def build(self, batch: DenseBatch, layout: Layout | None = None) -> BatchInputs:
        """Index tensors of a batch, without padding; as the batch comes without a layout."""
        layout = layout or lay_out(batch)
        host = HostLengths(
            decode_context_len=_decode_contexts(batch, layout).tolist(),
            prefill_query_start=layout.chunk_start.tolist(),
            prefill_context_len=layout.chunk_context.tolist(),
        )
        return self.derive(replace(self.load(batch, layout, BatchSize.of(layout)), host=host))

    def load(
        self, batch: DenseBatch, layout: Layout, size: BatchSize, places: RequestTables | None = None
    ) -> LoadedBatch:
        """Copy a batch to a size that has room for it, while the device still works on the one before.

        Batches are loaded in the order in which they were formed: the pages that one brings are kept for the next.

        Args:
            batch, layout, size: What, in which order, with how much padding.
            places: Where its page tables go: to the first rows and columns of these, larger ones. By default they are
                new tensors without padding.
        """
        numbers, new = _numbers(batch, layout, size), batch.new_pages
        logit_tokens = layout.places[batch.logit_tokens]
        # Places without a request get the table of an arbitrary one.
        table_rows = np.zeros(layout.num_decodes + len(layout.chunk_requests), np.int32)
        table_rows[layout.decode_places] = batch.rows[: batch.num_decodes]
        table_rows[layout.num_decodes :] = batch.rows[np.maximum(layout.chunk_requests, 0)]
        group_rows = [table_rows + np.int32(group * self._num_rows) for group in range(self.num_groups)]
        self._widen(batch.table_width)
        entries = new.rows * np.int64(self._page_tables.shape[1]) + new.columns
        parts = (numbers, logit_tokens, entries, new.pages, *group_rows)
        uploaded = self._uploader.upload(np.concatenate(parts, dtype=np.int32, casting="same_kind"))
        on_device, logits, places_of_pages, pages, *rows = torch.split(uploaded, [len(part) for part in parts])
        if len(new):
            self._page_tables.view(-1)[places_of_pages] = pages
        return LoadedBatch(
            size=size,
            numbers=on_device,
            tables=self._gather(rows, layout.num_decodes, batch.table_width, places),
            logit_tokens=logits,
            first_prefill_token=layout.first_prefill,
            host=None,
        )

    def derive(self, loaded: LoadedBatch) -> BatchInputs:
        """The rest, on the device alone. Tokens that are fed back never pass through the host."""
        parts = torch.split(loaded.numbers, list(loaded.size.lengths(self.num_groups)))
        token_ids, rows, is_fed_back, positions, slots, decode_contexts, query_start, prefill_contexts, *more = parts
        fed_back = self._last_token.index_select(0, rows)
        places = positions.float()[:, None]
        return BatchInputs(
            token_ids=torch.where(is_fed_back.bool(), fed_back, token_ids.long()),
            rotations=tuple(_rotation(places * inv_freq, factor) for inv_freq, factor in self._ropes),
            pages=tuple(
                PageInputs(slots=of_group, decode_tables=decodes, prefill_tables=prefills)
                for of_group, decodes, prefills in zip(
                    (slots, *more), loaded.tables.decodes, loaded.tables.prefills, strict=True
                )
            ),
            decodes=DecodeInputs(context_len=decode_contexts, key_blocks=_before(-(-decode_contexts // KEY_BLOCK))),
            prefills=PrefillInputs(query_start=query_start, context_len=prefill_contexts),
            first_prefill_token=loaded.first_prefill_token,
            logit_tokens=loaded.logit_tokens,
            host=loaded.host,
        )

    def _widen(self, width: int) -> None:
        missing = width - self._page_tables.shape[1]
        if missing > 0:
            self._page_tables = F.pad(self._page_tables, (0, max(missing, self._page_tables.shape[1])))

    def _gather(
        self, rows: Sequence[Tensor], num_decodes: int, width: int, places: RequestTables | None
    ) -> RequestTables:
        """The first `width` columns of these tables: of each group int32 [D + R], those of decodes first."""
        table, num_prefills = self._page_tables[:, :width], len(rows[0]) - num_decodes
        if places is None:
            shapes = ((self.num_groups, count, width) for count in (num_decodes, num_prefills))
            decodes, prefills = (table.new_empty(shape) for shape in shapes)
        else:
            decodes, prefills = places.decodes[:, :num_decodes, :width], places.prefills[:, :num_prefills, :width]
        for of_group, to_decodes, to_prefills in zip(rows, decodes, prefills, strict=True):
            torch.index_select(table, 0, of_group[:num_decodes], out=to_decodes)
            torch.index_select(table, 0, of_group[num_decodes:], out=to_prefills)
        return RequestTables(decodes=decodes, prefills=prefills)

    def feed_back(self, rows: Int32, token_ids: Tensor) -> None:
        """Store the tokens (int64 [S]) just sampled for these rows (int32 [S]).

        For a row with several draws any of them is stored: the host knows its tokens before it forms the next batch.
        """
        self._last_token[to_device(rows, self._device).long()] = token_ids


def _rotation(angles: Tensor, factor: float) -> Rotation:
    return Rotation(cos=angles.cos() * factor, sin=angles.sin() * factor)


def padding(size: BatchSize, num_groups: int = 1) -> NDArray[np.int32]:
    """`LoadedBatch.numbers` of a batch of no request: nothing is appended to the cache and nothing attends."""
    parts = [np.zeros(length, np.int32) for length in size.lengths(num_groups)]
    parts[6][:] = size.num_tokens
    for slots in (parts[4], *parts[8:]):
        slots[:] = -1
    return np.concatenate(parts)


def _numbers(batch: DenseBatch, layout: Layout, size: BatchSize) -> NDArray[np.int32]:
    """The numbers of a batch in the order of `LoadedBatch`, with padding."""
    row_of_token = np.repeat(batch.rows, np.diff(batch.query_start))
    # No place in the cache, for padding: nothing is appended.
    slots, *more_slots = ((of_group, -1) for of_group in batch.slots.reshape(-1, batch.num_tokens))
    of_tokens: tuple[tuple[NDArray[Any], int], ...] = (
        (batch.token_ids, 0),
        (np.where(batch.is_fed_back, row_of_token, 0), 0),
        (batch.is_fed_back, 0),
        (batch.positions, 0),
        slots,
    )
    of_requests: tuple[tuple[NDArray[Any], int], ...] = (
        (_decode_contexts(batch, layout), 0),
        (layout.chunk_start, batch.num_tokens),
        (layout.chunk_context, 0),
    )
    lengths = size.lengths(1 + len(more_slots))
    numbers = np.empty(sum(lengths), np.int32)
    parts = np.split(numbers, np.cumsum(lengths)[:-1])
    for part, (values, padding) in zip((*parts[:5], *parts[8:]), (*of_tokens, *more_slots), strict=True):
        part[layout.places] = values
        part[len(values) :] = padding
    for part, (values, padding) in zip(parts[5:8], of_requests, strict=True):
        part[: len(values)] = values
        part[len(values) :] = padding
    return numbers


def _decode_contexts(batch: DenseBatch, layout: Layout) -> NDArray[np.int32]:
    """Tokens in the cache of the decode at each place; 0 where there is none."""
    contexts = np.zeros(layout.num_decodes, np.int32)
    contexts[layout.decode_places] = batch.context_len[: batch.num_decodes]
    return contexts


def _before(counts: Tensor) -> Tensor:
    """Sum of all entries before each entry, and of all: int32 [n + 1] from int32 [n]."""
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
