"""The pool of KV pages in host memory: which slot has which page, and which slot is overwritten next.

A slot holds one page of one KV group. A page is found by its key (`keys.py`), as on the device. Slots are never given
back: what is in them stays until their memory is needed, and then the page that was used longest ago goes. A slot that
is being copied from or to is *held* and stays. Where a disk is below (`disk.py`), pages that are not there yet are
*new*; those that are there already go first, since nothing is lost with them.

This file knows neither the memory (`executor/page_copies.py`) nor when to copy (`scheduler/tiers.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from nanoflow.kvcache.events import NO_WATCH, KeyWatch


class HostPages:
    """The slots of one KV group.

    Args:
        num_slots: Slots there will be.
        has_disk: Pages are new until `set_stored`.

    Attributes:
        num_slots: Slots there will be; they can be used once `add_slots` says so.
        watch: Is told of every key that is there, or no more.
        num_evicted: Pages that had to go, since the start.
        num_lost: Those of them that were new: no disk has them.
    """

    def __init__(self, num_slots: int, *, has_disk: bool = False) -> None:
        self.num_slots = num_slots
        self.watch: KeyWatch = NO_WATCH
        self.num_evicted = self.num_lost = 0
        self._has_disk = has_disk
        self._num_added = 0
        self._free: list[int] = []
        self._slot_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_slots
        self._num_holders = np.zeros(num_slots, dtype=np.int32)
        # Keys that nobody holds, the next to go first.
        self._new: OrderedDict[bytes, None] = OrderedDict()
        self._stored: OrderedDict[bytes, None] = OrderedDict()
        self._is_stored = np.full(num_slots, not has_disk)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slot_of

    @property
    def num_used(self) -> int:
        """Slots that have a page."""
        return len(self._slot_of)

    @property
    def num_takeable(self) -> int:
        """Slots that `take` can still give."""
        return len(self._free) + len(self._new) + len(self._stored)

    def add_slots(self, num_ready: int) -> None:
        """The memory of the first so many slots can be used now."""
        if num_ready > self._num_added:
            # Taken in ascending order, so that pages computed together lie together and are copied at once.
            self._free = list(range(num_ready - 1, self._num_added - 1, -1)) + self._free
            self._num_added = num_ready

    def take(self, key: bytes) -> int | None:
        """A slot for a page that is not there, held by the caller, who will write it. None if all slots are held."""
        slot = self._free.pop() if self._free else self._evict()
        if slot is None:
            return None
        self._slot_of[key], self._key_of[slot] = slot, key
        self.watch.stored(key)
        self._num_holders[slot] = 1
        self._is_stored[slot] = not self._has_disk
        return slot

    def hold(self, key: bytes) -> int:
        """The slot of a key that is there, which stays until it is released as often as it was held."""
        slot = self._slot_of[key]
        if self._num_holders[slot] == 0:
            del self._queue(slot)[key]
        self._num_holders[slot] += 1
        return slot

    def hold_slot(self, slot: int) -> None:
        """One holder more of a slot that is held."""
        self._num_holders[slot] += 1

    def release(self, slot: int) -> None:
        """One holder less. A key without holders counts as used just now; one that was forgotten goes."""
        self._num_holders[slot] -= 1
        if self._num_holders[slot] == 0:
            key = self._key_of[slot]
            assert key is not None
            if self._slot_of.get(key) == slot:
                self._queue(slot)[key] = None
            else:
                self._set_free(slot)

    def use(self, keys: Iterable[bytes]) -> None:
        """These keys, where they are there, have been used just now, the last of them last."""
        for key in keys:
            slot = self._slot_of.get(key)
            if slot is not None and self._num_holders[slot] == 0:
                self._queue(slot).move_to_end(key)

    def forget(self, keys: Iterable[bytes]) -> None:
        """What is under these keys is not to be used again."""
        for key in keys:
            slot = self._slot_of.pop(key, None)
            if slot is not None:
                self.watch.removed(key)
                if self._num_holders[slot] == 0:
                    del self._queue(slot)[key]
                    self._set_free(slot)

    def forget_all(self) -> None:
        """Nothing is to be used again."""
        self.forget(list(self._slot_of))

    def oldest_new(self, count: int) -> Sequence[bytes]:
        """Up to so many pages that no disk has and nobody holds, those first that would go first."""
        return [key for key, _ in zip(self._new, range(count), strict=False)]

    def set_stored(self, slot: int) -> None:
        """A disk has the page of this slot, which the caller holds."""
        self._is_stored[slot] = True

    def check_integrity(self) -> None:
        """Raise RuntimeError unless slots and keys name each other and those without holders are the ones to go."""
        if any(self._key_of[slot] != key for key, slot in self._slot_of.items()):
            raise RuntimeError("a key leads to a slot of host memory that has another key")
        idle = {key for key, slot in self._slot_of.items() if self._num_holders[slot] == 0}
        if idle != set(self._new) | set(self._stored) or set(self._new) & set(self._stored):
            raise RuntimeError("pages in host memory that nobody holds are not those that may go")
        if any(self._is_stored[self._slot_of[key]] for key in self._new):
            raise RuntimeError("a page counts as new that a disk has")
        if (self._num_holders < 0).any():
            raise RuntimeError("a slot of host memory was released more often than held")
        held = set(np.flatnonzero(self._num_holders).tolist())
        if sorted({*self._free, *self._slot_of.values(), *held}) != list(range(self._num_added)):
            raise RuntimeError("a slot of host memory is lost")
        if len(set(self._free)) != len(self._free) or held & set(self._free):
            raise RuntimeError("a slot of host memory is free that is held, or free twice")

    def _queue(self, slot: int) -> OrderedDict[bytes, None]:
        return self._stored if self._is_stored[slot] else self._new

    def _evict(self) -> int | None:
        queue = self._stored or self._new
        if not queue:
            return None
        key, _ = queue.popitem(last=False)
        self.num_evicted += 1
        self.num_lost += self._has_disk and queue is self._new
        self.watch.removed(key)
        return self._slot_of.pop(key)

    def _set_free(self, slot: int) -> None:
        self._key_of[slot] = None
        self._free.append(slot)
