"""The slots of host memory against a plain model, and pages of the device that are being filled."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanoflow.kvcache import OutOfPagesError, PagePool
from nanoflow.kvcache.host import HostPages

KEYS = [hashlib.sha256(bytes([number])).digest() for number in range(14)]
keys = st.sampled_from(KEYS)


class HostMachine(RuleBasedStateMachine):
    """Every slot is held, findable or free; of those nobody holds the oldest goes first, one that a disk has before."""

    @initialize(num_slots=st.integers(1, 8), has_disk=st.booleans())
    def begin(self, num_slots: int, has_disk: bool) -> None:
        self.has_disk, self.num_slots = has_disk, num_slots
        self.host = HostPages(num_slots, has_disk=has_disk)
        self.num_added = 0
        self.slot_of: dict[bytes, int] = {}
        self.order: list[bytes] = []  # of findable keys that nobody holds, the oldest use first
        self.stored: set[int] = set()
        self.holds: list[int] = []
        self.num_evicted = self.num_lost = 0

    @rule(data=st.data())
    def add_slots(self, data: st.DataObject) -> None:
        self.num_added = data.draw(st.integers(self.num_added, self.num_slots))
        self.host.add_slots(self.num_added)

    def num_free(self) -> int:
        return self.num_added - len({*self.slot_of.values(), *self.holds})

    @rule(key=keys)
    def take(self, key: bytes) -> None:
        if key in self.slot_of:
            return
        assert self.host.num_takeable == self.num_free() + len(self.order)
        had_free = self.num_free() > 0
        slot = self.host.take(key)
        if not had_free:
            first = [each for each in self.order if self.slot_of[each] in self.stored] or self.order
            if not first:
                assert slot is None
                return
            self.num_evicted += 1
            self.num_lost += self.has_disk and self.slot_of[first[0]] not in self.stored
            assert slot == self.slot_of.pop(first[0])
            self.order.remove(first[0])
        assert slot is not None and slot not in self.holds and slot not in self.slot_of.values()
        assert slot < self.num_added
        self.slot_of[key] = slot
        self.holds.append(slot)
        self.stored.discard(slot)
        if not self.has_disk:
            self.stored.add(slot)

    @rule(key=keys)
    def hold(self, key: bytes) -> None:
        if key in self.slot_of:
            assert self.host.hold(key) == self.slot_of[key]
            self.holds.append(self.slot_of[key])
            if key in self.order:
                self.order.remove(key)

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), is_stored=st.booleans())
    def release(self, data: st.DataObject, is_stored: bool) -> None:
        slot = data.draw(st.sampled_from(self.holds))
        if is_stored:
            self.host.set_stored(slot)
            self.stored.add(slot)
        self.host.release(slot)
        self.holds.remove(slot)
        key = next((key for key, each in self.slot_of.items() if each == slot), None)
        if slot not in self.holds and key is not None:
            self.order.append(key)

    @rule(used=st.lists(keys, max_size=4))
    def use(self, used: list[bytes]) -> None:
        self.host.use(used)
        for key in used:
            if key in self.order:
                self.order.remove(key)
                self.order.append(key)

    @rule(gone=st.lists(keys, max_size=4))
    def forget(self, gone: list[bytes]) -> None:
        self.host.forget(gone)
        for key in gone:
            self.slot_of.pop(key, None)
        self.order = [key for key in self.order if key not in gone]

    @rule()
    def forget_all(self) -> None:
        self.host.forget_all()
        self.slot_of, self.order = {}, []

    @invariant()
    def agrees(self) -> None:
        self.host.check_integrity()
        assert [key in self.host for key in KEYS] == [key in self.slot_of for key in KEYS]
        assert self.host.num_used == len(self.slot_of)
        assert (self.host.num_evicted, self.host.num_lost) == (self.num_evicted, self.num_lost)
        new = [key for key in self.order if self.slot_of[key] not in self.stored]
        assert list(self.host.oldest_new(len(KEYS))) == new
        assert list(self.host.oldest_new(1)) == new[:1] and list(self.host.oldest_new(-1)) == []


HostMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_host_pages = HostMachine.TestCase


def test_slots_that_are_taken_together_lie_together() -> None:
    host = HostPages(6)
    host.add_slots(3)
    assert [host.take(key) for key in KEYS[:2]] == [0, 1]
    host.add_slots(6)
    assert [host.take(key) for key in KEYS[2:7]] == [2, 3, 4, 5, None]


def test_pages_that_are_being_filled_are_neither_free_nor_held() -> None:
    pool = PagePool(6)
    first = pool.allocate(2)
    pages = pool.reserve(3)
    assert (pool.num_reserved, pool.num_in_use, pool.num_free) == (3, 2, 1)
    assert pool.num_holders()[pages].tolist() == [0, 0, 0] and pool.num_holders()[first].tolist() == [1, 1]
    with pytest.raises(OutOfPagesError):
        pool.reserve(2)
    assert pool.find(KEYS[:3]).tolist() == []
    pool.settle(pages, KEYS[:3])
    assert pool.find(KEYS[:3]).tolist() == pages.tolist()
    assert (pool.num_reserved, pool.num_in_use, pool.num_free) == (0, 2, 4)
    # The last of the prefix goes first.
    pool.allocate(2)
    assert pool.find(KEYS[:3]).tolist() == pages[:2].tolist()
    pool.check_integrity()


def test_a_load_that_is_cancelled_or_comes_too_late_leaves_empty_pages() -> None:
    pool = PagePool(4)
    pool.cancel(pool.reserve(2))
    assert (pool.num_free, pool.num_reserved, pool.num_filled) == (4, 0, 0)
    late, computed = pool.reserve(1), pool.allocate(1)
    pool.cache(int(computed[0]), KEYS[0])
    pool.settle(late, KEYS[:1])
    assert pool.find(KEYS[:1]).tolist() == computed.tolist() and pool.num_free == 3
    pool.check_integrity()
    pool.forget_keys(KEYS)
    pool.release(computed)
    assert pool.find(KEYS[:1]).tolist() == [] and pool.num_filled == 0
    pool.check_integrity()


def test_keys_are_forgotten_in_pages_that_are_held_and_in_others() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    for page, key in zip(pages.tolist(), KEYS, strict=False):
        pool.cache(page, key)
    pool.release(pages[1:2])
    assert pool.known(KEYS).tolist() == pages.tolist()
    pool.forget_keys(KEYS[1:])
    assert pool.known(KEYS).tolist() == pages[:1].tolist() and pool.num_free == 2
    pool.release(pages[np.array([0, 2])])
    pool.check_integrity()
