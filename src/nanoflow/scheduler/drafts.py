"""Drafts: guesses of the next tokens of running requests, all verified in one iteration (speculative decoding).

`Drafter` guesses what a grammar forces (`forced.py`), else by prompt look-up (`ngram.py`), for requests whose guesses
have been right, and while drafts pay (`gain.py`). `NoDrafts` replaces it in an engine that does not speculate.
`verify.py` decides which tokens of a draft count. The scheduler gives drafts only tokens and pages that no request
needs.

A draft follows a token whose value is known. So while a batch with drafts is in flight, no other is formed. And if a
draft could be made as soon as the token in flight is known, the next batch waits for that token. Between these
iterations the host's work is not hidden. The alternative, to skip only requests whose tokens are in flight, would leave
them out of every second iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nanoflow.batch import Bool, DenseBatch, Int32, Int64
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.request import Request
from nanoflow.scheduler.forced import ForcedRuns
from nanoflow.scheduler.forming import Turn, with_guesses
from nanoflow.scheduler.gain import Draft, Gain
from nanoflow.scheduler.ngram import continuation
from nanoflow.scheduler.rows import RowTable
from nanoflow.speculation import NgramSpeculation, read_speculation

# With more running requests nothing is looked up: an iteration has so many tokens then that further ones cost time.
MAX_DRAFTED_REQUESTS = 32
# After a wrong draft a request gets none for 1, 2, 4, ... tokens, at most 2 to the power of this.
_MOST_DOUBLINGS = 6
# Decay of the statistics of right guesses, for each draft.
_MEMORY = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCounts:
    """Counts since the start.

    Attributes:
        num_drafts: Verified drafts.
        num_draft_tokens: Their tokens.
        num_accepted_tokens: How many of these were accepted.
        num_undrafted_requests: Requests that cannot have drafts, because their choice of a token depends on tokens of
            the same iteration (penalties, bad words).
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_undrafted_requests: int = 0


class Drafts(Protocol):
    """Makes drafts and learns from the results."""

    @property
    def counts(self) -> DraftCounts:
        """What became of the drafts so far."""

    def join(self, rows: Int64, requests: Sequence[Request]) -> None:
        """Note that these requests have taken these rows, int64 [N]."""

    def awaits_commit(self, table: RowTable, iteration_time: IterationTime | None) -> bool:
        """Whether the next batch should be formed only after the oldest batch in flight has been committed."""

    def extend(self, turn: Turn, table: RowTable, iteration_time: IterationTime | None) -> Turn:
        """The turn with drafts, if there are any, within its remaining tokens."""

    def note_formed(self, batch: DenseBatch) -> None:
        """Note that a batch is in flight."""

    def note_committed(self, batch: DenseBatch) -> None:
        """Note that a batch has been committed."""

    def note_verified(self, batch: DenseBatch, is_alive: Bool, num_counting: Int64) -> None:
        """Learn from a batch: whether each request still runs, bool [B]; how many of its draws counted, int64 [B]."""

    def note_time(self, batch: DenseBatch, shape: BatchShape, time_s: float) -> None:
        """The device has worked so long on a batch, whose shape this is."""


class NoDrafts:
    """Makes no drafts."""

    counts = DraftCounts()

    def join(self, rows: Int64, requests: Sequence[Request]) -> None:
        """See `Drafts`."""

    def awaits_commit(self, table: RowTable, iteration_time: IterationTime | None) -> bool:
        """See `Drafts`."""
        del table, iteration_time
        return False

    def extend(self, turn: Turn, table: RowTable, iteration_time: IterationTime | None) -> Turn:
        """See `Drafts`."""
        del table, iteration_time
        return turn

    def note_formed(self, batch: DenseBatch) -> None:
        """See `Drafts`."""

    def note_committed(self, batch: DenseBatch) -> None:
        """See `Drafts`."""

    def note_verified(self, batch: DenseBatch, is_alive: Bool, num_counting: Int64) -> None:
        """See `Drafts`."""

    def note_time(self, batch: DenseBatch, shape: BatchShape, time_s: float) -> None:
        """See `Drafts`."""


def may_draft(request: Request) -> bool:
    """Whether each token's distribution depends only on logits and position, not on tokens of the same iteration."""
    # A grammar that can only end goes before `min_tokens`, which is known of the first draw alone.
    is_late = request.structured is not None and request.params.min_tokens > 0
    return not (request.params.has_penalties or request.bad_word_ids or is_late)


class Drafter:
    """Drafts by prompt look-up.

    Args:
        speculation: Lengths of drafts and of the matches looked up.
        max_num_seqs: Number of rows of the state table.
        forced: Finds tokens that grammars force, which go before what is looked up; None finds none.
    """

    def __init__(self, speculation: NgramSpeculation, *, max_num_seqs: int, forced: ForcedRuns | None = None) -> None:
        self._speculation, self._forced = speculation, forced
        # Rows whose last guess was forced, which says nothing about look-up; rows with a grammar.
        self._is_forced, self._is_held = np.zeros((2, max_num_seqs), dtype=np.bool_)
        self._max_tokens = _most_tokens(speculation, max_num_seqs)
        self._counts = np.zeros(4, dtype=np.int64)
        self._num_in_flight = self._num_drafted_in_flight = 0
        self._awaiting: list[int] = []
        self._gain = Gain()
        # One entry for each row of the state table.
        self._may_draft = np.zeros(max_num_seqs, dtype=np.bool_)
        self._num_right, self._num_tried = np.zeros((2, max_num_seqs))
        self._num_failed, self._rests_until = np.zeros((2, max_num_seqs), dtype=np.int64)

    @property
    def counts(self) -> DraftCounts:
        """See `Drafts`."""
        num_drafts, num_tokens, num_accepted, num_undrafted = self._counts.tolist()
        return DraftCounts(
            num_drafts=num_drafts,
            num_draft_tokens=num_tokens,
            num_accepted_tokens=num_accepted,
            num_undrafted_requests=num_undrafted,
        )

    def join(self, rows: Int64, requests: Sequence[Request]) -> None:
        """See `Drafts`. A request that joins again after a preemption is counted again."""
        self._may_draft[rows] = [may_draft(request) for request in requests]
        self._num_right[rows] = self._num_tried[rows] = 0
        self._num_failed[rows] = self._rests_until[rows] = 0
        self._awaiting = [row for row in self._awaiting if row not in rows]
        for row, request in zip(rows.tolist(), requests, strict=True):
            if self._forced is not None:
                self._is_held[row] = self._forced.join(row, request)
        self._counts[3] += np.count_nonzero(~self._may_draft[rows])

    def awaits_commit(self, table: RowTable, iteration_time: IterationTime | None) -> bool:
        """See `Drafts`."""
        if self._num_drafted_in_flight or not self._num_in_flight:
            return self._num_drafted_in_flight > 0
        if self._awaiting:
            # The commit that was waited for has not happened yet.
            return True
        decoding = table.order[table.num_pending(table.order) == 1]
        if len(decoding) > MAX_DRAFTED_REQUESTS:
            return False
        rows = self._willing(decoding, table)
        rows = rows[table.num_tokens[rows] - table.num_known[rows] == 1]
        found: list[tuple[int, Draft]] = []
        for row in rows.tolist():
            # One token more than a draft, as the token in flight is guessed too.
            room = int(table.max_total[row] - table.num_known[row]) - 1
            guess = self._guess(row, table, min(self._speculation.num_draft_tokens + 1, room))
            if len(guess) > 1:
                # The token in flight has to be right as well.
                expected = self._likelihood(row) * _expected(self._likelihood(row), len(guess) - 1)
                context = int(table.num_tokens[row])
                found.append((row, Draft(num_tokens=len(guess) - 1, context=context, expected=expected)))
        if not found:
            return False
        shape = BatchShape(
            num_tokens=len(decoding),
            num_decode_tokens=len(decoding),
            decode_context=int(table.num_tokens[decoding].sum()),
            num_sampled=len(decoding),
        )
        if not self._gain.allows(shape, [draft for _, draft in found], iteration_time):
            return False
        self._awaiting = [row for row, _ in found]
        return True

    def extend(self, turn: Turn, table: RowTable, iteration_time: IterationTime | None) -> Turn:
        """See `Drafts`."""
        is_decode = turn.num_pending == 1
        rows = self._willing(turn.rows[is_decode], table)
        rows = rows[table.num_tokens[rows] == table.num_known[rows]]
        left = min(turn.num_unused, self._max_tokens)
        guesses: dict[int, Int32] = {}
        for row in rows.tolist():
            # The token after the draft is drawn too.
            room = min(left, int(table.max_total[row] - table.num_known[row]) - 1)
            guess = self._guess(row, table, min(self._speculation.num_draft_tokens, room))
            if len(guess):
                guesses[row] = guess
                left -= len(guess)
        for row in self._awaiting:
            if row not in guesses:
                self._rest(row, int(table.num_known[row]))
        self._awaiting = []
        if not guesses:
            return turn
        drafts = [self._draft(row, table, len(guess)) for row, guess in guesses.items()]
        if not self._gain.allows(_shape_of(turn), drafts, iteration_time):
            return turn
        for row, guess in guesses.items():
            table.guess(row, guess)
        return with_guesses(turn, {row: len(guess) for row, guess in guesses.items()})

    def note_formed(self, batch: DenseBatch) -> None:
        """See `Drafts`."""
        self._num_in_flight += 1
        if batch.num_draft_tokens:
            self._num_drafted_in_flight += 1
            self._gain.note_formed()

    def note_committed(self, batch: DenseBatch) -> None:
        """See `Drafts`."""
        self._num_in_flight -= 1
        self._num_drafted_in_flight -= batch.num_draft_tokens > 0

    def note_verified(self, batch: DenseBatch, is_alive: Bool, num_counting: Int64) -> None:
        """See `Drafts`."""
        num_draws = np.bincount(batch.sampled, minlength=batch.num_requests)
        for index in np.flatnonzero((num_draws > 1) & is_alive).tolist():
            row, num_tokens = int(batch.rows[index]), int(num_draws[index]) - 1
            num_right = max(int(num_counting[index]) - 1, 0)
            self._counts[:3] += (1, num_tokens, num_right)
            if self._is_forced[row]:
                continue
            self._num_right[row] = _MEMORY * self._num_right[row] + num_right
            self._num_tried[row] = _MEMORY * self._num_tried[row] + min(num_right + 1, num_tokens)
            if num_right:
                self._num_failed[row] = 0
            else:
                self._rest(row, int(batch.context_len[index]) - num_tokens + 1)

    def note_time(self, batch: DenseBatch, shape: BatchShape, time_s: float) -> None:
        """See `Drafts`; batches with parts of prompts, or of many requests, are left out."""
        num_guessing = batch.num_drafted_requests + batch.num_draft_tokens
        if batch.num_tokens == batch.num_decodes + num_guessing and batch.num_requests <= MAX_DRAFTED_REQUESTS:
            self._gain.note_time(shape, time_s, is_drafted=num_guessing > 0)

    def _willing(self, rows: Int64, table: RowTable) -> Int64:
        """Those of the rows that may have a draft now; none if too many requests run."""
        if len(rows) > MAX_DRAFTED_REQUESTS:
            return rows[:0]
        # What is forced needs no rest.
        rested = (table.num_known[rows] >= self._rests_until[rows]) | self._is_held[rows]
        return rows[self._may_draft[rows] & rested]

    def _guess(self, row: int, table: RowTable, count: int) -> Int32:
        if count < 1:
            return np.zeros(0, np.int32)
        kind = self._speculation
        known = table.known_view(row)
        forced = known[:0] if self._forced is None else self._forced.run(row, known, count)
        self._is_forced[row] = len(forced) > 0
        if len(forced) or len(known) < self._rests_until[row]:
            return forced
        return continuation(known, count, longest=kind.longest_match, shortest=kind.shortest_match)

    def _draft(self, row: int, table: RowTable, num_tokens: int) -> Draft:
        expected = _expected(self._likelihood(row), num_tokens)
        return Draft(num_tokens=num_tokens, context=int(table.num_known[row]), expected=expected)

    def _likelihood(self, row: int) -> float:
        """Observed probability that a guessed token is right if those before it are; 1/2 before any observation."""
        if self._is_forced[row]:
            return 1.0
        return float((self._num_right[row] + 1) / (self._num_tried[row] + 2))

    def _rest(self, row: int, num_known: int) -> None:
        self._rests_until[row] = num_known + (1 << min(int(self._num_failed[row]), _MOST_DOUBLINGS))
        self._num_failed[row] += 1


def _expected(likelihood: float, num_tokens: int) -> float:
    """Expected number of accepted tokens of a draft: each counts only if all before it are right."""
    return sum(likelihood**place for place in range(1, num_tokens + 1))


def _shape_of(turn: Turn) -> BatchShape:
    """The sizes that the cost of a turn without drafts depends on."""
    is_decode = turn.num_pending == 1
    before, taken = turn.num_before[~is_decode], turn.num_taken[~is_decode]
    return BatchShape(
        num_tokens=int(turn.num_taken.sum()),
        num_decode_tokens=int(np.count_nonzero(is_decode)),
        decode_context=int((turn.num_before[is_decode] + 1).sum()),
        prefill_context=int((taken * before + taken * (taken + 1) // 2).sum()),
        prefill_kv_tokens=int((before + taken).sum()),
        num_sampled=int(np.count_nonzero(turn.num_taken == turn.num_pending)),
    )


def drafts_of(speculative: str | None, max_num_seqs: int, forced: ForcedRuns | None = None) -> Drafts:
    """The maker of drafts for the option `speculative` and a state table of `max_num_seqs` rows."""
    if speculative is None:
        return NoDrafts()
    return Drafter(read_speculation(speculative), max_num_seqs=max_num_seqs, forced=forced)


def most_draft_tokens(speculative: str | None, max_num_seqs: int) -> int:
    """Most draft tokens of a batch: rows with logits that are needed beside one per request."""
    return 0 if speculative is None else _most_tokens(read_speculation(speculative), max_num_seqs)


def _most_tokens(speculation: NgramSpeculation, max_num_seqs: int) -> int:
    return speculation.num_draft_tokens * min(max_num_seqs, MAX_DRAFTED_REQUESTS)
