"""The table of tokens that rows have seen, and may not choose: what penalties count, and what restrictions forbid.

Requests that have neither never touch it. What joining requests bring travels in one asynchronous copy.
Legend: R rows of the state table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoflow.batch import Int32, Joined
from nanoflow.device.transfer import to_device
from nanoflow.kernels.sample import FORBIDDEN, IN_PROMPT, MAX_COUNT, SEEN_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Restriction:
    """What a row may not choose.

    Attributes:
        row: Its place in the tables.
        allowed: Token ids that it may choose; None if it is not said which.
        forbidden: Token ids that it may not.
        sequences: Of two tokens and more, of which it may not complete any; the last token is not forbidden anyway.
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
    choices = None if allowed is None else frozenset(allowed)
    return Restriction(
        row=joined.row,
        allowed=None if allowed is None else np.array(allowed, np.int32),
        forbidden=np.array(sorted(forbidden), np.int32),
        sequences=tuple(
            word
            for word in words
            if len(word) > 1 and word[-1] not in forbidden and (choices is None or word[-1] in choices)
        ),
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
        """Begin anew the rows of requests with penalties or restrictions; a request may have both."""
        if not penalised and not restrictions:
            return
        parts = [*_seen_parts(penalised), *_restriction_parts(restrictions)]
        uploaded = to_device(np.concatenate(parts, dtype=np.int32), self.table.device)
        tensors = torch.split(uploaded.long(), [len(part) for part in parts])
        counted, restricted = tensors[:6], tensors[6:]
        self.table.index_fill_(0, torch.cat((counted[0], restricted[0])), 0)
        if penalised:
            self._count(*counted[1:])
        if restrictions:
            self._forbid(*restricted[1:])

    def _count(self, prompt_rows: Tensor, prompt: Tensor, rows_of_ids: Tensor, ids: Tensor, counts: Tensor) -> None:
        flat, vocab_size = self.table.view(-1), self.table.shape[1]
        flat.index_fill_(0, prompt_rows * vocab_size + prompt, IN_PROMPT)
        flat.scatter_add_(0, rows_of_ids * vocab_size + ids, counts.to(torch.int16))

    def _forbid(
        self, closed_rows: Tensor, allowed_rows: Tensor, allowed: Tensor, forbidden_rows: Tensor, forbidden: Tensor
    ) -> None:
        """Forbid all of some rows, free what is allowed there, and forbid single tokens of any rows."""
        flat, vocab_size = self.table.view(-1), self.table.shape[1]
        self.table.index_copy_(0, closed_rows, self.table[closed_rows] | FORBIDDEN)
        places = allowed_rows * vocab_size + allowed
        flat.index_copy_(0, places, flat[places] & SEEN_BITS)
        places = forbidden_rows * vocab_size + forbidden
        flat.index_copy_(0, places, flat[places] | FORBIDDEN)


def _seen_parts(penalised: Sequence[Joined]) -> list[NDArray[np.int32]]:
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


def _restriction_parts(restrictions: Sequence[Restriction]) -> list[NDArray[np.int32]]:
    """Rows; of them those with allowed tokens; row and id of each such token; row and id of each forbidden one."""
    rows = np.array([one.row for one in restrictions], np.int32)
    forbidden = [one.forbidden for one in restrictions]
    open_ids = [(one.row, one.allowed) for one in restrictions if one.allowed is not None]
    closed_rows = np.array([row for row, _ in open_ids], np.int32)
    allowed = [ids for _, ids in open_ids]
    return [
        rows,
        closed_rows,
        np.repeat(closed_rows, [len(ids) for ids in allowed]),
        _concatenated(allowed),
        np.repeat(rows, [len(ids) for ids in forbidden]),
        _concatenated(forbidden),
    ]


def _concatenated(arrays: Sequence[Int32]) -> Int32:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)
