"""A disk for KV pages on the simulated clock: which pages it has, and when a read or a write ends. No bytes.

It stands for `kvcache/disk.py`. Reads follow each other, and so do writes, each at one rate, as if neither disturbed
the other. The page that was used longest ago goes when there is no room.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from nanoflow.kvcache.disk import DiskCounts
from nanoflow.kvcache.segments import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Most bytes of all pages, and bytes/s of reads, and as many of writes."""

    capacity_bytes: int
    bytes_per_s: float


class SimulatedDisk:
    """Pages by group and key.

    Args:
        rates: Its size and speed.
        page_bytes: Bytes of a page of each group.
        clock: Simulated seconds.
    """

    def __init__(self, rates: DiskRates, page_bytes: Sequence[int], clock: Callable[[], float]) -> None:
        self.rates, self._page_bytes, self._clock = rates, tuple(page_bytes), clock
        self._pages: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        # Reads and writes: when each ends, and of which page it is.
        self._queues: dict[bool, deque[tuple[float, tuple[int, bytes], Future[bool]]]]
        self._queues = {is_write: deque() for is_write in (False, True)}
        self._free_at_s = dict.fromkeys((False, True), 0.0)
        self._busy_s = dict.fromkeys((False, True), 0.0)
        self._used_bytes = self._bytes_written = self._bytes_read = 0
        self._num_written = self._num_hits = self._num_misses = self._num_evicted = 0

    @property
    def next_end_s(self) -> float | None:
        """When the first of what is being read or written ends; None if nothing is."""
        return min((queue[0][0] for queue in self._queues.values() if queue), default=None)

    @property
    def counts(self) -> DiskCounts:
        """See `DiskTier`."""
        return DiskCounts(
            num_written=self._num_written,
            bytes_written=self._bytes_written,
            write_s=self._busy_s[True],
            num_hits=self._num_hits,
            bytes_read=self._bytes_read,
            read_s=self._busy_s[False],
            num_misses=self._num_misses,
            num_evicted=self._num_evicted,
            num_pages=len(self._pages),
            stored_bytes=self._used_bytes,
        )

    def contains(self, group: int, key: bytes) -> bool:
        """See `DiskTier`."""
        return (group, key) in self._pages

    def write(self, group: int, key: bytes, data: Bytes) -> Future[bool]:
        """See `DiskTier`; the page can be found once it is written."""
        del data
        return self._ask(group, key, is_write=True)

    def read(self, group: int, key: bytes, into: Bytes) -> Future[bool]:
        """See `DiskTier`."""
        del into
        return self._ask(group, key, is_write=False)

    def advance(self) -> None:
        """End all that ends by now."""
        while (next_s := self.next_end_s) is not None and next_s <= self._clock():
            is_write = min((queue[0][0], kind) for kind, queue in self._queues.items() if queue)[1]
            _, page, future = self._queues[is_write].popleft()
            if is_write:
                self._store(page)
            else:
                self._note_read(page)
            future.set_result(page in self._pages)

    def forget(self, keys: Iterable[bytes]) -> None:
        """See `DiskTier`."""
        for key in keys:
            for group in range(len(self._page_bytes)):
                if self._pages.pop((group, key), None) is not None:
                    self._used_bytes -= self._page_bytes[group]

    def forget_all(self) -> None:
        """See `DiskTier`."""
        self._pages.clear()
        self._used_bytes = 0

    def flush(self, within_s: float) -> None:
        """See `DiskTier`."""

    def close(self) -> None:
        """See `DiskTier`."""

    def _ask(self, group: int, key: bytes, *, is_write: bool) -> Future[bool]:
        time_s = self._page_bytes[group] / self.rates.bytes_per_s
        self._busy_s[is_write] += time_s
        end_s = self._free_at_s[is_write] = max(self._free_at_s[is_write], self._clock()) + time_s
        future = Future[bool]()
        self._queues[is_write].append((end_s, (group, key), future))
        return future

    def _note_read(self, page: tuple[int, bytes]) -> None:
        if page not in self._pages:
            self._num_misses += 1
            return
        self._num_hits += 1
        self._bytes_read += self._pages[page]
        self._pages.move_to_end(page)

    def _store(self, page: tuple[int, bytes]) -> None:
        size = self._page_bytes[page[0]]
        if page in self._pages or size > self.rates.capacity_bytes:
            return
        while self._used_bytes + size > self.rates.capacity_bytes:
            self._used_bytes -= self._pages.popitem(last=False)[1]
            self._num_evicted += 1
        self._num_written += 1
        self._bytes_written += size
        self._pages[page] = size
        self._used_bytes += size
