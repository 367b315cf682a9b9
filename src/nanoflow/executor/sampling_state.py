"""What sampling remembers of each row: numbers on the host, which travel with each draw, and tables on the device.

Everything is allocated at the start, so that a first request with penalties finds its memory. What joining requests
bring to the tables travels in one asynchronous copy an iteration; nothing here waits for the device.
Legend: R rows of the state table, V vocabulary, E entries of a row's list of edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import Int32, Joined
from nanoflow.device.transfer import to_device
from nanoflow.kernels.sample import IN_PROMPT, MAX_COUNT, NUMBERS, SampleTables, scale_of

# Biases and stop tokens that a row has room for; a request with more makes the tables larger.
_NUM_EDITS = 512


def table_bytes(num_rows: int, vocab_size: int) -> int:
    """Bytes of the tables on the device: 2 for each row and token of the vocabulary, and 8 for each edit."""
    return num_rows * (2 * vocab_size + 8 * _NUM_EDITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edits:
    """Biases and stop tokens of one row: token ids in order, and what to add (-infinity for a stop token)."""

    row: int
    ids: Int32
    values: NDArray[np.float32]


class SamplingState:
    """Numbers and tables of every row.

    Args:
        num_rows: R.
        vocab_size: V.
        device: Where the tables are.
    """

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._numbers = np.zeros(num_rows, NUMBERS)
        self._numbers["row"] = np.arange(num_rows)
        self._numbers["top_p"] = 1.0
        self._numbers["log_min_p"] = -np.inf
        self._tables = SampleTables(
            seen=_zeros((num_rows, vocab_size), np.int16, device),
            edit_ids=_zeros((num_rows, _NUM_EDITS), np.int32, device),
            edit_values=_zeros((num_rows, _NUM_EDITS), np.float32, device),
        )

    @property
    def tables(self) -> SampleTables:
        """The tables as they are now: a join may replace them."""
        return self._tables

    def numbers(self, rows: Int32, positions: Int32) -> NDArray[np.void]:
        """`NUMBERS` [S] of rows [S] that choose the tokens of these positions [S]."""
        numbers = self._numbers[rows]
        numbers["position"] = positions
        return numbers

    def join(self, joined: Sequence[Joined]) -> None:
        """Give rows to requests."""
        edits = [self._join(request) for request in joined]
        edits = [edit for edit in edits if len(edit.ids)]
        penalised = [request for request in joined if request.params.has_penalties]
        if not edits and not penalised:
            return
        parts = [*self._edit_parts(edits), *_seen_parts(penalised, self._vocab_size)]
        uploaded = to_device(np.concatenate(parts, dtype=np.int32), self._device)
        at, ids, values, rows, *seen = torch.split(uploaded, [len(part) for part in parts])
        if edits:
            self._tables.edit_ids.view(-1).index_copy_(0, at.long(), ids)
            self._tables.edit_values.view(-1).index_copy_(0, at.long(), values.view(torch.float32))
        if penalised:
            self._count_seen(rows, *seen)

    def _join(self, joined: Joined) -> _Edits:
        """Write a request's numbers, and give its edits."""
        params, numbers = joined.params, self._numbers[joined.row]
        numbers["seed"] = joined.seed % 2**64
        numbers["scale"] = 0.0 if params.is_greedy else scale_of(params.temperature)
        numbers["top_k"] = params.top_k if params.top_k < self._vocab_size else 0
        numbers["top_p"] = _least_positive(params.top_p)
        numbers["log_min_p"] = np.log2(params.min_p) if params.min_p else -np.inf
        numbers["repetition"] = params.repetition_penalty
        numbers["presence"], numbers["frequency"] = params.presence_penalty, params.frequency_penalty
        numbers["has_penalties"] = params.has_penalties
        numbers["first_free_stop"] = min(joined.num_prompt_tokens + params.min_tokens, 2**31 - 1)
        bias = {token_id: value for token_id, value in (params.logit_bias or {}).items() if self._is_token(token_id)}
        # Without a least number of tokens no stop token is ever held back.
        stops = (
            [token_id for token_id in joined.stop_token_ids if self._is_token(token_id)] if params.min_tokens else []
        )
        numbers["num_biases"], numbers["num_edits"] = len(bias), len(bias) + len(stops)
        ids = np.array([*bias, *stops], np.int32)
        values = np.array([*bias.values(), *(-np.inf for _ in stops)], np.float32)
        order = np.argsort(ids, kind="stable")
        return _Edits(row=joined.row, ids=ids[order], values=values[order])

    def _is_token(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocab_size

    def _edit_parts(self, edits: Sequence[_Edits]) -> list[NDArray[np.int32]]:
        """Places in the flat tables, ids, and values as their bits."""
        self._make_room(max((len(edit.ids) for edit in edits), default=0))
        width = self._tables.edit_ids.shape[1]
        places = [np.arange(edit.row * width, edit.row * width + len(edit.ids), dtype=np.int32) for edit in edits]
        ids, values = [edit.ids for edit in edits], [edit.values for edit in edits]
        return [_concatenated(places), _concatenated(ids), _concatenated(values)]

    def _make_room(self, num_edits: int) -> None:
        """Widen the lists of edits to a power of two that has room."""
        width = self._tables.edit_ids.shape[1]
        if num_edits <= width:
            return
        more = (1 << (num_edits - 1).bit_length()) - width
        ids, values = (
            torch.nn.functional.pad(table, (0, more)) for table in (self._tables.edit_ids, self._tables.edit_values)
        )
        self._tables = replace(self._tables, edit_ids=ids, edit_values=values)

    def _count_seen(
        self, rows: Tensor, prompt_rows: Tensor, prompt: Tensor, rows_of_ids: Tensor, ids: Tensor, counts: Tensor
    ) -> None:
        seen = self._tables.seen
        seen.index_fill_(0, rows.long(), 0)
        flat = seen.view(-1)
        flat.index_fill_(0, prompt_rows.long() * self._vocab_size + prompt, IN_PROMPT)
        flat.scatter_add_(0, rows_of_ids.long() * self._vocab_size + ids, counts.to(torch.int16))


def _seen_parts(penalised: Sequence[Joined], vocab_size: int) -> list[NDArray[np.int32]]:
    """Rows; row and id of each prompt token; row, id and count of each token generated before a preemption."""
    rows = np.array([joined.row for joined in penalised], np.int32)
    prompts = [joined.token_ids[: joined.num_prompt_tokens] for joined in penalised]
    generated = [np.unique(joined.token_ids[joined.num_prompt_tokens :], return_counts=True) for joined in penalised]
    return [
        rows,
        np.repeat(rows, [len(prompt) for prompt in prompts]),
        _concatenated(prompts),
        np.repeat(rows, [len(ids) for ids, _ in generated]),
        _concatenated([ids for ids, _ in generated]),
        _concatenated([np.minimum(counts, MAX_COUNT).astype(np.int32) for _, counts in generated]),
    ]


def _least_positive(top_p: float) -> np.float32:
    """As float32, but above 0."""
    return max(np.float32(top_p), np.finfo(np.float32).tiny)


def _concatenated(arrays: Sequence[NDArray[np.generic]]) -> Int32:
    """The numbers, or the bits of float32 numbers; nothing if there are no arrays."""
    return np.concatenate(arrays).view(np.int32) if arrays else np.empty(0, np.int32)


def _zeros(shape: tuple[int, int], dtype: type[np.generic], device: torch.device) -> Tensor:
    """On a CPU memory that is taken when it is written to."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype))
    return torch.zeros(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
