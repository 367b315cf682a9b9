"""Who has a row: requests that join, leave and are sent back, with the pages and keys that go with the row.

The device is told of a request that joins with the first batch that has tokens of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanoflow.batch import Int64, Joined
from nanoflow.kvcache.pools import PagePools
from nanoflow.scheduler.class_lengths import ClassLengths
from nanoflow.scheduler.policies import Victim
from nanoflow.scheduler.results import SchedulerEvents
from nanoflow.scheduler.reuse import Candidate, PrefixReuse
from nanoflow.scheduler.rows import RowTable, stop_ids
from nanoflow.scheduler.waiting import WaitingQueue, WaitingRequest


class Tenancy:
    """Gives rows and takes them back.

    Args:
        rows, pages, waiting, reuse, lengths: The scheduler's.
        victim: Chooses who is sent back.
        vocab_size: Token ids are below it.

    Attributes:
        num_preemptions: Requests that were sent back since the start.
        num_background_preemptions: How many of them were background requests.
    """

    def __init__(
        self,
        *,
        rows: RowTable,
        pages: PagePools,
        waiting: WaitingQueue,
        reuse: PrefixReuse,
        lengths: ClassLengths,
        victim: Victim,
        vocab_size: int,
    ) -> None:
        self._rows, self._pages, self._waiting = rows, pages, waiting
        self._reuse, self._lengths, self._victim = reuse, lengths, victim
        self._vocab_size = vocab_size
        # By row: those that have joined and have not been in a batch.
        self._untold: dict[int, Joined] = {}
        self._events = SchedulerEvents()
        self.num_preemptions = self.num_background_preemptions = 0

    def join(self, candidates: Sequence[Candidate]) -> Int64:
        """Give these N candidates a row each and take them out of the queue; returns int64 [N]."""
        if not candidates:
            return np.zeros(0, dtype=np.int64)
        for candidate in candidates:
            self._waiting.discard(candidate.waiting.request.request_id)
        rows = self._rows.join(
            [candidate.waiting for candidate in candidates], [each.num_computed for each in candidates]
        )
        for row, candidate in zip(rows.tolist(), candidates, strict=True):
            self._reuse.join(row, candidate)
            self._untold[row] = self._joined(row, candidate.waiting)
            if not candidate.waiting.is_preempted:
                self._events.scheduled[candidate.waiting.request.request_id] = candidate.num_cached
        self._pages.slide(rows, self._rows.num_computed[rows])
        return rows

    def take_joined(self, rows: Int64) -> tuple[Joined, ...]:
        """What the device must know of those of these rows (int64 [N]) that are in a batch for the first time."""
        if not self._untold:
            return ()
        is_in_batch = np.zeros(len(self._rows.requests), dtype=np.bool_)
        is_in_batch[rows] = True
        return tuple(self._untold.pop(row) for row in [*self._untold] if is_in_batch[row])

    def release(self, rows: list[int]) -> list[tuple[bytes, ...]]:
        """Take rows and pages of requests at once (see the top of `scheduler.py` why that is safe).

        Returns:
            The keys of the full pages of each.
        """
        keys = [self._reuse.leave(row, self._rows) for row in rows]
        if rows:
            self._pages.release(np.array(rows, dtype=np.int64))
            self._rows.leave(rows)
        for row in rows:
            self._untold.pop(row, None)
        return keys

    def send_back(self) -> int:
        """Take a request's row and pages; it will get them back or recompute, and draw again what was on its way.

        Returns:
            The request's rank.
        """
        row = self._victim(self._rows, self._lengths)
        request = self._rows.tenant(row)
        token_ids = self._rows.known_tokens(row)
        (keys,) = self.release([row])
        self._waiting.push_front(
            WaitingRequest(request=request, token_ids=token_ids, page_keys=keys, is_preempted=True)
        )
        self._events.preempted.append(request.request_id)
        self.num_preemptions += 1
        self.num_background_preemptions += request.is_background
        self._lengths.observe_preemption(is_background=request.is_background)
        return request.rank

    def drain_events(self) -> SchedulerEvents:
        """Who has joined and who was sent back since the last call."""
        events, self._events = self._events, SchedulerEvents()
        return events

    def _joined(self, row: int, new: WaitingRequest) -> Joined:
        return Joined(
            row=row,
            params=new.request.params,
            seed=new.request.seed,
            token_ids=new.token_ids,
            num_prompt_tokens=len(new.request.prompt_token_ids),
            stop_token_ids=stop_ids(new.request, self._vocab_size),
            bad_word_ids=new.request.bad_word_ids,
            thinking=new.request.thinking,
        )
