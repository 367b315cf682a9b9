"""The state table: one row a running request, one numpy array a property.

What every iteration touches is a column, so that a thousand requests advance in a few vectorised operations. Rows know
tokens and lengths; they know nothing of pages (`kvcache/`), budgets or policy (`scheduler.py`).

A row counts its tokens three times: `num_known` have values on the host, `num_tokens` adds those that are being sampled
right now, `num_computed` are in the KV cache (or will be when the iterations on their way are done). With a draft
(`drafts.py`) several tokens of a row are being sampled at once; those that turn out wrong are taken back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from nanoflow.batch import Bool, Float64, Int32, Int64
from nanoflow.priorities import BATCH, rank_of
from nanoflow.request import Request
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.progress import Progress
from nanoflow.scheduler.waiting import WaitingRequest

# Of each request, in an array.
_NUM_STOP_IDS = 4


def stop_ids(request: Request, vocab_size: int) -> tuple[int, ...]:
    """Token ids that end a request: end of sequence (unless ignored), then its own stop tokens; such as there are."""
    end_of_sequence = () if request.params.ignore_eos else request.eos_token_ids
    wanted = (*end_of_sequence, *(request.params.stop_token_ids or ()))
    return tuple(token_id for token_id in wanted if 0 <= token_id < vocab_size)


class RowTable:
    """State of the running requests; R rows. All columns are int64 [R] unless stated.

    Attributes:
        order: int64 [num_running], the rows in use: those of lower rank first, of one rank in order of admission.
        num_interactive: How many of these, the first, have no background request.
        requests: The tenant of each row; None if it is free.
        request_id: Of the tenant.
        epoch: Which tenant of the row this is; grows whenever one leaves.
        num_prompt: Tokens of the prompt.
        num_sent: Tokens that the host sends when they are computed; further ones are on the device already. At first
            those that were known when the tenant joined: the prompt, and what a preemption left.
        num_known, num_tokens, num_computed: See above.
        min_total: Tokens before which nothing but an error ends the request.
        max_total: Tokens with which it ends.
        is_exact: bool [R], it will have `max_total` tokens, as end of sequence is ignored.
        is_scored: bool [R], log probabilities of its prompt are asked for.
        pooled_from: See `Request.pooled_from`.
        rank: Of the tenant; see `Request.rank`.
        arrival_s: float64 [R], when it came, on the monotonic clock.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        num_rows = limits.max_num_seqs
        self._limits = limits
        self._free = list(range(num_rows - 1, -1, -1))
        self._row_of: dict[int, int] = {}
        self.order: Int64 = np.zeros(0, dtype=np.int64)
        self.num_interactive = 0
        self.requests: list[Request | None] = [None] * num_rows
        self.request_id, self.epoch, self.num_prompt, self.num_sent = np.zeros((4, num_rows), dtype=np.int64)
        self.num_known, self.num_tokens, self.num_computed = np.zeros((3, num_rows), dtype=np.int64)
        self.min_total, self.max_total, self.pooled_from = np.zeros((3, num_rows), dtype=np.int64)
        self.is_exact, self.is_scored = np.zeros((2, num_rows), dtype=np.bool_)
        self.rank: Int64 = np.zeros(num_rows, dtype=np.int64)
        self.arrival_s: Float64 = np.zeros(num_rows)
        self._token_ids = np.zeros((num_rows, limits.max_model_len), dtype=np.int32)  # untouched zeros take no memory
        # Most requests have few; those of one with many stand apart, as every row pays for the size of this array.
        self._stop_ids = np.full((_NUM_STOP_IDS, num_rows), limits.vocab_size, dtype=np.int32)
        self._num_stop_ids = 0  # most in a column so far
        self._more_stop_ids: dict[int, Int32] = {}

    @property
    def num_running(self) -> int:
        """Rows in use."""
        return len(self.order)

    @property
    def num_free(self) -> int:
        """Rows not in use."""
        return len(self._free)

    def find(self, request_id: int) -> int | None:
        """The row of a request; None if it does not run."""
        return self._row_of.get(request_id)

    def tenant(self, row: int) -> Request:
        """The request in a row that is in use."""
        request = self.requests[row]
        if request is None:
            raise RuntimeError(f"row {row} is free")
        return request

    def join(self, newcomers: Sequence[WaitingRequest], num_computed: Sequence[int]) -> Int64:
        """Give each of these N requests a free row, int64 [N]; they become the newest of their rank, in this order.

        Args:
            newcomers: They.
            num_computed: Tokens of each that are in the cache already.
        """
        rows = np.array([self._free.pop() for _ in newcomers], dtype=np.int64)
        requests = [new.request for new in newcomers]
        num_prompt, num_known, max_tokens, min_tokens = np.array(
            [
                (len(r.prompt_token_ids), len(new.token_ids), r.max_tokens, r.params.min_tokens)
                for new, r in zip(newcomers, requests, strict=True)
            ],
            dtype=np.int64,
        ).T
        self.request_id[rows] = [request.request_id for request in requests]
        self.rank[rows] = [request.rank for request in requests]
        self.arrival_s[rows] = [request.arrival_s for request in requests]
        self._set_order(np.concatenate((self.order, rows)))
        self.num_prompt[rows] = num_prompt
        self.num_sent[rows] = self.num_known[rows] = self.num_tokens[rows] = num_known
        self.num_computed[rows] = num_computed
        # A grammar may end before `min_tokens`; until it must, the sampler draws no end of sequence before them.
        self.min_total[rows] = num_prompt + np.where([r.structured is None for r in requests], min_tokens, 0)
        self.max_total[rows] = np.minimum(num_prompt + max_tokens, self._limits.max_model_len)
        self.is_exact[rows] = [request.params.ignore_eos for request in requests]
        self.is_scored[rows] = [request.params.prompt_logprobs is not None for request in requests]
        self.pooled_from[rows] = [request.pooled_from for request in requests]
        self._stop_ids[:, rows] = self._limits.vocab_size  # no token has this id
        for row, new in zip(rows.tolist(), newcomers, strict=True):
            self._row_of[new.request.request_id] = row
            self.requests[row] = new.request
            self._token_ids[row, : len(new.token_ids)] = new.token_ids
            self._set_stop_ids(row, stop_ids(new.request, self._limits.vocab_size))
        return rows

    def leave(self, rows: list[int]) -> None:
        """Free these rows; what is still on its way for their tenants will be recognised by its epoch."""
        is_staying = np.ones(len(self.requests), dtype=np.bool_)
        is_staying[rows] = False
        self._set_order(self.order[is_staying[self.order]])
        self.epoch[rows] += 1
        for row in rows:
            del self._row_of[self.tenant(row).request_id]
            self.requests[row] = None
            self._more_stop_ids.pop(row, None)
        self._free.extend(rows)

    def behind(self, rows: Int64) -> Int64:
        """The rows in use that are less urgent than one of these (int64 [N])."""
        if len(rows) == 0 or self.rank[rows].min() == self.rank[self.order[-1]]:
            return rows[:0]
        return self.order[np.searchsorted(self.rank[self.order], self.rank[rows].min(), side="right") :]

    def num_pending(self, rows: Int64) -> Int64:
        """Tokens that are there and not computed, int64 [len(rows)]; a request's last token is never computed."""
        return np.minimum(self.num_tokens[rows], self.max_total[rows] - 1) - self.num_computed[rows]

    def ends(self, rows: Int64, token_ids: Int32, positions: Int32) -> tuple[Bool, Bool]:
        """Whether tokens (int32 [N]) at these positions (int32 [N]) end the requests of these rows (int64 [N]).

        Returns:
            Two bool [N]: the token ends its request as a stop token; the request has its length with it.
        """
        num_tokens = positions + 1
        is_stop = (self._stop_ids[: self._num_stop_ids, rows] == token_ids).any(axis=0)
        for row, ids in self._more_stop_ids.items():
            is_stop |= (rows == row) & np.isin(token_ids, ids)
        return is_stop & (num_tokens >= self.min_total[rows]), num_tokens == self.max_total[rows]

    def record(self, rows: Int64, token_ids: Int32, positions: Int32) -> None:
        """Take in sampled tokens (int32 [N]) of these rows (int64 [N]), at the positions (int32 [N]) that follow.

        A row may have several, one after the other, in the order of their positions.
        """
        self._token_ids[rows, positions] = token_ids
        is_followed = rows[1:] == rows[:-1]
        if is_followed.any():
            last = np.flatnonzero(np.append(~is_followed, True))
            rows, positions = rows[last], positions[last]
        self.num_known[rows] = positions + 1

    def guess(self, row: int, token_ids: Int32) -> None:
        """Note tokens that may follow the known ones of a row; what is recorded there takes their place."""
        start = self.num_known[row]
        self._token_ids[row, start : start + len(token_ids)] = token_ids

    def take_back(self, rows: Int64, counts: Int64) -> None:
        """Of the draws behind drafts of these rows (int64 [N], distinct) the last so many (int64 [N]) do not count.

        Which draw was the last to count is known here alone: the host sends the tokens up to it.
        """
        self.num_tokens[rows] -= counts
        self.num_computed[rows] -= counts
        self.num_sent[rows] = self.num_known[rows]

    def tokens_at(self, rows: Int64, positions: Int64) -> Int32:
        """Token `positions[i]` of row `rows[i]`, int32 [N]; any id where the value is not known yet."""
        places = rows * self._token_ids.shape[1] + positions
        return self._token_ids.reshape(-1).take(places)

    def known_tokens(self, row: int, start: int = 0, stop: int | None = None) -> Int32:
        """A copy of tokens start..stop-1 of a row, int32 [stop - start]; all known ones by default."""
        return self._token_ids[row, start : self.num_known[row] if stop is None else stop].copy()

    def known_view(self, row: int) -> Int32:
        """All known tokens of a row, int32 [num_known]: not a copy, and as it is until the next change."""
        return self._token_ids[row, : self.num_known[row]]

    def are_background(self, rows: Int64) -> Bool:
        """Whether these rows in use (int64 [N]) have background requests, bool [N]."""
        if self.num_interactive == len(self.order):
            return np.zeros(len(rows), dtype=np.bool_)
        found: Bool = self.rank[rows] == rank_of(BATCH)
        return found

    def progress(self, count: int | None = None) -> Progress:
        """Lengths of the running requests, or of the first so many of them, in their order."""
        order = self.order[:count]
        num_tokens = self.num_tokens[order]
        return Progress(
            num_tokens=num_tokens,
            num_generated=num_tokens - self.num_prompt[order],
            max_remaining=self.max_total[order] - num_tokens,
            is_exact=self.is_exact[order],
            is_background=self.are_background(order),
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError if the columns contradict each other."""
        rows, num_rows = self.order, len(self.requests)
        if sorted([*rows.tolist(), *self._free]) != list(range(num_rows)):
            raise RuntimeError(f"a row must be free or in use: in use {rows.tolist()}, free {self._free}")
        tenants = {request.request_id: row for row, request in enumerate(self.requests) if request is not None}
        if tenants != self._row_of or tenants != dict(zip(self.request_id[rows].tolist(), rows.tolist(), strict=True)):
            raise RuntimeError(f"rows and their tenants differ: {tenants}, {self._row_of}")
        if (np.diff(self.rank[rows]) < 0).any():
            raise RuntimeError("rows are not in the order of their ranks")
        counts = (self.num_computed, self.num_tokens, self.max_total)
        if any((low[rows] > high[rows]).any() for low, high in itertools.pairwise(counts)):
            raise RuntimeError("num_computed <= num_tokens <= max_total does not hold")
        if (self.num_known[rows] > self.num_tokens[rows]).any() or (self.num_sent > self.num_known)[rows].any():
            raise RuntimeError("num_sent <= num_known <= num_tokens does not hold")

    def _set_order(self, order: Int64) -> None:
        ranks = self.rank[order]
        if (ranks[1:] < ranks[:-1]).any():
            places = np.argsort(ranks, kind="stable")
            order, ranks = order[places], ranks[places]
        self.order, self.num_interactive = order, int(ranks.searchsorted(rank_of(BATCH)))

    def _set_stop_ids(self, row: int, ids: tuple[int, ...]) -> None:
        few, more = ids[:_NUM_STOP_IDS], ids[_NUM_STOP_IDS:]
        self._stop_ids[: len(few), row] = few
        self._num_stop_ids = max(self._num_stop_ids, len(few))
        if more:
            self._more_stop_ids[row] = np.array(more, dtype=np.int32)
