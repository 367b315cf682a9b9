"""Host memory and a disk behind the fake executor: every page says whose keys and values it holds, after which others.

What lies in a page or slot is a chain of hashes of all tokens up to each of its own, so a page with the right tokens
behind another prefix is wrong too. Copies are made as late, and in as bad an order, as `executor/page_copies.py` allows
on a GPU: a save when somebody must wait for it, a load just before its end. A row may be *poisoned*, as one whose
numbers are not finite: what it writes then can be told from all else, and its draws fail.
"""

from __future__ import annotations

import random
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nanoflow.batch import Bool, DenseBatch, Int32, NewPages, SampledTokens
from nanoflow.kvcache.copies import PageCopies
from nanoflow.kvcache.disk import DiskCounts
from nanoflow.kvcache.host import HostPages
from nanoflow.kvcache.pools import PagePools
from nanoflow.kvcache.segments import Bytes
from nanoflow.scheduler import SchedulerLimits
from nanoflow.scheduler.disk_copies import DiskCopies
from nanoflow.scheduler.drafts import Drafts
from nanoflow.scheduler.lower_tiers import LowerTiers
from tests.unit.drafting_executor import DraftingExecutor
from tests.unit.fake_executor import Drive, Model, choose_token

# Loads are worth it: computing a token would take so long.
_COMPUTE_S = 10.0
_GARBAGE = 0x55


def chain(tokens: Sequence[int]) -> list[int]:
    """For each token a hash of it and of all tokens before it, never negative."""
    state, states = 0, []
    for token in tokens:
        state = zlib.crc32(token.to_bytes(8, "little"), state)
        states.append(state)
    return states


class FakeDisk:
    """A `DiskTier` that does what it is told when `advance` says so; it forgets, damages and refuses at random."""

    def __init__(self, rng: random.Random, capacity: int, *, fault: float = 0.05) -> None:
        self._rng, self._capacity, self._fault = rng, capacity, fault
        self._pages: OrderedDict[tuple[int, bytes], bytes] = OrderedDict()
        self._writes: list[tuple[tuple[int, bytes], Bytes, bytes, Future[bool]]] = []
        self._reads: list[tuple[tuple[int, bytes], Bytes, Future[bool]]] = []
        self._void: set[int] = set()
        self.is_closed = False
        self.num_read = 0
        self.calls: list[tuple[Callable[[], None], Future[None]]] = []

    @property
    def counts(self) -> DiskCounts:
        return DiskCounts(num_pages=len(self._pages))

    def contains(self, group: int, key: bytes) -> bool:
        return (group, key) in self._pages

    def write(self, group: int, key: bytes, data: Bytes) -> Future[bool]:
        done: Future[bool] = Future()
        if self.is_closed or self._rng.random() < self._fault:
            done.set_result(False)
        else:
            self._writes.append(((group, key), data, data.tobytes(), done))
        return done

    def read(self, group: int, key: bytes, into: Bytes) -> Future[bool]:
        done: Future[bool] = Future()
        self._reads.append(((group, key), into, done))
        return done

    def forget(self, keys: Iterable[bytes]) -> None:
        gone = set(keys)
        for place in [place for place in self._pages if place[1] in gone]:
            del self._pages[place]
        self._void.update(id(done) for place, _, _, done in self._writes if place[1] in gone)
        self._void.update(id(done) for *_, done in self._reads)

    def forget_all(self) -> None:
        self.forget([key for _, key in self._pages] + [place[1] for place, *_ in self._writes])

    def advance(self, chance: float) -> None:
        """End each write and read with this chance."""
        writes, self._writes = self._writes, []
        for write in writes:
            place, data, bytes_then, done = write
            if self._rng.random() >= chance:
                self._writes.append(write)
                continue
            assert data.tobytes() == bytes_then, "a slot was overwritten while it was being written to disk"
            is_stored = id(done) not in self._void
            if is_stored:
                self._pages[place] = bytes_then
                if len(self._pages) > self._capacity:
                    self._pages.popitem(last=False)
            done.set_result(is_stored)
        calls, self.calls = self.calls, []
        for call, called in calls:
            call()
            called.set_result(None)
        reads, self._reads = self._reads, []
        for read in reads:
            place, into, done = read
            if self._rng.random() >= chance:
                self._reads.append(read)
                continue
            page = self._pages.get(place)
            is_read = page is not None and id(done) not in self._void and self._rng.random() >= self._fault
            if is_read:
                assert page is not None
                into[:] = np.frombuffer(page, dtype=np.uint8)
                self.num_read += 1
            else:
                into[:] = _GARBAGE
                self._pages.pop(place, None)
            done.set_result(is_read)

    def flush(self, within_s: float) -> None:
        del within_s
        self.advance(1.0)

    def close(self) -> None:
        self.is_closed = True
        self.advance(1.0)

    def check_integrity(self) -> None:
        pass


class _LateCalls:
    """Stands in for a thread that forgets pages: it does so when the disk is advanced."""

    def __init__(self, disk: FakeDisk) -> None:
        self._disk = disk

    def submit(self, call: Callable[[], None]) -> Future[None]:
        called: Future[None] = Future()
        self._disk.calls.append((call, called))
        return called

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        del wait, cancel_futures
        self._disk.advance(1.0)


@dataclass(slots=True)
class _Poison:
    """Wrong numbers of one tenant of a row.

    Attributes:
        number: What it has written is this, in every place of its pages.
        joined: The batch in which it joined.
    """

    number: int = 0
    joined: int = 0


class TierExecutor(DraftingExecutor):
    """`DraftingExecutor` with host memory, late copies and poison.

    Args:
        limits: Sizes.
        num_slots: Slots of host memory of each KV group.
        rng: For everything that happens by chance.
        model: What it says.
        poison: Chance that a row is poisoned, in each batch.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        num_slots: int,
        rng: random.Random,
        *,
        model: Model = choose_token,
        poison: float = 0.0,
    ) -> None:
        super().__init__(limits, model)
        self._rng, self._poison = rng, poison
        self.contents = [np.full(pool.num_pages * limits.page_size, -1, np.int64) for pool in limits.pools]
        # Of each token: it, its position, and what `contents` has.
        self._host = [np.full((num_slots, 3 * limits.page_size), -1, np.int64) for _ in limits.pools]
        self.num_batches = 0
        self._poisons: dict[int, _Poison] = {}
        self._num_poisons = 0
        # Poison by number that is known to be wrong, and the batch after which nobody may get it who joins then.
        self.settled: dict[int, int] = {}
        self._saves: list[PageCopies] = []
        self._loads: list[PageCopies] = []
        self._ended: set[int] = set()

    @property
    def memory(self) -> list[Bytes]:
        """Host memory, uint8 [slots, bytes of a page] of each group."""
        return [array.view(np.uint8) for array in self._host]

    @property
    def page_bytes(self) -> list[int]:
        return [24 * self.limits.page_size for _ in self.limits.pools]

    def first_poison(self, number: int, settled: Iterable[int]) -> None:
        """Count on after an earlier executor, whose poison may be on disk; what it has settled must not be read."""
        self._num_poisons = number
        self.settled = dict.fromkeys(settled, -1)

    # Copies

    def copy(self, copies: PageCopies) -> None:
        """Queue copies behind all batches so far."""
        for pages, slots, pool in zip(copies.pages, copies.slots, self.limits.pools, strict=True):
            assert len(pages) == len(slots) and len(set(slots.tolist())) == len(slots)
            assert len(set(pages.tolist())) == len(pages) or not copies.is_load
            assert all(0 <= page < pool.num_pages for page in pages.tolist())
        if copies.is_load:
            self._end_saves(len(self._saves))
            self._loads.append(copies)
        else:
            self._check_not_loading(copies.pages)
            self._saves.append(copies)
        if self._rng.random() < 0.3:
            self.end(copies.number)

    def end(self, number: int) -> None:
        """Copies have ended, whatever is queued before them too."""
        for place, copies in enumerate(self._saves):
            if copies.number == number:
                self._end_saves(place + 1)
                break
        for place, copies in enumerate(self._loads):
            if copies.number == number:
                for each in self._loads[: place + 1]:
                    self._move(each)
                del self._loads[: place + 1]
                break

    def forget(self, group: int, is_free: Bool) -> None:
        is_free = is_free.copy()
        for copies in self._saves:
            is_free[copies.pages[group]] = False
        super().forget(group, is_free)
        self.contents[group][np.repeat(is_free, self.limits.page_size)] = -1

    def _end_saves(self, count: int) -> None:
        for copies in self._saves[:count]:
            self._move(copies)
        del self._saves[:count]

    def _move(self, copies: PageCopies) -> None:
        size = self.limits.page_size
        for group, (pages, slots) in enumerate(zip(copies.pages, copies.slots, strict=True)):
            parts = self.cached_tokens[group], self.cached_positions[group], self.contents[group]
            for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
                for part, of_page in enumerate(parts):
                    of_slot = self._host[group][slot, part * size : (part + 1) * size]
                    if copies.is_load:
                        of_page[page * size : (page + 1) * size] = of_slot
                    else:
                        of_slot[:] = of_page[page * size : (page + 1) * size]

    def _protect(self, new: NewPages) -> None:
        """Saves from pages that the batch gets end before it; nothing may touch pages that are being loaded."""
        group_of = new.rows // self.limits.max_num_seqs
        of_group = [new.pages[group_of == group] for group in range(len(self.limits.pools))]
        self._check_not_loading(of_group)
        last = [
            place
            for place, copies in enumerate(self._saves)
            if any(np.isin(a, b).any() for a, b in zip(of_group, copies.pages, strict=True))
        ]
        self._end_saves(last[-1] + 1 if last else 0)

    def _check_not_loading(self, pages: Sequence[Int32]) -> None:
        for copies in self._loads:
            for of_load, others in zip(copies.pages, pages, strict=True):
                assert not np.isin(of_load, others).any(), "a page is used while it is loaded"

    # Batches

    def run(self, batch: DenseBatch) -> SampledTokens:
        self.num_batches += 1
        self._protect(batch.new_pages)
        for joined in batch.joined:
            self._poisons[joined.row] = _Poison(joined=self.num_batches)
        for row in batch.rows.tolist():
            if self._rng.random() < self._poison:
                self._infect(row)
        result = super().run(batch)
        errors = {
            place: "not finite"
            for place, index in enumerate(batch.sampled.tolist())
            if self._poisons[int(batch.rows[index])].number
        }
        return replace(result, errors=errors)

    def poison_of(self, batch: DenseBatch, place: int) -> tuple[int, int]:
        """Row, and number of the poison with which a draw failed."""
        row = int(batch.rows[batch.sampled[place]])
        return row, self._poisons[row].number

    def write(self, batch: DenseBatch, index: int) -> None:
        row = int(batch.rows[index])
        places = range(int(batch.query_start[index]), int(batch.query_start[index + 1]))
        tokens = self.tenants[row].tokens + self.guessed(batch, index)
        states, first = chain(tokens), int(batch.positions[places[0]])
        for group, pool in enumerate(self.limits.pools):
            seen = 0 if pool.window is None else max(first - pool.window + 1, 0)
            self._check(group, row, states, range(seen, first))
        super().write(batch, index)
        poison = self._poisons[row].number
        for group, slots in enumerate(batch.slots.reshape(-1, batch.num_tokens)):
            for place in places:
                self.contents[group][int(slots[place])] = poison or states[int(batch.positions[place])]

    def _check(self, group: int, row: int, states: Sequence[int], positions: range) -> None:
        """What a row reads is of its own tokens; or of a request that is going to fail, and then so does this one."""
        size, table = self.limits.page_size, self.table(group, row)
        tenant = self._poisons[row]
        for position in positions:
            found = int(self.contents[group][int(table[position // size]) * size + position % size])
            if found < -1:
                assert found not in self.settled or tenant.joined <= self.settled[found], "what failed was used again"
                self._infect(row)
            else:
                assert found == states[position], f"row {row} reads another prefix at {position}"

    def _infect(self, row: int) -> None:
        if not self._poisons[row].number:
            self._num_poisons += 1
            self._poisons[row].number = -1 - self._num_poisons


class TierDrive(Drive):
    """`Drive` with lower tiers: copies are taken before each batch, and end late.

    Args:
        limits: Sizes.
        depth: How many iterations late batches are committed.
        num_slots: Slots of host memory of each KV group.
        seed: For everything that happens by chance.
        disk: What stands in for the files; None for no disk.
        drafts: Guesses.
        model: What the fake model says.
        poison: Chance that a row is poisoned, in each batch.
        pace: Chance that a copy ends, in each step.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        depth: int,
        num_slots: int,
        seed: int = 0,
        disk: Any = None,
        drafts: Drafts | None = None,
        model: Model = choose_token,
        poison: float = 0.0,
        pace: float = 0.4,
    ) -> None:
        self.rng = random.Random(seed)
        self.tier_executor = TierExecutor(limits, num_slots, self.rng, model=model, poison=poison)
        self.disk, self.pace = disk, pace
        self.copying: list[int] = []
        self.now_s = 0.0
        self.num_loads = self.num_saves = self.num_fruitless = 0
        executor = self.tier_executor

        def make_tiers(pools: PagePools) -> LowerTiers:
            self.hosts = [HostPages(num_slots, has_disk=disk is not None) for _ in limits.pools]
            below: Any = None
            if disk is not None:
                below = DiskCopies(
                    disk, executor.memory, page_size=limits.page_size, capacity_bytes=1, clock=lambda: self.now_s
                )
                if isinstance(disk, FakeDisk):
                    below._forgetter = _LateCalls(disk)
            self.below = below
            return LowerTiers(
                pools,
                self.hosts,
                page_bytes=executor.page_bytes,
                page_size=limits.page_size,
                disk=below,
                clock=lambda: self.now_s,
            )

        super().__init__(limits, depth=depth, drafts=drafts, executor=executor, make_tiers=make_tiers)
        self.tiers = self.scheduler.tiers
        for _ in range(20):
            self.tiers.note_iteration(64, 64 * _COMPUTE_S)

    @property
    def is_busy(self) -> bool:
        """Whether the engine's loop would go on."""
        return self.scheduler.has_unfinished or bool(self.in_flight) or self.tiers.is_loading

    def step(self) -> DenseBatch | None:
        self.now_s += self.rng.choice((1e-4, 1e-4, 0.5))
        self.collect(self.pace)
        batch = self.scheduler.schedule()
        can_wait = self.in_flight or self.tiers.is_loading or not self.scheduler.has_unfinished
        self.num_fruitless = 0 if batch is not None or can_wait else self.num_fruitless + 1
        self.issue()
        if batch is not None:
            self.check_windows(batch)
            self.in_flight.append((batch, self.executor.run(batch)))
        elif not self.in_flight and self.tiers.is_loading:
            self.collect(1.0)
            self.wait()
        if self.in_flight and (batch is None or len(self.in_flight) > self.depth):
            self.commit()
        return batch

    def collect(self, chance: float) -> None:
        """Let copies end with this chance each, and what the disk does."""
        if isinstance(self.disk, FakeDisk):
            self.disk.advance(chance)
        for number in list(self.copying):
            if self.rng.random() < chance:
                self.copying.remove(number)
                self.tier_executor.end(number)
                self.tiers.note_copied(number, 1e-6 * self.rng.random())

    def wait(self) -> None:
        """Give a real disk some time."""
        if self.disk is not None and not isinstance(self.disk, FakeDisk):
            time.sleep(0.0005)

    def issue(self) -> None:
        """Queue what is to be copied now."""
        for copies in self.tiers.take_copies():
            self.num_loads += copies.is_load
            self.num_saves += not copies.is_load
            self.tier_executor.copy(copies)
            self.copying.append(copies.number)

    def commit(self) -> None:
        batch, result = self.in_flight[0]
        epochs = self.scheduler._rows.epoch
        for place in result.errors:
            row, number = self.tier_executor.poison_of(batch, place)
            if int(batch.epochs[batch.sampled[place]]) == int(epochs[row]):
                self.tier_executor.settled[number] = self.tier_executor.num_batches
        super().commit()

    def come_to_rest(self) -> None:
        """Let everything end as in an idle engine, and see that nothing is held."""
        for _ in range(1000):
            self.wait()
            self.collect(1.0)
            self.issue()
            if not (self.tiers.idle() or self.copying):
                break
        else:
            raise AssertionError("the tiers do not come to rest")
        self.scheduler.check_integrity()
        for pool in self.scheduler.pools:
            assert pool.num_reserved == pool.num_in_use == 0
        for host in self.hosts:
            assert not host._num_holders.any(), "slots of host memory stay held"
        assert not self.tiers.is_loading

    def close(self) -> None:
        """End as an engine that is closed."""
        for _ in range(2):
            self.issue()
        self.collect(1.0)
        self.tiers.close()
