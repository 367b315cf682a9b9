"""Sampling state of each row: numbers on the host, which are uploaded with each draw, and tables on the device.

All tables are allocated at the start, so that memory is there for the first request with penalties. Tables of bad words
grow when needed, and their largest size is counted from the start. Changes by joining requests are uploaded in one
asynchronous copy an iteration; nothing here waits for the device.
Legend: R rows of the state table, V vocabulary, E entries of a row's list of edits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import Int32, Joined
from nanoflow.device.transfer import to_device
from nanoflow.executor.bad_words import BadWords, bad_word_bytes
from nanoflow.executor.seen import SeenTokens, restriction_of
from nanoflow.kernels.sample import NUMBERS, SampleTables, scale_of

logger = logging.getLogger(__name__)

# Room for biases and stop tokens of a row; a request with more enlarges the tables.
_NUM_EDITS = 512


def table_bytes(num_rows: int, vocab_size: int) -> int:
    """Bytes on the device of the tables, and of the masks of two iterations.

    These are 2 bytes and 2 bits for each row and token of the vocabulary, 8 bytes for each edit, and bad words.
    """
    mask_bytes = 4 * -(-vocab_size // 32)
    return num_rows * (2 * vocab_size + 2 * mask_bytes + 8 * _NUM_EDITS) + bad_word_bytes(num_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edits:
    """Biases and stop tokens of one row: token ids in ascending order, and what to add (-infinity for a stop token)."""

    row: int
    ids: Int32
    values: NDArray[np.float32]


class SamplingState:
    """Numbers and tables of every row.

    Args:
        num_rows: R.
        vocab_size: V.
        device: Device of the tables.
    """

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._numbers = np.zeros(num_rows, NUMBERS)
        self._numbers["row"] = np.arange(num_rows)
        self._numbers["top_p"] = 1.0
        self._numbers["log_min_p"] = -np.inf
        self._fresh = self._numbers.copy()
        self._seen = SeenTokens(_zeros((num_rows, vocab_size), np.int16, device))
        self._bad_words = BadWords(num_rows=num_rows, vocab_size=vocab_size, device=device)
        self._tables = SampleTables(
            seen=self._seen.table,
            edit_ids=_zeros((num_rows, _NUM_EDITS), np.int32, device),
            edit_values=_zeros((num_rows, _NUM_EDITS), np.float32, device),
            masks=_zeros((1, -(-vocab_size // 32)), np.int32, device),
        )

    @property
    def tables(self) -> SampleTables:
        """The current tables, without masks; a join may replace them."""
        return self._tables

    def numbers(self, rows: Int32, positions: Int32) -> NDArray[np.void]:
        """`NUMBERS` [S] for draws of rows [S] at positions [S]."""
        numbers = self._numbers[rows]
        numbers["position"] = positions
        return numbers

    def restrict(self, rows: Int32) -> None:
        """Update the tables with what these rows (int32 [S]) may not choose next; called before a draw."""
        self._bad_words.mark(rows, self._tables.seen)

    def note(self, rows: Int32, token_ids: Tensor) -> None:
        """Record the tokens (int64 [S]) drawn for these rows (int32 [S])."""
        self._bad_words.note(rows, token_ids)

    def join(self, joined: Sequence[Joined]) -> dict[int, str]:
        """Assign rows to requests.

        Returns:
            Message by row for requests that failed; their rows draw with default parameters.
        """
        errors, read = {}, []
        for request in joined:
            try:
                read.append((request, self._join(request), restriction_of(request)))
            except Exception:
                logger.exception("a request's parameters cannot be taken in")
                self._numbers[request.row] = self._fresh[request.row]
                errors[request.row] = "its parameters cannot be taken in; the log says why"
        self._write_edits([edit for _, edit, _ in read if len(edit.ids)])
        restrictions = [restriction for _, _, restriction in read if restriction is not None]
        self._seen.join([request for request, _, _ in read if request.params.has_penalties], restrictions)
        self._bad_words.join([request.row for request in joined], restrictions)
        return errors

    def _join(self, joined: Joined) -> _Edits:
        """Write a request's numbers, and return its edits."""
        params, numbers = joined.params, self._numbers[joined.row]
        numbers["seed"] = joined.seed % 2**64
        numbers["scale"] = 0.0 if params.is_greedy else scale_of(params.temperature)
        numbers["top_k"] = params.top_k if params.top_k < self._vocab_size else 0
        numbers["top_p"] = _least_positive(params.top_p)
        numbers["log_min_p"] = np.log2(params.min_p) if params.min_p else -np.inf
        numbers["repetition"] = params.repetition_penalty
        numbers["presence"], numbers["frequency"] = params.presence_penalty, params.frequency_penalty
        numbers["has_penalties"] = params.has_penalties
        numbers["is_restricted"] = params.allowed_token_ids is not None or bool(joined.bad_word_ids)
        numbers["first_free_stop"] = min(joined.num_prompt_tokens + params.min_tokens, 2**31 - 1)
        bias = {token_id: value for token_id, value in (params.logit_bias or {}).items() if self._is_token(token_id)}
        # Stop tokens are forbidden only below `min_tokens`.
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

    def _write_edits(self, edits: Sequence[_Edits]) -> None:
        """Write lists of edits into their rows: indices in the flat tables, ids, and values as bits, in one copy."""
        if not edits:
            return
        self._make_room(max(len(edit.ids) for edit in edits))
        width = self._tables.edit_ids.shape[1]
        places = [np.arange(edit.row * width, edit.row * width + len(edit.ids), dtype=np.int32) for edit in edits]
        ids, values = [edit.ids for edit in edits], [edit.values.view(np.int32) for edit in edits]
        uploaded = to_device(np.concatenate((*places, *ids, *values)), self._device)
        at, uploaded_ids, uploaded_values = uploaded.view(3, -1)
        self._tables.edit_ids.view(-1).index_copy_(0, at.long(), uploaded_ids)
        self._tables.edit_values.view(-1).index_copy_(0, at.long(), uploaded_values.view(torch.float32))

    def _make_room(self, num_edits: int) -> None:
        """Enlarge the lists of edits to a power of two that has room."""
        width = self._tables.edit_ids.shape[1]
        if num_edits <= width:
            return
        more = (1 << (num_edits - 1).bit_length()) - width
        ids, values = (
            torch.nn.functional.pad(table, (0, more)) for table in (self._tables.edit_ids, self._tables.edit_values)
        )
        self._tables = replace(self._tables, edit_ids=ids, edit_values=values)


def _least_positive(top_p: float) -> np.float32:
    """The number as float32, but above 0."""
    return max(np.float32(top_p), np.finfo(np.float32).tiny)


def _zeros(shape: tuple[int, int], dtype: type[np.generic], device: torch.device) -> Tensor:
    """A zeroed tensor; on a CPU it takes memory only where it is written."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype))
    return torch.zeros(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
