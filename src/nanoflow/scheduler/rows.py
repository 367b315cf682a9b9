"""The state table: one row a running request, one numpy array a property.

What every iteration touches is a column, so that a thousand requests advance in a few vectorised operations. Rows know
tokens and lengths; they know nothing of pages (`kvcache/`), budgets or policy (`scheduler.py`).

A row counts its tokens three times: `num_known` have values on the host, `num_tokens` adds those that are being sampled
right now, `num_computed` are in the KV cache (or will be when the iterations on their way are done).
"""

from __future__ import annotations

import itertools

import numpy as np

from nanoflow.batch import Bool, Int32, Int64
from nanoflow.request import Request
from nanoflow.scheduler.admission import Progress
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.waiting import WaitingRequest


def stop_ids(request: Request) -> tuple[int, ...]:
    """Token ids that end a request: end of sequence (unless ignored), then its own stop tokens."""
    end_of_sequence = () if request.params.ignore_eos else request.eos_token_ids
    return (*end_of_sequence, *(request.params.stop_token_ids or ()))


class RowTable:
    """State of the running requests; R rows. All columns are int64 [R] unless stated.

    Attributes:
        order: int64 [num_running], the rows in use, in order of admission, oldest first.
        requests: The tenant of each row; None if it is free.
        request_id: Of the tenant.
        epoch: Which tenant of the row this is; grows whenever one leaves.
        num_prompt: Tokens of the prompt.
        num_joined: Tokens that were known when the tenant joined: the prompt, and what a preemption left.
        num_known, num_tokens, num_computed: See above.
        min_total: Tokens before which nothing but an error ends the request.
        max_total: Tokens with which it ends.
        is_exact: bool [R], it will have `max_total` tokens, as end of sequence is ignored.
        is_scored: bool [R], log probabilities of its prompt are asked for.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        num_rows = limits.max_num_seqs
        self._limits = limits
        self._free = list(range(num_rows - 1, -1, -1))
        self._row_of: dict[int, int] = {}
        self.order: Int64 = np.zeros(0, dtype=np.int64)
        self.requests: list[Request | None] = [None] * num_rows
        self.request_id, self.epoch, self.num_prompt, self.num_joined = np.zeros((4, num_rows), dtype=np.int64)
        self.num_known, self.num_tokens, self.num_computed = np.zeros((3, num_rows), dtype=np.int64)
        self.min_total, self.max_total = np.zeros((2, num_rows), dtype=np.int64)
        self.is_exact, self.is_scored = np.zeros((2, num_rows), dtype=np.bool_)
        self._token_ids = np.zeros((num_rows, limits.max_model_len), dtype=np.int32)  # untouched zeros take no memory
        self._stop_ids = np.zeros((num_rows, 0), dtype=np.int32)

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

    def join(self, waiting: WaitingRequest) -> int:
        """Give a request a free row; it becomes the newest."""
        row = self._free.pop()
        request, num_known = waiting.request, len(waiting.token_ids)
        num_prompt = num_known - waiting.num_generated
        self._row_of[request.request_id] = row
        self.order = np.append(self.order, row)
        self.requests[row] = request
        self.request_id[row] = request.request_id
        self.num_prompt[row] = num_prompt
        self.num_joined[row] = self.num_known[row] = self.num_tokens[row] = num_known
        self.num_computed[row] = waiting.num_computed
        self.min_total[row] = num_prompt + request.params.min_tokens
        self.max_total[row] = min(num_prompt + request.max_tokens, self._limits.max_model_len)
        self.is_exact[row] = request.params.ignore_eos
        self.is_scored[row] = request.params.prompt_logprobs is not None
        self._token_ids[row, :num_known] = waiting.token_ids
        self._set_stop_ids(row, stop_ids(request))
        return row

    def leave(self, rows: list[int]) -> None:
        """Free these rows; what is still on its way for their tenants will be recognised by its epoch."""
        is_staying = np.ones(len(self.requests), dtype=np.bool_)
        is_staying[rows] = False
        self.order = self.order[is_staying[self.order]]
        self.epoch[rows] += 1
        for row in rows:
            del self._row_of[self.tenant(row).request_id]
            self.requests[row] = None
        self._free.extend(rows)

    def num_pending(self, rows: Int64) -> Int64:
        """Tokens that are there and not computed, int64 [len(rows)]; a request's last token is never computed."""
        return np.minimum(self.num_tokens[rows], self.max_total[rows] - 1) - self.num_computed[rows]

    def record(self, rows: Int64, token_ids: Int32) -> tuple[Bool, Bool]:
        """Append one sampled token (int32 [N]) to each of these rows (int64 [N], distinct).

        Returns:
            Two bool [N]: the token ends its request as a stop token; the request has reached its length.
        """
        self._token_ids[rows, self.num_known[rows]] = token_ids
        self.num_known[rows] += 1
        num_known = self.num_known[rows]
        is_stop = (self._stop_ids[rows] == token_ids[:, None]).any(axis=1) & (num_known >= self.min_total[rows])
        return is_stop, num_known == self.max_total[rows]

    def tokens_at(self, rows: Int64, positions: Int64) -> Int32:
        """Token `positions[i]` of row `rows[i]`, int32 [N]; any id where the value is not known yet."""
        return self._token_ids[rows, positions]

    def known_tokens(self, row: int, start: int = 0, stop: int | None = None) -> Int32:
        """A copy of tokens start..stop-1 of a row, int32 [stop - start]; all known ones by default."""
        return self._token_ids[row, start : self.num_known[row] if stop is None else stop].copy()

    def progress(self) -> Progress:
        """Lengths of the running requests, oldest first."""
        num_tokens = self.num_tokens[self.order]
        return Progress(
            num_tokens=num_tokens,
            num_generated=num_tokens - self.num_prompt[self.order],
            max_remaining=self.max_total[self.order] - num_tokens,
            is_exact=self.is_exact[self.order],
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError if the columns contradict each other."""
        rows, num_rows = self.order, len(self.requests)
        if sorted([*rows.tolist(), *self._free]) != list(range(num_rows)):
            raise RuntimeError(f"a row must be free or in use: in use {rows.tolist()}, free {self._free}")
        tenants = {request.request_id: row for row, request in enumerate(self.requests) if request is not None}
        if tenants != self._row_of or tenants != dict(zip(self.request_id[rows].tolist(), rows.tolist(), strict=True)):
            raise RuntimeError(f"rows and their tenants differ: {tenants}, {self._row_of}")
        counts = (self.num_computed, self.num_tokens, self.max_total)
        if any((low[rows] > high[rows]).any() for low, high in itertools.pairwise(counts)):
            raise RuntimeError("num_computed <= num_tokens <= max_total does not hold")
        if (self.num_known[rows] > self.num_tokens[rows]).any() or (self.num_joined > self.num_known)[rows].any():
            raise RuntimeError("num_joined <= num_known <= num_tokens does not hold")

    def _set_stop_ids(self, row: int, ids: tuple[int, ...]) -> None:
        num_missing = len(ids) - self._stop_ids.shape[1]
        if num_missing > 0:
            self._stop_ids = np.pad(self._stop_ids, ((0, 0), (0, num_missing)), constant_values=self._limits.vocab_size)
        self._stop_ids[row] = self._limits.vocab_size  # no token has this id
        self._stop_ids[row, : len(ids)] = ids
