"""The table of seen and forbidden tokens of each row: penalties count the former, restrictions set the latter.

Requests without either never touch it. Changes by joining requests are uploaded in one asynchronous copy, except lists
of allowed tokens.
Legend: R rows of the state table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoflow.batch import Int32, Joined
from nanoflow.device.transfer import to_device
from nanoflow.kernels.sample import FORBIDDEN, IN_PROMPT, MAX_COUNT


@dataclass(frozen=True, slots=True, kw_only=True)
class Restriction:
    """What a row may not choose.

    Attributes:
        row: Its index in the tables.
        allowed: Token ids that it may choose; None for all.
        forbidden: Token ids that it may not choose.
        sequences: Sequences of at least two tokens that it may not complete; their last tokens are allowed elsewhere.
        generated: Its tokens from before a preemption.
    """

    row: int
    allowed: Int32 | None
    forbidden: Int32
    sequences: tuple[tuple[int, ...], ...]
    generated: Int32


def restriction_of(joined: Joined) -> Restriction | None:
    """What a request may not choose; None if it may choose anything."""
    allowed, words = joined.params.allowed_token_ids, joined.bad_word_ids
    if allowed is None and not words:
        return None
    forbidden = {word[0] for word in words if len(word) == 1}
    sequences = [word for word in words if len(word) > 1 and word[-1] not in forbidden]
    if sequences and allowed is not None:
        choices = frozenset(allowed)
        sequences = [word for word in sequences if word[-1] in choices]
    return Restriction(
        row=joined.row,
        allowed=None if allowed is None else np.array(allowed, np.int32),
        forbidden=np.array(sorted(forbidden), np.int32),
        sequences=tuple(sequences),
        generated=joined.token_ids[joined.num_prompt_tokens :],
    )


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """Fills `SampleTables.seen`.

    Attributes:
        table: int16 [R, V].
    """

    table: Tensor

    def join(self, penalised: Sequence[Joined], restrictions: Sequence[Restriction]) -> None:
        """Reset the rows of requests with penalties or restrictions; a request may have both."""
        if not penalised and not restrictions:
            return
        rows = [*(joined.row for joined in penalised), *(one.row for one in restrictions)]
        parts = [np.array(rows, np.int32), *_seen_parts(penalised), *_forbidden_parts(restrictions)]
        uploaded = to_device(np.concatenate(parts, dtype=np.int32), self.table.device)
        begun, *tensors = torch.split(uploaded.long(), [len(part) for part in parts])
        self.table.index_fill_(0, begun, 0)
        for one in restrictions:
            if one.allowed is not None:
                self._allow(one.row, one.allowed)
        self._count(*tensors[:5])
        self._add_bits(*tensors[5:], bits=FORBIDDEN)

    def _allow(self, row: int, token_ids: Int32) -> None:
        """Forbid all other tokens of a row. One row at a time, since a list may be as long as the vocabulary."""
        self.table[row].fill_(FORBIDDEN).index_fill_(0, to_device(token_ids, self.table.device).long(), 0)

    def _count(self, prompt_rows: Tensor, prompt: Tensor, rows: Tensor, ids: Tensor, counts: Tensor) -> None:
        self._add_bits(prompt_rows, prompt, bits=IN_PROMPT)
        self.table.view(-1).scatter_add_(0, rows * self.table.shape[1] + ids, counts.to(torch.int16))

    def _add_bits(self, rows: Tensor, ids: Tensor, *, bits: int) -> None:
        flat, places = self.table.view(-1), rows * self.table.shape[1] + ids
        flat.index_copy_(0, places, flat[places] | bits)


def _seen_parts(penalised: Sequence[Joined]) -> list[Int32]:
    """Row and id of each prompt token; row, id and count of each token generated before a preemption."""
    rows = np.array([joined.row for joined in penalised], np.int32)
    prompts = [joined.token_ids[: joined.num_prompt_tokens] for joined in penalised]
    generated = [np.unique(joined.token_ids[joined.num_prompt_tokens :], return_counts=True) for joined in penalised]
    return [
        np.repeat(rows, [len(prompt) for prompt in prompts]),
        _concatenated(prompts),
        np.repeat(rows, [len(ids) for ids, _ in generated]),
        _concatenated([ids for ids, _ in generated]),
        _concatenated([np.minimum(counts, MAX_COUNT).astype(np.int32) for _, counts in generated]),
    ]


def _forbidden_parts(restrictions: Sequence[Restriction]) -> list[Int32]:
    """Row and id of each single token that is forbidden."""
    rows = np.array([one.row for one in restrictions], np.int32)
    forbidden = [one.forbidden for one in restrictions]
    return [np.repeat(rows, [len(ids) for ids in forbidden]), _concatenated(forbidden)]


def _concatenated(arrays: Sequence[Int32]) -> Int32:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)
