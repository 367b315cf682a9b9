"""Bans sequences of tokens, depending on the last tokens of a row, which only the device knows.

Only the last token of a sequence is ever forbidden, and only while the row's last tokens are the tokens before it. So
before a draw the last token of every sequence is set or cleared in the table of seen tokens, which the draw reads
anyway. Rows without sequences are skipped, and without any sequence there is no table.

Legend: R rows of the state table, V vocabulary, B rows that are drawn and have sequences, E sequences of a row,
D tokens of a sequence before its last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanoflow.batch import Int32
from nanoflow.device.transfer import to_device
from nanoflow.executor.seen import Restriction
from nanoflow.kernels.sample import FORBIDDEN, SEEN_BITS
from nanoflow.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS

# In place of token ids: before the beginning of a sequence, of what a row has generated, and of no sequence at all.
_ANY, _NOTHING, _NEVER = -1, -2, -3


def bad_word_bytes(num_rows: int) -> int:
    """Upper bound of the tables' bytes on the device; each word has two forms."""
    return 4 * num_rows * (2 * MAX_BAD_WORDS + 1) * (MAX_BAD_WORD_TOKENS + 1)


class BadWords:
    """Sequences of every row, and the last tokens of rows that have some.

    Args:
        num_rows: R.
        vocab_size: V.
        device: Device of the tables.
    """

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._has_some = np.zeros(num_rows, np.bool_)
        self._recent = torch.zeros(num_rows, 0, dtype=torch.int32, device=device)
        self._before = torch.zeros(num_rows, 0, 0, dtype=torch.int32, device=device)
        self._last = torch.zeros(num_rows, 0, dtype=torch.int32, device=device)

    def join(self, rows: Sequence[int], restrictions: Sequence[Restriction]) -> None:
        """Assign these rows to new requests, some of which have restrictions."""
        self._has_some[list(rows)] = False
        given = [one for one in restrictions if one.sequences]
        if not given:
            return
        num_before = max(len(sequence) - 1 for one in given for sequence in one.sequences)
        self._make_room(max(len(one.sequences) for one in given), num_before)
        concerned = np.array([one.row for one in given], np.int64)
        self._has_some[concerned] = True
        at = to_device(concerned, self._device)
        parts = zip(*map(self._tables_of, given), strict=True)
        for table, rows_of_table in zip((self._recent, self._before, self._last), parts, strict=True):
            table.index_copy_(0, at, to_device(np.stack(rows_of_table), self._device))

    def mark(self, rows: Int32, seen: Tensor) -> None:
        """Forbid in `SampleTables.seen` exactly the tokens that would complete a sequence in these rows (int32 [S])."""
        rows = rows[self._has_some[rows]]
        if not len(rows):
            return
        at = to_device(rows.astype(np.int64), self._device)
        before = self._before[at]
        is_complete = ((before == self._recent[at][:, None]) | (before == _ANY)).all(-1)
        places = (at[:, None] * self._vocab_size + self._last[at]).view(-1)
        flat = seen.view(-1)
        free = flat[places] & SEEN_BITS
        flat.index_copy_(0, places, free)
        # Several sequences may end in the same token; one complete one is enough to forbid it.
        flat.scatter_reduce_(0, places, torch.where(is_complete.view(-1), free + FORBIDDEN, free), "amin")

    def note(self, rows: Int32, token_ids: Tensor) -> None:
        """Record the tokens (int64 [S]) just drawn for these rows (int32 [S])."""
        places = np.flatnonzero(self._has_some[rows])
        if len(places):
            at, drawn = to_device(np.stack((rows[places], places)).astype(np.int64), self._device)
            recent = torch.cat((self._recent[at][:, 1:], token_ids[drawn, None].int()), dim=1)
            self._recent.index_copy_(0, at, recent)

    def _tables_of(self, one: Restriction) -> tuple[Int32, Int32, Int32]:
        """One row of each table: last tokens, and for each sequence the tokens before its last, and its last."""
        sequences, generated = one.sequences, one.generated
        num_sequences, num_before = self._before.shape[1:]
        recent = np.full(num_before, _NOTHING, np.int32)
        num_recent = min(len(generated), num_before)
        recent[num_before - num_recent :] = generated[len(generated) - num_recent :]
        before = np.full((num_sequences, num_before), _NEVER, np.int32)
        last = np.full(num_sequences, sequences[0][-1], np.int32)
        for place, sequence in enumerate(sequences):
            before[place] = _ANY
            before[place, num_before - len(sequence) + 1 :] = sequence[:-1]
            last[place] = sequence[-1]
        return recent, before, last

    def _make_room(self, num_sequences: int, num_before: int) -> None:
        """Enlarge the tables to powers of two that have room."""
        more = _more(num_sequences, self._before.shape[1])
        more_before = _more(num_before, self._before.shape[2])
        pad = torch.nn.functional.pad
        # What is not there yet of the sequences of other rows never matches; what they have generated is in place.
        self._before = pad(self._before, (more_before, 0), value=_ANY)
        self._before = pad(self._before, (0, 0, 0, more), value=_NEVER)
        self._recent = pad(self._recent, (more_before, 0), value=_NOTHING)
        # An entry without a sequence marks nothing: it repeats a token that the row's first sequence marks or frees.
        first = self._last[:, :1] if self._last.shape[1] else self._last.new_zeros(len(self._last), 1)
        self._last = torch.cat((self._last, first.expand(-1, more)), dim=1)


def _more(needed: int, width: int) -> int:
    return max((1 << (needed - 1).bit_length()) - width, 0)
