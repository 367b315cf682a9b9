"""Pages between host memory and disk: what is written ahead of need, and what is read for a load.

Pages that were saved to host memory are written to disk, the oldest first, when more than half of that memory is used,
when the engine is idle, and when it ends. So a page whose slot is needed is mostly on disk already, and its slot can be
taken at once. `lower_tiers.py` says what to read; the files are `kvcache/disk.py`'s.

The engine's loop never waits for the disk: a read that takes too long is given up, and to forget pages, which ends when
the disk has it, is left to a thread.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nanoflow.kvcache.disk import DiskCounts
from nanoflow.kvcache.host import HostPages
from nanoflow.kvcache.tier_counts import TierCounts

# Pages that are being written at once; the disk refuses more than its queue takes.
_MOST_WRITES = 64
_FLUSH_S = 20.0
# A page that is not read by then is computed.
_READ_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A page that is being read into a slot, and when it is given up."""

    key: bytes
    future: Future[bool]
    until_s: float


class Disk(Protocol):
    """What `DiskCopies` asks of `kvcache/disk.py`, and of what stands for it in simulated runs."""

    @property
    def counts(self) -> DiskCounts:
        """See `DiskTier`."""

    def contains(self, group: int, key: bytes) -> bool:
        """See `DiskTier`."""

    def write(self, group: int, key: bytes, data: NDArray[np.uint8]) -> Future[bool]:
        """See `DiskTier`."""

    def read(self, group: int, key: bytes, into: NDArray[np.uint8]) -> Future[bool]:
        """See `DiskTier`."""

    def forget(self, keys: Iterable[bytes]) -> None:
        """See `DiskTier`."""

    def forget_all(self) -> None:
        """See `DiskTier`."""

    def flush(self, within_s: float) -> None:
        """See `DiskTier`."""

    def close(self) -> None:
        """See `DiskTier`."""


class DiskCopies:
    """Reads and writes of slots of host memory.

    Args:
        disk: The files.
        memory: Host memory of each KV group, uint8 [slots, bytes of a page].
        page_size: Tokens a page.
        capacity_bytes: Most bytes of the files.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        disk: Disk,
        memory: Sequence[NDArray[np.uint8]],
        *,
        page_size: int,
        capacity_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._disk, self._memory = disk, tuple(memory)
        self._page_size, self._capacity_bytes = page_size, capacity_bytes
        self._clock = clock
        self._reads: dict[tuple[int, int], _Read] = {}
        # Reads that were given up: their slots belong to the disk until they end.
        self._late: list[tuple[int, int, Future[bool]]] = []
        self._writes: list[tuple[int, int, Future[bool]]] = []
        self._forgetter = ThreadPoolExecutor(1, "nanoflow-forget")
        # Keys that the disk does not know yet to be forgotten, counted; None stands for all keys.
        self._forgetting: Counter[bytes | None] = Counter()
        self._forgotten: deque[tuple[tuple[bytes | None, ...], Future[None]]] = deque()
        self._num_asked = self._num_found = 0

    @property
    def counts(self) -> Mapping[str, TierCounts]:
        """Of this tier, by its name."""
        counts = self._disk.counts
        return {
            "disk": TierCounts(
                queries=self._num_asked * self._page_size,
                hits=self._num_found * self._page_size,
                stored_bytes=counts.bytes_written,
                loaded_bytes=counts.bytes_read,
                load_seconds=counts.read_s,
                evictions=counts.num_evicted,
                capacity_bytes=self._capacity_bytes,
                used_bytes=counts.stored_bytes,
            )
        }

    def has(self, group: int, key: bytes) -> bool:
        """Whether a page can be read now."""
        if self._forgotten and (key in self._forgetting or None in self._forgetting):
            return False
        return self._disk.contains(group, key)

    def fetch(self, group: int, key: bytes, host: HostPages) -> int | None:
        """Read a page into a slot, which is held; None if all slots are. `outcome` says how it went."""
        self._num_asked += group == 0
        slot = host.take(key)
        if slot is not None:
            future = self._disk.read(group, key, self._memory[group][slot])
            self._reads[group, slot] = _Read(key=key, future=future, until_s=self._clock() + _READ_S)
        return slot

    def outcome(self, slots: Sequence[Sequence[int]], hosts: Sequence[HostPages]) -> bool | None:
        """Whether all these slots of each group have their pages; None while any is being read.

        Slots that were not read have theirs. Pages that could not be read are forgotten.
        """
        reads = [
            (group, slot) for group, of_group in enumerate(slots) for slot in of_group if (group, slot) in self._reads
        ]
        now_s = self._clock()
        if any(not self._reads[place].future.done() and now_s < self._reads[place].until_s for place in reads):
            return None
        is_there = True
        for place in reads:
            group, slot = place
            read = self._reads.pop(place)
            if not read.future.done():
                hosts[group].hold_slot(slot)
                self._late.append((group, slot, read.future))
            elif read.future.result():
                hosts[group].set_stored(slot)
                self._num_found += group == 0
                continue
            hosts[group].forget([read.key])
            is_there = False
        return is_there

    def forget(self, keys: Iterable[bytes]) -> None:
        """What is under these keys may be wrong."""
        forgotten = tuple(keys)
        self._forget(forgotten, lambda: self._disk.forget(forgotten))

    def forget_all(self) -> None:
        """Nothing is to be used again."""
        self._forget((None,), self._disk.forget_all)

    def advance(self, hosts: Sequence[HostPages], *, is_idle: bool = False) -> bool:
        """Note what has been written, and write more; True if anything is being written."""
        while self._forgotten and self._forgotten[0][1].done():
            self._forgetting -= Counter(self._forgotten.popleft()[0])
        late, self._late = self._late, []
        for group, slot, future in late:
            if future.done():
                hosts[group].release(slot)
            else:
                self._late.append((group, slot, future))
        writing, self._writes = self._writes, []
        for group, slot, future in writing:
            if future.done():
                # A page that the disk refused may go like one that it has: to wait would stop new pages instead.
                hosts[group].set_stored(slot)
                hosts[group].release(slot)
            else:
                self._writes.append((group, slot, future))
        for group, host in enumerate(hosts):
            if is_idle or 2 * host.num_used > host.num_slots:
                for key in host.oldest_new(_MOST_WRITES - len(self._writes)):
                    slot = host.hold(key)
                    self._writes.append((group, slot, self._disk.write(group, key, self._memory[group][slot])))
        return bool(self._writes)

    def close(self, hosts: Sequence[HostPages]) -> None:
        """Write what is not on disk, but for no longer than some seconds, and let go of the files."""
        until_s = time.monotonic() + _FLUSH_S
        while True:
            if not self.advance(hosts, is_idle=True) or time.monotonic() > until_s:
                break
            time.sleep(0.001)
        self._forgetter.shutdown(wait=not self._late, cancel_futures=False)
        self._disk.flush(max(until_s - time.monotonic(), 0.0))
        self._disk.close()

    def _forget(self, keys: tuple[bytes | None, ...], forget: Callable[[], None]) -> None:
        self._forgetting.update(keys)
        self._forgotten.append((keys, self._forgetter.submit(forget)))


class NoDisk:
    """There is no disk below."""

    counts: Mapping[str, TierCounts] = {}

    def has(self, group: int, key: bytes) -> bool:
        """See `DiskCopies`."""
        del group, key
        return False

    def fetch(self, group: int, key: bytes, host: HostPages) -> int | None:
        """See `DiskCopies`."""
        del group, key, host
        return None

    def outcome(self, slots: Sequence[Sequence[int]], hosts: Sequence[HostPages]) -> bool | None:
        """See `DiskCopies`."""
        del slots, hosts
        return True

    def forget(self, keys: Iterable[bytes]) -> None:
        """See `DiskCopies`."""

    def forget_all(self) -> None:
        """See `DiskCopies`."""

    def advance(self, hosts: Sequence[HostPages], *, is_idle: bool = False) -> bool:
        """See `DiskCopies`."""
        del hosts, is_idle
        return False

    def close(self, hosts: Sequence[HostPages]) -> None:
        """See `DiskCopies`."""
