"""Copies of KV pages on the simulated clock: what the scheduler's tiers ask for, one after the other in each direction.

It is driven as `engine/copying.py` drives the device (`executor/page_copies.py`): copies begin behind the batches that
have been launched, run beside the next ones and slow them down a little, as they read the device's memory too. A batch
that writes to pages which are just being saved waits for that. Which pages are copied is decided by the real
`scheduler/lower_tiers.py`; the disk below is `disk.py`'s.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow.batch import Int32, NewPages
from nanoflow.graph.graph import OpGraph
from nanoflow.kvcache.host import HostPages
from nanoflow.kvcache.pools import PagePools
from nanoflow.profile.host_link import LinkRates, link_rates
from nanoflow.profile.table import Profile
from nanoflow.scheduler.disk_copies import DiskCopies, NoDisk
from nanoflow.scheduler.lower_tiers import LowerTiers
from nanoflow.scheduler.tiers import NoTiers, Tiers
from nanoflow.simulate.disk import DiskRates, SimulatedDisk

# How long a step waits at most for pages, and how often an idle engine looks after its disk; as the engine does.
_WAIT_S, _IDLE_S = 0.05, 0.001
_DTYPE_BYTES = 2
_UNUSED = LinkRates(link_bytes_per_s=1.0, memory_bytes_per_s=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BelowDevice:
    """What is below the KV pages of one GPU.

    Attributes:
        host_bytes: Host memory for pages; 0 for none, and then there is no disk either.
        page_bytes: Bytes of a page of each KV group.
        page_size: Tokens a page.
        rates: Of the copies.
        disk: Of the disk; None without.
    """

    host_bytes: int = 0
    page_bytes: tuple[int, ...] = ()
    page_size: int = 16
    rates: LinkRates = _UNUSED
    disk: DiskRates | None = None

    @staticmethod
    def of(profile: Profile, graph: OpGraph, *, host_gib: float, disk_gib: float, disk_gb_per_s: float) -> BelowDevice:
        """So much below the GPUs of a profile.

        Args:
            profile, graph: Where and what; the graph as one GPU sees it.
            host_gib, disk_gib: Of all GPUs that share the model, GiB; a disk needs host memory.
            disk_gb_per_s: Speed of the disk, GB/s.
        """
        share, page_size = 2**30 / profile.setup.num_gpus, profile.page_size
        disk = DiskRates(capacity_bytes=int(disk_gib * share), bytes_per_s=disk_gb_per_s * 1e9 / profile.setup.num_gpus)
        return BelowDevice(
            host_bytes=int(host_gib * share),
            page_bytes=tuple(group.bytes_per_token(_DTYPE_BYTES) * page_size for group in graph.kv_groups),
            page_size=page_size,
            rates=link_rates(profile, graph),
            disk=disk if disk_gib else None,
        )

    @property
    def num_slots(self) -> int:
        """Pages of each KV group in host memory."""
        return self.host_bytes // sum(self.page_bytes) if self.page_bytes else 0


class SimulatedCopies:
    """The copies of one replica.

    Args:
        below: What is below its pages.
        num_rows: Rows of the state table.
        clock: Simulated seconds.

    Attributes:
        num_loads: Loads that were taken so far.
    """

    def __init__(self, below: BelowDevice, num_rows: int, clock: Callable[[], float]) -> None:
        self._below, self._num_rows, self._clock = below, num_rows, clock
        self._disk = SimulatedDisk(below.disk, below.page_bytes, clock) if below.disk else None
        self._tiers: Tiers = NoTiers()
        self._free_at_s = dict.fromkeys((False, True), 0.0)
        # When they end, their number, and how long they take alone.
        self._pending: list[tuple[float, int, float]] = []
        self._saving: deque[tuple[float, tuple[Int32, ...]]] = deque()
        self._num_bytes_beside = 0
        self.num_loads = 0

    def make_tiers(self, pools: PagePools) -> Tiers:
        """The real tiers, on the simulated clock."""
        below = self._below
        if below.num_slots:
            hosts = [HostPages(below.num_slots, has_disk=self._disk is not None) for _ in below.page_bytes]
            self._tiers = LowerTiers(
                pools,
                hosts,
                page_bytes=below.page_bytes,
                page_size=below.page_size,
                disk=self._disk_copies(),
                clock=self._clock,
            )
        return self._tiers

    def collect(self) -> None:
        """Tell the tiers which copies have ended by now."""
        while self._pending and self._pending[0][0] <= self._clock():
            _, number, time_s = heapq.heappop(self._pending)
            self._tiers.note_copied(number, time_s)
        if self._disk is not None:
            self._disk.advance()

    def issue(self, behind_s: float) -> None:
        """Begin what is to be copied now, behind the batches that have been launched, the last of which ends then."""
        for copies in self._tiers.take_copies():
            num_bytes = copies.num_bytes(self._below.page_bytes)
            # What is loaded may just be being saved.
            free_at_s = max(self._free_at_s.values()) if copies.is_load else self._free_at_s[False]
            time_s = num_bytes / self._below.rates.link_bytes_per_s
            end_s = self._free_at_s[copies.is_load] = max(self._clock(), behind_s, free_at_s) + time_s
            heapq.heappush(self._pending, (end_s, copies.number, time_s))
            if copies.is_load:
                self.num_loads += 1
            else:
                self._saving.append((end_s, copies.pages))
            self._num_bytes_beside += num_bytes

    def slowdown_s(self) -> float:
        """By how much the copies that were begun since the last call lengthen the next iteration."""
        num_bytes, self._num_bytes_beside = self._num_bytes_beside, 0
        return self._below.rates.slowdown_s(num_bytes)

    def writable_s(self, new_pages: NewPages) -> float:
        """When a batch may begin to write to these pages: once they have been saved."""
        while self._saving and self._saving[0][0] <= self._clock():
            self._saving.popleft()
        if not self._saving:
            return 0.0
        group_of = new_pages.rows // self._num_rows
        groups = [new_pages.pages[group_of == group] for group in range(len(self._below.page_bytes))]
        return max(
            (end_s for end_s, saved in self._saving if _overlap(groups, saved)),
            default=0.0,
        )

    def wait_s(self) -> float:
        """The time until when a step waits that can compute nothing before pages have been loaded.

        Raises:
            RuntimeError: Nothing is on its way.
        """
        ends_s = self._ends_s()
        if not ends_s:
            raise RuntimeError("requests wait and nothing is being computed or copied")
        return max(self._clock(), min(*ends_s, self._clock() + _WAIT_S))

    def idle(self, until_s: float) -> float | None:
        """There are no requests: keep more in lower tiers. The next time when there is something to do before then."""
        self.collect()
        self.issue(self._clock())
        self._tiers.idle()
        ends_s = self._ends_s()
        next_s = max(min(ends_s), self._clock() + _IDLE_S) if ends_s else until_s
        return next_s if next_s < until_s else None

    def _ends_s(self) -> list[float]:
        disk_s = self._disk.next_end_s if self._disk is not None else None
        return [end_s for end_s in (self._pending[0][0] if self._pending else None, disk_s) if end_s is not None]

    def _disk_copies(self) -> DiskCopies | NoDisk:
        if self._disk is None:
            return NoDisk()
        # Bytes of pages are nowhere.
        memory = [np.empty((self._below.num_slots, 0), dtype=np.uint8) for _ in self._below.page_bytes]
        return DiskCopies(
            self._disk,
            memory,
            page_size=self._below.page_size,
            capacity_bytes=self._disk.rates.capacity_bytes,
            clock=self._clock,
        )


def _overlap(groups: Sequence[Int32], saved: Sequence[Int32]) -> bool:
    return any(np.isin(new, pages).any() for new, pages in zip(groups, saved, strict=True))
