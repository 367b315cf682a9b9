"""Rows that may not choose every token next: which tokens they may choose, as bit masks.

A completion may have to match a grammar, and its reasoning may be bounded: then a token that closes it is forced. A
row's mask depends on its last token. So a mask is computed on the host while the device runs the layers of the
iteration that draws with it: `masks` waits for the tokens of the iteration before, which the device has finished by
then, and all other work stays queued ahead. Rows without a constraint cost nothing, and without any such row nothing
waits.

A row with a draft of d tokens has d + 1 draws: the mask of each is that behind the tokens of the draft before it.

Legend: R rows of the state table, V vocabulary, S draws, M draws with a mask, W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import (
    consume_token_par,
    fill_next_token_bitmask_par,
    fill_next_token_bitmask_par_with_draft_tokens,
)
from torch import Tensor

from nanoflow.batch import Bool, Int32, Int64, Joined
from nanoflow.device.transfer import Readback
from nanoflow.grammars.compiled import Grammars
from nanoflow.grammars.text import GrammarError, said
from nanoflow.thinking import Thinking

_MAX_THREADS = 16
# Rows that share a copy of their grammar, and how many copies there are at most.
_ROWS_OF_A_COPY = 16
_MAX_COPIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """What the draws of an iteration may choose.

    Attributes:
        numbers: int32 [S], 1 + the row in `words` of each draw's mask; 0 for a draw without one.
        words: int32 [M, W], as in `SampleTables.masks`.
        must_end: bool [S], the draw may choose nothing but an end of sequence.
        errors: Message by draw whose grammar has failed.
    """

    numbers: Int32
    words: Tensor
    must_end: Bool
    errors: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Constraint:
    """What holds one row.

    Attributes:
        matcher: Of its grammar; None if it has none.
        thinking: How far its reasoning is; None if that is not bounded.
        grammar: Number of the compiled grammar that the matcher is of. Matchers of one wait for each other.
    """

    matcher: LLMatcher | None
    thinking: Thinking | None
    grammar: int = 0


class _RowDraws(NamedTuple):
    """The draws of one row in an iteration: where they are in `_Draws.places`, and the tokens that lie between them."""

    row: int
    held: _Constraint
    own: slice
    draft: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draws:
    """The draws of an iteration that are of rows with a constraint, those of one row together.

    Attributes:
        places: int64 [M], which of the iteration's draws they are.
        by_row: Those of each row; rows of one grammar stand together, so that mostly one thread has them.
        num_grammars: How many compiled grammars these rows have; at least 1 if there are rows.
    """

    places: Int64
    by_row: list[_RowDraws]
    num_grammars: int


class Constraints:
    """Matchers and bounds of rows.

    Args:
        num_rows: R.
        vocab_size: V.
        device: Where masks are used.
        grammars: Compiles grammars and knows the bytes of tokens; None if no request may have a constraint.
    """

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device, grammars: Grammars | None) -> None:
        self._device, self._grammars = device, grammars
        self._num_words = -(-vocab_size // 32)
        self._held: dict[int, _Constraint] = {}
        self._is_held = np.zeros(num_rows, np.bool_)
        # Of the latest masks, and those whose tokens are on their way.
        self._drawn: _Draws | None = None
        self._pending: tuple[_Draws, Readback] | None = None
        self._none = torch.zeros((1, self._num_words), dtype=torch.int32, device=device)
        # Where masks are computed. The device has its copy of them when their tokens are there, before the next ones.
        self._room = torch.empty((0, self._num_words), dtype=torch.int32)
        self._executors: dict[int, LLExecutor] = {}

    def join(self, joined: Sequence[Joined]) -> dict[int, str]:
        """Assign rows to requests; returns a message by row for those whose grammar has failed."""
        errors: dict[int, str] = {}
        for request in joined:
            self._held.pop(request.row, None)
            if request.params.structured_outputs is not None or request.thinking is not None:
                try:
                    self._held[request.row] = self._begun(request)
                except GrammarError as error:
                    part = "bound on reasoning" if request.thinking is not None else "structured output"
                    errors[request.row] = f"its {part} failed: {error}"
            self._is_held[request.row] = request.row in self._held
        return errors

    def masks(self, rows: Int32, followed_by: Int32 | None = None) -> Masks:
        """The masks of draws, after the tokens noted last.

        Args:
            rows: int32 [S], the row of each draw; those of one row stand together.
            followed_by: int32 [S], the token of the draft behind each draw, if the next draw is of the same row.
        """
        self._take_in()
        numbers, must_end = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.bool_)
        draws = self._drawn = self._find(rows, followed_by)
        count = len(draws.places)
        if not count:
            return Masks(numbers=numbers, words=self._none, must_end=must_end)
        masks = self._masks(count)
        words: Int32 = masks.numpy()
        errors = self._fill(draws, words, must_end)
        numbers[draws.places] = 1 + np.arange(count)
        for _, held, own, _ in draws.by_row:
            if held.matcher is None:
                numbers[draws.places[own][(words[own] == -1).all(axis=1)]] = 0
        on_device = masks.to(self._device, non_blocking=True)
        return Masks(numbers=numbers, words=on_device, must_end=must_end, errors=errors)

    def note(self, token_ids: Tensor) -> None:
        """Remember the tokens (int64 [S]) that were drawn with the latest masks, without waiting for them."""
        if self._drawn is not None and self._drawn.by_row:
            self._pending = self._drawn, Readback([token_ids])

    def _executor(self, draws: _Draws) -> LLExecutor:
        """Threads for the matchers of draws, as many as do not wait for each other: at most one for each grammar."""
        most = min(_MAX_THREADS, max((os.cpu_count() or 1) // 2, 1), draws.num_grammars)
        # A power of two, so that there are few pools of threads.
        num_threads = 1 << (most.bit_length() - 1)
        if num_threads not in self._executors:
            self._executors[num_threads] = LLExecutor(num_threads)
        return self._executors[num_threads]

    def _begun(self, request: Joined) -> _Constraint:
        """The constraint of a request behind what was generated before a preemption."""
        if self._grammars is None:
            raise GrammarError("it needs a tokenizer")
        structured, limit = request.params.structured_outputs, request.thinking
        constraint = _Constraint(None, None if limit is None else Thinking.begin(limit))
        if structured is not None:
            compiled = self._grammars.compiled(structured, copy=request.row // _ROWS_OF_A_COPY % _MAX_COPIES)
            constraint.matcher, constraint.grammar = compiled.deep_copy(), id(compiled)
        if limit is not None:
            self._grammars.token_bytes(0)  # fails here, where it concerns this request alone
        generated = request.token_ids[request.num_prompt_tokens :].tolist()
        if constraint.matcher is not None:
            constraint.matcher.try_consume_tokens(generated)
        for token_id in generated:
            self._think(constraint, token_id)
        return constraint

    def _find(self, rows: Int32, followed_by: Int32 | None) -> _Draws:
        """The draws of the rows that have a constraint."""
        places = np.flatnonzero(self._is_held[rows])
        of_draws = rows[places]
        begins = np.flatnonzero(np.diff(of_draws, prepend=-1))
        firsts, owners = begins.tolist(), of_draws[begins].tolist()
        drafts: list[list[int]] = [[]] * len(firsts)
        if followed_by is not None:
            tokens = followed_by[places]
            drafts = [tokens[first : stop - 1].tolist() for first, stop in pairwise([*firsts, len(places)])]
        by_row = [
            _RowDraws(row, self._held[row], slice(first, first + len(draft) + 1), draft)
            for row, first, draft in zip(owners, firsts, drafts, strict=True)
        ]
        by_row.sort(key=lambda each: each.held.grammar)
        num_grammars = len({each.held.grammar for each in by_row})
        return _Draws(places=places, by_row=by_row, num_grammars=num_grammars)

    def _masks(self, count: int) -> Tensor:
        """Room for so many masks, int32 [count, W] on the host, in pinned memory where the device is a GPU."""
        if len(self._room) < count:
            size, is_gpu = (max(count, 2 * len(self._room)), self._num_words), self._device.type == "cuda"
            self._room = torch.empty(size, dtype=torch.int32, pin_memory=is_gpu)
        return self._room[:count]

    def _fill(self, draws: _Draws, words: Int32, must_end: Bool) -> dict[int, str]:
        """Compute the masks of draws, one after the other in `words`; returns a message by draw that has failed."""
        plain: list[tuple[LLMatcher, int]] = []
        drafted: list[tuple[LLMatcher, int, list[int]]] = []
        for _, held, own, draft in draws.by_row:
            if held.matcher is not None and not draft:
                plain.append((held.matcher, own.start))
                continue
            # Without a grammar any token, and so behind a wrong token of a draft, where a draw does not count.
            words[own] = -1
            if held.matcher is not None:
                drafted.append((held.matcher, own.start, draft))
        if plain:
            fill_next_token_bitmask_par(self._executor(draws), plain, words)
        if drafted:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor(draws), drafted, words)
        errors: dict[int, str] = {}
        for _, held, own, draft in draws.by_row:
            # So is one that has failed.
            if held.matcher is not None and held.matcher.is_stopped():
                place = int(draws.places[own.start])
                must_end[place] = True
                if held.matcher.is_error():
                    words[own] = -1
                    errors[place] = f"its structured output failed: {said(held.matcher.get_error())}"
            if held.thinking is not None:
                self._close_thoughts(held, draft, words[own])
        return errors

    def _close_thoughts(self, constraint: _Constraint, draft: list[int], words: Int32) -> None:
        """Leave draws only the token that closes the reasoning, where its bound is reached and the grammar allows."""
        state = constraint.thinking
        for place in range(len(words)):
            if state is None or state.is_over:
                return
            if state.forced:
                word, bit = divmod(state.forced[0], 32)
                mask = np.uint32(1 << bit).astype(np.int32)
                if words[place, word] & mask:
                    words[place] = 0
                    words[place, word] = mask
                else:
                    # Only the first draw counts for sure; another one may be behind tokens that do not come.
                    constraint.thinking = state.without_force() if place == 0 else constraint.thinking
                    return
            if place < len(draft):
                state = self._thought(state, draft[place])

    def _thought(self, state: Thinking, token_id: int) -> Thinking:
        assert self._grammars is not None
        return state.after(token_id, self._grammars.token_bytes(token_id))

    def _think(self, constraint: _Constraint, token_id: int) -> None:
        """Take a token into the bound on reasoning; one that is over is dropped."""
        if constraint.thinking is not None:
            state = self._thought(constraint.thinking, token_id)
            constraint.thinking = None if state.is_over else state

    def _take_in(self) -> None:
        """Let constraints see the tokens drawn last. A matcher that cannot take its token has failed, and says so."""
        if self._pending is None:
            return
        (draws, readback), self._pending = self._pending, None
        (token_ids,) = readback.wait()
        drawn = token_ids[draws.places].tolist()
        jobs: list[tuple[LLMatcher, int]] = []
        were_stopped: list[bool] = []
        for _, held, own, draft in draws.by_row:
            taken = _counting(drawn[own], draft)
            if held.matcher is not None:
                # All but the last at once, the last ones of all rows in parallel.
                if len(taken) > 1:
                    held.matcher.consume_tokens(taken[:-1])
                jobs.append((held.matcher, taken[-1]))
            were_stopped.append(held.matcher is not None and held.matcher.is_stopped())
            if held.thinking is not None:
                for token_id in taken:
                    self._think(held, token_id)
        if jobs:
            consume_token_par(self._executor(draws), jobs)
        for (row, held, *_), was_stopped in zip(draws.by_row, were_stopped, strict=True):
            # The end of sequence was drawn: what the row draws until another request takes it is dropped.
            if was_stopped or (held.matcher is not None and _has_ended(held.matcher)):
                held.matcher = held.thinking = None
            if held.matcher is None and held.thinking is None and self._held.get(row) is held:
                del self._held[row]
                self._is_held[row] = False


def _has_ended(matcher: LLMatcher) -> bool:
    """Whether the end of sequence was drawn."""
    return matcher.is_stopped() and matcher.stop_reason() == "EndOfSentence"


def _counting(drawn: list[int], draft: list[int]) -> list[int]:
    """The drawn tokens that count: those behind tokens of a draft that were right."""
    if not draft:
        return drawn
    num_right = next((place for place, token_id in enumerate(draft) if drawn[place] != token_id), len(draft))
    return drawn[: num_right + 1]
