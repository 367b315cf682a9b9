"""KV pages below the device: which are saved to host memory and to disk, and which are loaded back for whom.

Every page whose content is known is saved right after it was computed. So memory on the device can be taken at any time
and nothing is lost: neither the prefix of the next round of a conversation, nor what a preempted request has computed.
A request in the queue whose prefix is below is passed over while its pages are loaded. Then it finds them on the device
like any other cached pages. It does not wait where computing is faster (`load_gain.py`).

`take_copies` says what to copy, and `note_copied` hears that it is done. In between copies are data
(`kvcache/copies.py`); `executor/page_copies.py` makes them. `joining.py` asks for loads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from nanoflow.batch import Int32
from nanoflow.kvcache.copies import PageCopies
from nanoflow.kvcache.host import HostPages
from nanoflow.kvcache.pools import PagePools
from nanoflow.kvcache.tier_counts import TierCounts
from nanoflow.scheduler.disk_copies import DiskCopies, NoDisk
from nanoflow.scheduler.key_events import KeyEvents, NoKeyEvents
from nanoflow.scheduler.load_gain import LoadGain
from nanoflow.scheduler.loads import Attempts, Load, Saves
from nanoflow.scheduler.tiers import NOTHING, Below

# Fewer pages are computed: a copy of little takes as long as one of more.
_LEAST_PAGES = 4
# So many pages fewer are tried if pages of a longer prefix are missing in some group.
_MOST_TRIES = 4


class LowerTiers:
    """Host memory, and a disk below it if there is one.

    Args:
        pools: Pages of the device.
        host: Slots of host memory of each KV group.
        page_bytes: Bytes of a page of each group.
        page_size: Tokens a page.
        disk: What is below.
        num_ready: For each group how many slots, from the first, can be used by now; all if not given.
        clock: Seconds, monotonic.
    """

    is_on = True

    def __init__(
        self,
        pools: PagePools,
        host: Sequence[HostPages],
        *,
        page_bytes: Sequence[int],
        page_size: int,
        disk: DiskCopies | NoDisk | None = None,
        num_ready: Callable[[], Sequence[int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pools, self._host, self._disk = pools, tuple(host), disk or NoDisk()
        self._page_bytes, self._page_size = tuple(page_bytes), page_size
        self._num_ready = num_ready or (lambda: [pages.num_slots for pages in self._host])
        self._clock = clock
        self._gain = LoadGain(clock)
        self._numbers = itertools.count()
        # Pages that are computed, and those of the batch that is being formed: they can be saved after it.
        self._saves, self._later = self._no_saves(), self._no_saves()
        # Copies that were taken and are not done: slots of each group to release, or the load.
        self._saving: dict[int, list[list[int]]] = {}
        self._copying: dict[int, Load] = {}
        # Loads that wait for the disk, then those that can be copied.
        self._reading: list[Load] = []
        self._ready: list[Load] = []
        self._on_their_way: dict[bytes, Load] = {}
        self._attempts = Attempts()
        self._num_asked = self._num_found = self._stored_bytes = self._loaded_bytes = 0
        self._load_s = 0.0
        self._events: KeyEvents | NoKeyEvents = NoKeyEvents()
        self._add_slots()

    @property
    def is_loading(self) -> bool:
        """See `Tiers`."""
        return bool(self._reading or self._ready or self._copying)

    @property
    def counts(self) -> Mapping[str, TierCounts]:
        """See `Tiers`."""
        sizes = list(zip(self._host, self._page_bytes, strict=True))
        host = TierCounts(
            queries=self._num_asked,
            hits=self._num_found,
            stored_bytes=self._stored_bytes,
            loaded_bytes=self._loaded_bytes,
            load_seconds=self._load_s,
            evictions=sum(pages.num_evicted for pages in self._host),
            losses=sum(pages.num_lost for pages in self._host),
            capacity_bytes=sum(pages.num_slots * size for pages, size in sizes),
            used_bytes=sum(pages.num_used * size for pages, size in sizes),
        )
        return {"host": host, **self._disk.counts}

    def save(self, keys: Sequence[bytes], parts: Sequence[tuple[int, Int32]], *, is_computed: bool) -> None:
        """See `Tiers`."""
        for group, (begin, pages) in enumerate(parts):
            host, saves = self._host[group], (self._saves if is_computed else self._later)[group]
            for page, key in zip(pages.tolist(), keys[begin:], strict=False):
                if key in host:
                    continue
                slot = host.take(key)
                if slot is not None:
                    saves.pages.append(page)
                    saves.slots.append(slot)

    def find(self, keys: Sequence[bytes], num_cached: int) -> Below:
        """See `Tiers`."""
        if num_cached >= len(keys):
            return NOTHING
        if keys[num_cached] in self._on_their_way:
            return Below(is_loading=True)
        most = num_cached + self._num_below(keys[num_cached:])
        # Groups with windows may lack pages that the first group has.
        for stop in range(most, max(num_cached + _LEAST_PAGES, most - _MOST_TRIES) - 1, -1):
            missing = self._missing(keys[:stop])
            if missing is not None:
                break
        else:
            return NOTHING
        if any(key in self._on_their_way for group in missing for key in group):
            return Below(is_loading=True)
        if self._attempts.are_over(keys[stop - 1]):
            return NOTHING
        num_bytes, disk_bytes = self._num_bytes(missing), self._num_bytes(self._not_in_host(missing))
        if not self._gain.is_worth((stop - num_cached) * self._page_size, num_bytes - disk_bytes, disk_bytes):
            return NOTHING
        return Below(num_pages=stop)

    def start_load(self, keys: Sequence[bytes], num_spare: int) -> bool:
        """See `Tiers`."""
        prefix = self._pools.find(keys)
        missing = self._missing(keys)
        if missing is None or not any(missing):
            return False
        if any(key in self._on_their_way for key in itertools.chain(*missing)):
            return True
        pages = self._pools.reserve_beside(keys, [len(group) for group in missing], num_spare)
        if pages is None:
            return False
        disk_bytes = self._num_bytes(self._not_in_host(missing))
        slots = self._hold_slots(missing)
        if slots is None:
            for pool, of_pool in zip(self._pools.pools, pages, strict=True):
                pool.cancel(of_pool)
            return False
        load = Load(
            keys=missing,
            pages=pages,
            slots=slots,
            num_tokens=(len(keys) - prefix.num_pages) * self._page_size,
            disk_bytes=disk_bytes,
            start_s=self._clock(),
        )
        self._attempts.note(keys[-1])
        self._num_asked += load.num_tokens
        for key in itertools.chain(*missing):
            self._on_their_way[key] = load
        self._reading.append(load)
        return True

    def use(self, keys: Sequence[bytes]) -> None:
        """See `Tiers`."""
        for host in self._host:
            host.use(reversed(keys))
        self._attempts.forget(keys)

    def forget(self, keys: Iterable[bytes]) -> None:
        """See `Tiers`."""
        forgotten = list(keys)
        for key in forgotten:
            if key in self._on_their_way:
                self._on_their_way[key].is_void = True
        for host in self._host:
            host.forget(forgotten)
        self._disk.forget(forgotten)

    def forget_all(self) -> None:
        """See `Tiers`."""
        for load in self._on_their_way.values():
            load.is_void = True
        for host in self._host:
            host.forget_all()
        self._disk.forget_all()

    def watch(self, events: KeyEvents | NoKeyEvents) -> None:
        """See `Tiers`. As on the device, the first KV group stands for all."""
        self._events, self._host[0].watch = events, events.of_host

    def note_iteration(self, num_tokens: int, time_s: float) -> None:
        """See `Tiers`."""
        self._gain.note_iteration(num_tokens, time_s)

    def take_copies(self) -> Sequence[PageCopies]:
        """See `Tiers`."""
        self._add_slots()
        self._disk.advance(self._host)
        self._end_reading()
        taken = []
        if any(saves.pages for saves in self._saves):
            taken.append(self._copies([saves.pages for saves in self._saves], [saves.slots for saves in self._saves]))
            self._saving[taken[-1].number] = [saves.slots for saves in self._saves]
        self._saves, self._later = self._later, self._no_saves()
        for load in self._ready:
            taken.append(self._copies(load.pages, load.slots, is_load=True))
            self._copying[taken[-1].number] = load
        self._ready = []
        return taken

    def note_copied(self, number: int, time_s: float) -> None:
        """See `Tiers`."""
        load = self._copying.pop(number, None)
        if load is not None:
            load.load_s += time_s
            self._end(load, is_there=True)
            return
        slots = self._saving.pop(number)
        self._stored_bytes += self._num_bytes(slots)
        self._release(slots)

    def check_integrity(self) -> None:
        """See `Tiers`."""
        for host in self._host:
            host.check_integrity()
        loads = {id(load): load for load in (*self._reading, *self._ready, *self._copying.values())}
        if {id(load) for load in self._on_their_way.values()} - set(loads):
            raise RuntimeError("a key is on its way by a load that has ended")
        reserved = [sum(len(load.pages[group]) for load in loads.values()) for group in range(len(self._host))]
        if reserved != [pool.num_reserved for pool in self._pools.pools]:
            raise RuntimeError("pages of the device are reserved for no load")

    def idle(self) -> bool:
        """See `Tiers`."""
        return self._disk.advance(self._host, is_idle=True)

    def close(self) -> None:
        """See `Tiers`."""
        self._disk.close(self._host)

    def _no_saves(self) -> list[Saves]:
        return [Saves() for _ in self._host]

    def _num_below(self, keys: Sequence[bytes]) -> int:
        """How many of these keys, from the first, some tier has in the first group."""
        host, pool = self._host[0], self._pools.pools[0]
        for count, key in enumerate(keys):
            if key not in host and not self._disk.has(0, key) and not pool.has(key):
                return count
        return len(keys)

    def _missing(self, keys: Sequence[bytes]) -> tuple[tuple[bytes, ...], ...] | None:
        """For each group the keys that later tokens need and the device lacks; None if one of them is nowhere."""
        missing = []
        pools = self._pools.pools
        for group, begin in enumerate(self._pools.needed(len(keys))):
            host = self._host[group]
            lacking = tuple(key for key in keys[begin:] if not pools[group].has(key))
            if any(key not in host and not self._disk.has(group, key) for key in lacking):
                return None
            missing.append(lacking)
        return tuple(missing)

    def _hold_slots(self, missing: Sequence[Sequence[bytes]]) -> tuple[list[int], ...] | None:
        """Slots of these keys, of which those on disk are read into theirs; None if there is no room for them."""
        # First those that are there: to make room for others must not drive them out.
        there = zip(self._host, missing, strict=True)
        held = [{key: host.hold(key) for key in keys if key in host} for host, keys in there]
        groups = list(zip(self._host, missing, held, strict=True))
        if any(host.num_takeable < len(keys) - len(of_group) for host, keys, of_group in groups):
            self._release([list(of_group.values()) for of_group in held])
            return None
        for group, (host, keys, of_group) in enumerate(groups):
            for key in keys:
                if key not in of_group:
                    slot = self._disk.fetch(group, key, host)
                    assert slot is not None
                    of_group[key] = slot
        return tuple([of_group[key] for key in keys] for _, keys, of_group in groups)

    def _add_slots(self) -> None:
        for host, num_ready in zip(self._host, self._num_ready(), strict=True):
            host.add_slots(num_ready)

    def _end_reading(self) -> None:
        """Loads for which all has come from the disk can be copied; those that lack something end."""
        reading, self._reading = self._reading, []
        for load in reading:
            is_there = self._disk.outcome(load.slots, self._host)
            if is_there is None:
                self._reading.append(load)
                continue
            if load.disk_bytes:
                load.load_s = self._clock() - load.start_s
            if is_there and not load.is_void:
                self._ready.append(load)
                continue
            # A disk that has not read in time is slow.
            self._gain.note_load(0, load.disk_bytes, load.load_s)
            self._end(load, is_there=False)

    def _end(self, load: Load, *, is_there: bool) -> None:
        for key in itertools.chain(*load.keys):
            self._on_their_way.pop(key, None)
        for pool, pages, keys in zip(self._pools.pools, load.pages, load.keys, strict=True):
            if is_there and not load.is_void:
                pool.settle(pages, keys)
            else:
                pool.cancel(pages)
        if is_there and not load.is_void:
            self._events.loaded(load.keys[0])
        self._release(load.slots)
        if is_there:
            num_bytes = self._num_bytes(load.slots)
            self._gain.note_load(num_bytes - load.disk_bytes, load.disk_bytes, load.load_s)
            self._num_found += load.num_tokens
            self._loaded_bytes += num_bytes
            self._load_s += load.load_s

    def _release(self, slots: Sequence[Sequence[int]]) -> None:
        for host, group_slots in zip(self._host, slots, strict=True):
            # The last goes first: it is of no use without those before it.
            for slot in reversed(group_slots):
                host.release(slot)

    def _num_bytes(self, pages: Sequence[Sequence[object]]) -> int:
        return sum(len(group) * size for group, size in zip(pages, self._page_bytes, strict=True))

    def _not_in_host(self, keys: Sequence[Sequence[bytes]]) -> list[list[bytes]]:
        return [[key for key in group if key not in host] for group, host in zip(keys, self._host, strict=True)]

    def _copies(
        self, pages: Sequence[Sequence[int] | Int32], slots: Sequence[Sequence[int]], *, is_load: bool = False
    ) -> PageCopies:
        return PageCopies(
            number=next(self._numbers),
            is_load=is_load,
            pages=tuple(np.array(group, dtype=np.int32) for group in pages),
            slots=tuple(np.array(group, dtype=np.int32) for group in slots),
        )
