"""Decides what the next iteration computes, and forms its `DenseBatch`.

One rule replaces phases: a request has `num_computed` tokens and must catch up with `num_tokens`. Decode, chunked
prefill and recompute after a preemption all follow from it. `scheduler.py` decides which requests run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nanoflow.batch import DenseBatch, Int64, Joined, PromptPooling, PromptScore
from nanoflow.kvcache.pools import PagePools
from nanoflow.scheduler.background import Background, Hurry, Part
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.rows import RowTable

_NOBODY = Part(rows=np.zeros(0, np.int64), num_before=np.zeros(0, np.int64), num_pending=np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What N requests compute in an iteration; arrays are int64 [N], in batch order.

    Attributes:
        rows: Rows of the requests in the state table, those with one pending token first.
        num_before: Tokens computed before this iteration.
        num_pending: Known tokens that are not computed.
        num_taken: How many of them this iteration computes.
        num_left: Tokens that still fit, for interactive requests: they may take those of background ones.
        num_background: Tokens that background requests have.
        num_left_background: Tokens that still fit, for background requests.
        num_drafts: How many of the pending tokens, the last ones, are guesses (`drafts.py`).
    """

    rows: Int64
    num_before: Int64
    num_pending: Int64
    num_taken: Int64
    num_left: int
    num_background: int
    num_left_background: int
    num_drafts: Int64

    @property
    def num_unused(self) -> int:
        """Tokens of the budget that nobody has."""
        return max(self.num_left - self.num_background, 0)


def fill_budget(table: RowTable, pace: Pace, background: Background, max_batch_tokens: int) -> Turn:
    """Distribute the token budget: among interactive requests first, then among background ones.

    In each class those with one pending token come first, then the others, each in the order of the rows.
    """
    num_first = table.num_interactive
    first = _part(table, table.order[:num_first])
    max_tokens = pace.max_tokens(max_batch_tokens, first.num_before, first.num_pending)
    taken_first = first.taken(max_tokens)
    behind = _part(table, table.order[num_first:]) if num_first < table.num_running else _NOBODY
    max_behind = background.max_tokens(
        pace, max_batch_tokens, first, taken_first, behind, lambda: _hurry(table, first, taken_first)
    )
    taken_behind = behind.taken(max_behind)
    both, num_taken, places = _in_batch_order(first, taken_first, behind, taken_behind)
    num_background = int(taken_behind.sum())
    return Turn(
        rows=both.rows[places],
        num_before=both.num_before[places],
        num_pending=both.num_pending[places],
        num_taken=num_taken[places],
        num_left=max_tokens - int(taken_first.sum()),
        num_background=num_background,
        num_left_background=max_behind - num_background,
        num_drafts=np.zeros_like(both.rows[places]),
    )


def _in_batch_order(
    first: Part, taken_first: Int64, behind: Part, taken_behind: Int64
) -> tuple[Part, Int64, Int64 | slice]:
    """All requests with their tokens, and the places of those that get any; with one pending token they come first."""
    if len(behind.rows) == 0:
        return first, taken_first, slice(np.count_nonzero(taken_first))
    both, taken = first + behind, np.concatenate((taken_first, taken_behind))
    is_there, is_decode = taken > 0, both.num_pending == 1
    return both, taken, np.concatenate((np.flatnonzero(is_there & is_decode), np.flatnonzero(is_there & ~is_decode)))


def _part(table: RowTable, rows: Int64) -> Part:
    """These rows in the order in which they get tokens."""
    num_pending = table.num_pending(rows)
    places = np.concatenate((np.flatnonzero(num_pending == 1), np.flatnonzero(num_pending > 1)))
    rows = rows[places]
    return Part(rows=rows, num_before=table.num_computed[rows], num_pending=num_pending[places])


def _hurry(table: RowTable, part: Part, taken: Int64) -> Hurry:
    """Those of a part that have no token yet."""
    waits = np.flatnonzero(table.num_tokens[part.rows] == table.num_prompt[part.rows])
    num_behind = np.cumsum(part.num_pending - taken)
    return Hurry(arrival_s=table.arrival_s[part.rows[waits]], num_behind=num_behind[waits])


def form_batch(
    turn: Turn, table: RowTable, pages: PagePools, *, iteration: int, joined: tuple[Joined, ...]
) -> DenseBatch:
    """Form the batch of a turn; its requests must have the pages already."""
    rows, taken = turn.rows, turn.num_taken
    query_start = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(taken, out=query_start[1:])
    row_of_token = np.repeat(rows, taken)
    positions = np.arange(query_start[-1]) + np.repeat(turn.num_before - query_start[:-1], taken)
    drawing = np.flatnonzero(taken == turn.num_pending)
    return DenseBatch(
        iteration=iteration,
        rows=rows.astype(np.int32),
        epochs=table.epoch[rows],
        num_decodes=int(np.count_nonzero(turn.num_pending == 1)),
        query_start=query_start.astype(np.int32),
        context_len=(turn.num_before + taken).astype(np.int32),
        token_ids=table.tokens_at(row_of_token, positions),
        is_fed_back=(positions >= table.num_sent[row_of_token]) & np.repeat(turn.num_drafts == 0, taken),
        positions=positions.astype(np.int32),
        slots=pages.slots(row_of_token, positions),
        new_pages=pages.drain(rows),
        table_width=pages.width(rows),
        sampled=np.repeat(drawing, 1 + turn.num_drafts[drawing]).astype(np.int32),
        joined=joined,
        prompt_scores=_prompt_scores(turn, table, query_start),
        poolings=_poolings(turn, table, query_start),
        num_drafted_requests=int(np.count_nonzero(turn.num_drafts)),
        num_draft_tokens=int(turn.num_drafts.sum()),
    )


def _prompt_scores(turn: Turn, table: RowTable, query_start: Int64) -> tuple[PromptScore, ...]:
    """The parts of prompts whose log probabilities this turn computes; token p of a prompt scores token p + 1."""
    is_scoring = table.is_scored[turn.rows] & (turn.num_before < table.num_prompt[turn.rows] - 1)
    scores = []
    for index in np.flatnonzero(is_scoring).tolist():
        row, first, start = int(turn.rows[index]), int(turn.num_before[index]), int(query_start[index])
        stop = min(first + int(turn.num_taken[index]), int(table.num_prompt[row]) - 1)
        score = PromptScore(
            request_index=index,
            start=start,
            stop=start + stop - first,
            first_position=first + 1,
            target_ids=table.known_tokens(row, first + 1, stop + 1),
            num_logprobs=table.tenant(row).params.prompt_logprobs or 0,
        )
        scores.append(score)
    return tuple(scores)


def _poolings(turn: Turn, table: RowTable, query_start: Int64) -> tuple[PromptPooling, ...]:
    """The parts of prompts that this turn computes and whose hidden states are asked for."""
    num_prompt, first = table.num_prompt[turn.rows], table.pooled_from[turn.rows]
    begins, ends = np.maximum(turn.num_before, first), np.minimum(turn.num_before + turn.num_taken, num_prompt)
    return tuple(
        PromptPooling(
            request_index=index,
            start=int(query_start[index] + begins[index] - turn.num_before[index]),
            stop=int(query_start[index] + ends[index] - turn.num_before[index]),
            is_first=bool(begins[index] == first[index]),
            is_last=bool(ends[index] == num_prompt[index]),
            num_pooled=int(num_prompt[index] - first[index]),
        )
        for index in np.flatnonzero(begins < ends).tolist()
    )


def with_guesses(turn: Turn, num_guessed: dict[int, int]) -> Turn:
    """The turn with guessed tokens for some of its decodes (number by row), which are moved after the other decodes."""
    num_drafts = np.array([num_guessed.get(row, 0) for row in turn.rows.tolist()], dtype=np.int64)
    num_decodes = int(np.count_nonzero(turn.num_pending == 1))
    order = np.arange(len(turn.rows))
    order[:num_decodes] = np.argsort(num_drafts[:num_decodes] > 0, kind="stable")
    num_drafts = num_drafts[order]
    return replace(
        turn,
        rows=turn.rows[order],
        num_before=turn.num_before[order],
        num_pending=turn.num_pending[order] + num_drafts,
        num_taken=turn.num_taken[order] + num_drafts,
        num_left=turn.num_left - int(num_drafts.sum()),
        num_drafts=num_drafts,
    )
