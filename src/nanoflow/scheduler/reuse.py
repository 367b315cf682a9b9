"""Prefixes that need not be computed again: which pages a request finds, and which pages of it others may find.

A request has a key for each page that its tokens fill (`kvcache/keys.py`). When it gets a row, it takes the cached
pages of its first keys and starts behind them. Its own pages are cached as they are computed: those of its prompt once
a batch with them has been formed, for batches run in that order; those of its completion when it leaves.

A request whose next pages are just being computed for another one waits until they are there: so of several requests
with the same prompt, or with the same long beginning, one computes it. It also waits while its next pages are loaded
from a lower tier (`tiers.py`), which is told here of all pages that are computed. Knows neither budgets nor the queue
(`scheduler.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow.batch import Int64
from nanoflow.kvcache.keys import KEY_BYTES, page_keys
from nanoflow.kvcache.pools import CachedPrefix, PagePools
from nanoflow.scheduler.key_events import KeyEvents, NoKeyEvents
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.rows import RowTable
from nanoflow.scheduler.sessions import Sessions
from nanoflow.scheduler.tiers import Below, NoTiers, Tiers
from nanoflow.scheduler.waiting import WaitingRequest

# A request waits for another's pages if there are so many: for fewer tokens it is not worth an iteration.
_LEAST_AWAITED = 4
_UNBOUNDED = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A waiting request that could get a row.

    Attributes:
        waiting: It.
        prefix: Its pages that are cached now.
        num_cached: Tokens in these pages.
        num_loadable: Pages of its prefix that the device could have after a load from a lower tier; 0 if none is worth
            it.
    """

    waiting: WaitingRequest
    prefix: CachedPrefix
    num_cached: int
    num_loadable: int = 0

    @property
    def num_computed(self) -> int:
        """Tokens of it that need not be computed."""
        return max(self.num_cached, self.waiting.num_computed)


def loads_for_all(tiers: Tiers, waiting: WaitingRequest, keys: Sequence[bytes], num_cached: int) -> Below:
    """What lower tiers have of the prefix of a waiting request, of which the device has `num_cached` pages."""
    del waiting
    return tiers.find(keys, num_cached)


def without_loads(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those for which nothing is to be loaded."""
    return [each for each in candidates if not each.num_loadable]


@dataclass(frozen=True, slots=True, kw_only=True)
class Queueing:
    """Who waits for pages, and who overtakes those that do.

    Attributes:
        below: What lower tiers are asked for a waiting request; see `loads_for_all`.
        ready: Those of the candidates that join before the pages of the others are loaded.
        most_passed: So many that wait are passed over in an iteration at most.
    """

    below: Callable[[Tiers, WaitingRequest, Sequence[bytes], int], Below] = loads_for_all
    ready: Callable[[Sequence[Candidate]], list[Candidate]] = without_loads
    most_passed: int = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseCounts:
    """Since the start, in tokens.

    Attributes:
        num_asked: Tokens of requests that looked for a cached prefix.
        num_found: Those of them that had one.
    """

    num_asked: int = 0
    num_found: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchAnswer:
    """What is there of a prefix that a request will soon need.

    Attributes:
        num_cached_pages: Its first pages, which the device has: the request will find them.
        num_prefetched_pages: Pages behind these that were asked for from lower tiers.
    """

    num_cached_pages: int
    num_prefetched_pages: int = 0


class PrefixReuse:
    """Cached prefixes of running requests.

    Args:
        pools: Pages of all rows.
        limits: Sizes.
        events: Is told which pages are cached.
        tiers: What is below the device.
        queueing: Who waits for their pages.

    Attributes:
        sessions: The keys that the last request of each session has left.
        counts: Tokens that were looked for, and found.
    """

    def __init__(
        self,
        pools: PagePools,
        limits: SchedulerLimits,
        events: KeyEvents | NoKeyEvents,
        tiers: Tiers | None = None,
        queueing: Queueing | None = None,
    ) -> None:
        self._pools = pools
        self._queueing = queueing or Queueing()
        self._tiers = tiers or NoTiers()
        self._tiers.watch(events)
        self._page_size = limits.page_size
        self._events = events
        self.sessions = Sessions(limits.max_sessions)
        num_rows = limits.max_num_seqs
        self._root = [b""] * num_rows
        self._keys: list[list[bytes]] = [[] for _ in range(num_rows)]
        # Keys of each row in all; of these, the first so many have been computed.
        self._num_keys, self._num_cached = np.zeros((2, num_rows), dtype=np.int64)
        self._row_computing: dict[bytes, int] = {}
        self._background_rows: set[int] = set()
        self.counts = ReuseCounts()

    def candidates(
        self,
        queue: Iterable[WaitingRequest],
        *,
        max_requests: int,
        max_tokens: int,
        not_loaded: Container[int] = (),
    ) -> list[Candidate]:
        """The first requests of the queue that can each start on a budget of `max_tokens`, the last maybe in part.

        Those whose next pages are being loaded, or computed for another one, or would be for one of these, are passed
        over.

        Args:
            queue: The first come first.
            max_requests: Most candidates.
            max_tokens: That they compute now.
            not_loaded: Ids of requests whose prefix cannot be loaded: they compute it.
        """
        found: list[Candidate] = []
        claimed: set[bytes] = set()
        num_passed_over = 0
        for waiting in queue:
            if len(found) == max_requests or max_tokens <= 0 or num_passed_over > self._queueing.most_passed:
                break
            most_pages = self._most_pages(waiting)
            prefix = self._pools.find(waiting.page_keys[:most_pages])
            following = waiting.page_keys[prefix.num_pages :]
            awaited = following[: min(_LEAST_AWAITED, most_pages)]
            below = self._queueing.below(self._tiers, waiting, waiting.page_keys[:most_pages], prefix.num_pages)
            is_computing = len(awaited) == _LEAST_AWAITED and all(
                key in claimed or self._is_computed_for(waiting, key) for key in awaited
            )
            if is_computing or below.is_loading:
                num_passed_over += 1
                continue
            claimed.update(following)
            num_loadable = 0 if waiting.request.request_id in not_loaded else below.num_pages
            candidate = Candidate(
                waiting=waiting,
                prefix=prefix,
                num_cached=prefix.num_pages * self._page_size,
                num_loadable=num_loadable,
            )
            found.append(candidate)
            max_tokens -= len(waiting.token_ids) - max(candidate.num_computed, num_loadable * self._page_size)
        return found

    def next_to_load(self, queue: Iterable[WaitingRequest], count: int) -> list[Candidate]:
        """Those of the first `count` requests of the queue that a load would help, and for which none is under way."""
        if not self._tiers.is_on:
            return []
        first = self.candidates(queue, max_requests=count, max_tokens=_UNBOUNDED)
        return [candidate for candidate in first if candidate.num_loadable]

    def start_load(self, candidate: Candidate, num_spare: int) -> bool:
        """Load what a candidate lacks, unless that has begun; False if it is not there, or no room is."""
        return self._tiers.start_load(candidate.waiting.page_keys[: candidate.num_loadable], num_spare)

    def _is_computed_for(self, waiting: WaitingRequest, key: bytes) -> bool:
        """Whether a request may wait for this page: an interactive one waits for no background request."""
        row = self._row_computing.get(key)
        return row is not None and (waiting.request.is_background or row not in self._background_rows)

    def _most_pages(self, waiting: WaitingRequest) -> int:
        """Pages that a request may find: at least its last token is computed."""
        return 0 if waiting.request.computes_whole_prompt else (len(waiting.token_ids) - 1) // self._page_size

    def join(self, row: int, candidate: Candidate) -> None:
        """A candidate has got a row, which holds no pages yet: it gets those of its cached prefix."""
        keys, num_pages = list(candidate.waiting.page_keys), candidate.prefix.num_pages
        self._root[row], self._keys[row] = candidate.waiting.request.page_keys[:KEY_BYTES], keys
        self._num_keys[row], self._num_cached[row] = len(keys), num_pages
        self._pools.adopt(row, candidate.prefix)
        is_background = candidate.waiting.request.is_background
        if is_background:
            self._background_rows.add(row)
        for key in keys[num_pages:]:
            first = self._row_computing.setdefault(key, row)
            if first in self._background_rows and not is_background:
                self._row_computing[key] = row
        if self._root[row] and not candidate.waiting.request.computes_whole_prompt:
            self.counts = ReuseCounts(
                num_asked=self.counts.num_asked + len(candidate.waiting.token_ids),
                num_found=self.counts.num_found + candidate.num_cached,
            )

    def prefetch(self, keys: Sequence[bytes], num_spare: int = 0) -> PrefetchAnswer:
        """A request with these keys will come soon: its cached pages count as used now, lower tiers may bring others.

        Nothing is computed, and the counts of requests stay as they are.

        Args:
            keys: Of its pages.
            num_spare: Pages of each pool that running requests may need; others are filled with what is loaded.
        """
        prefix = self._pools.find(keys)
        self._pools.touch(prefix)
        below = self._tiers.find(keys, prefix.num_pages)
        is_asked = below.num_pages > 0 and self._tiers.start_load(keys[: below.num_pages], num_spare)
        return PrefetchAnswer(
            num_cached_pages=prefix.num_pages,
            num_prefetched_pages=below.num_pages - prefix.num_pages if is_asked else 0,
        )

    def note_computed(self, rows: Int64, num_computed: Int64) -> None:
        """A batch has been formed with which these rows (int64 [N]) have so many tokens computed (int64 [N])."""
        num_full = np.minimum(num_computed // self._page_size, self._num_keys[rows])
        for index in np.flatnonzero(num_full > self._num_cached[rows]).tolist():
            self._cache(int(rows[index]), int(num_full[index]), is_computed=False)

    def note_known(self, rows: Int64, table: RowTable) -> None:
        """Rows (int64 [N]) have got tokens: pages of completions that are full now are saved at once to lower tiers."""
        if not self._tiers.is_on:
            return
        num_full = np.minimum(table.num_known[rows], table.num_computed[rows]) // self._page_size
        for index in np.flatnonzero(num_full > self._num_keys[rows]).tolist():
            row, stop = int(rows[index]), int(num_full[index])
            keys, root = self._keys[row], self._root[row]
            if root:
                known = table.known_view(row)[len(keys) * self._page_size : stop * self._page_size]
                keys += page_keys(known, self._page_size, keys[-1] if keys else root)
                self._num_keys[row] = stop
                self._cache(row, stop)

    def leave(self, row: int, table: RowTable) -> tuple[bytes, ...]:
        """The request of a row goes, and its pages are about to be released: cache those that are full.

        Returns:
            The keys of these.
        """
        keys, root = self._keys[row], self._root[row]
        if root:
            known = table.known_view(row)[: table.num_computed[row]]
            keys += page_keys(known[len(keys) * self._page_size :], self._page_size, keys[-1] if keys else root)
            self._cache(row, len(known) // self._page_size)
            self.sessions.remember(table.tenant(row).session, keys, int(table.num_known[row]))
            self._tiers.use(keys)
        return self._clear(row)

    def fail(self, row: int) -> None:
        """What was computed for the request of a row may be wrong: nobody else may use it."""
        keys = self._clear(row)
        self._pools.forget(keys)
        self._tiers.forget(keys)

    def _cache(self, row: int, stop: int, *, is_computed: bool = True) -> None:
        start, keys = int(self._num_cached[row]), self._keys[row]
        if stop > start:
            parts = self._pools.cache(row, start, keys[start:stop])
            self._tiers.save(keys[start:stop], parts, is_computed=is_computed)
            self._events.cached(row, start, keys[start - 1] if start else self._root[row], keys[start:stop])
            self._num_cached[row] = stop
            self._forget_computing(row, keys[start:stop])

    def _forget_computing(self, row: int, keys: Sequence[bytes]) -> None:
        for key in keys:
            if self._row_computing.get(key) == row:
                del self._row_computing[key]

    def _clear(self, row: int) -> tuple[bytes, ...]:
        keys = tuple(self._keys[row])
        self._forget_computing(row, keys[int(self._num_cached[row]) :])
        self._background_rows.discard(row)
        self._root[row], self._keys[row] = b"", []
        self._num_keys[row] = self._num_cached[row] = 0
        return keys
