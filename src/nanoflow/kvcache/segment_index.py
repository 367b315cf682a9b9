"""Which pages are in which segment, which pages are on their way there, and which segment goes when room is needed.

A segment goes as a whole. The next to go is the one whose pages were used longest ago on average; those of its pages
that were used lately are worth a second life in another segment. A use is a write or a read.

Nothing here touches a file (`page_files.py`) or takes a lock: looking up a key is one look into a dict, which needs
none; whatever changes something is called by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from nanoflow.kvcache.segments import Bytes, Layout

# Of a segment that goes, at most this part lives on, so that room is gained.
_MAX_KEPT_PART = 0.25


@dataclass(slots=True, kw_only=True, eq=False)
class Segment:
    """A segment and what is in its slots.

    Attributes:
        layout: Where things are in its file.
        file_bytes: Size of the file; while it is being filled, the size that it will have.
        file: Descriptor to write to, while it is being filled.
        keys: Key of the page in each slot; None where there is none, or where what was there must not be used.
        checks: Checksum of each page.
        num_taken: Slots that are given out, the first ones.
        num_writing: Batches of pages that are being written to it.
        num_live: Pages that can be found.
        is_void: None of its pages is to be used, not even by those who have found it before.
    """

    layout: Layout
    file_bytes: int
    file: int | None = None
    keys: list[bytes | None] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    num_taken: int = 0
    num_writing: int = 0
    num_live: int = 0
    sum_used: int = 0
    is_void: bool = False

    def __post_init__(self) -> None:
        self.keys = [None] * self.layout.num_slots
        self.checks, self.used = [0] * self.layout.num_slots, [0] * self.layout.num_slots

    @property
    def is_full(self) -> bool:
        """Whether all slots are given out."""
        return self.num_taken == self.layout.num_slots


def running_future() -> Future[bool]:
    """A future that cannot be cancelled: somebody uses its array."""
    future = Future[bool]()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True, kw_only=True, eq=False)
class PageWrite:
    """A page on its way to a file.

    Attributes:
        group, key: Of the page.
        data: uint8 [page_bytes].
        used_at: When it was used last, by the index's count; None: now.
        is_forgotten: It is not wanted any more.
        is_stored: It can be found.
        done: Becomes `is_stored` once `data` is not read any more.
    """

    group: int
    key: bytes
    data: Bytes
    used_at: int | None = None
    is_forgotten: bool = False
    is_stored: bool = False
    done: Future[bool] = field(default_factory=running_future)


Place = tuple[Segment, int]


class SegmentIndex:
    """The pages in segments, by group and key.

    Args:
        num_groups: KV groups.

    Attributes:
        segments: By number.
        pending: Pages on their way to a file, by group and key.
    """

    def __init__(self, num_groups: int) -> None:
        self.segments: dict[int, Segment] = {}
        self.pending: dict[tuple[int, bytes], PageWrite] = {}
        self._places: list[dict[bytes, Place]] = [{} for _ in range(num_groups)]
        self._now = 0

    @property
    def num_pages(self) -> int:
        """Pages that can be found."""
        return sum(map(len, self._places))

    @property
    def num_groups(self) -> int:
        """KV groups."""
        return len(self._places)

    def contains(self, group: int, key: bytes) -> bool:
        """Whether a page can be found."""
        return key in self._places[group]

    def find(self, group: int, keys: Sequence[bytes]) -> int:
        """How many of the first keys have pages that can be found."""
        places = self._places[group]
        for count, key in enumerate(keys):
            if key not in places:
                return count
        return len(keys)

    def place(self, group: int, key: bytes) -> Place | None:
        """Segment and slot of a page."""
        return self._places[group].get(key)

    def add(self, segment: Segment, slot: int, key: bytes, check: int, used_at: int | None = None) -> None:
        """A page can be found from now on; where another had its key, that one cannot be found any more."""
        self.remove(segment.layout.group, key)
        segment.keys[slot], segment.checks[slot] = key, check
        segment.used[slot] = self._tick() if used_at is None else used_at
        segment.num_live += 1
        segment.sum_used += segment.used[slot]
        self._places[segment.layout.group][key] = segment, slot

    def remove(self, group: int, key: bytes) -> Place | None:
        """A page cannot be found any more, nor may those use it who have found it before: where it was."""
        place = self._places[group].pop(key, None)
        if place is not None:
            segment, slot = place
            segment.keys[slot] = None
            segment.num_live -= 1
            segment.sum_used -= segment.used[slot]
        return place

    def touch(self, place: Place) -> None:
        """A page was used."""
        segment, slot = place
        if self._place_of(segment, slot) == place:
            segment.sum_used -= segment.used[slot]
            segment.used[slot] = self._tick()
            segment.sum_used += segment.used[slot]

    def drop(self, segment: Segment) -> int:
        """A segment is gone; those who have found pages of it before may use them. How many could be found."""
        places, num_live = self._places[segment.layout.group], segment.num_live
        for slot, key in enumerate(segment.keys):
            if key is not None and self._place_of(segment, slot) is not None:
                del places[key]
        segment.num_live = segment.sum_used = 0
        self.segments.pop(segment.layout.number, None)
        return num_live

    def next_to_go(self) -> Segment | None:
        """The segment whose pages were used longest ago, of those that nobody writes to."""
        closed = [segment for segment in self.segments.values() if segment.file is None]
        return min(closed, key=_mean_use, default=None)

    def worth_keeping(self, segment: Segment) -> list[int]:
        """Slots of a segment that goes whose pages were used later than the average page, the latest first."""
        num_live = sum(each.num_live for each in self.segments.values())
        mean = sum(each.sum_used for each in self.segments.values()) / max(num_live, 1)
        slots = [
            slot for slot, used in enumerate(segment.used) if used > mean and self._place_of(segment, slot) is not None
        ]
        slots.sort(key=lambda slot: -segment.used[slot])
        return slots[: int(segment.layout.num_slots * _MAX_KEPT_PART)]

    def begin_write(self, write: PageWrite) -> None:
        """A page is on its way; neither it nor another with its key was before."""
        self.pending[write.group, write.key] = write

    def end_write(self, write: PageWrite) -> None:
        """A page is not on its way any more."""
        if self.pending.get((write.group, write.key)) is write:
            del self.pending[write.group, write.key]

    def cancel_writes(self, keys: Iterable[bytes]) -> None:
        """Pages with these keys that are on their way shall not be found."""
        for key in keys:
            for group in range(self.num_groups):
                write = self.pending.pop((group, key), None)
                if write is not None:
                    write.is_forgotten = True

    def check_integrity(self) -> None:
        """Raise RuntimeError unless keys and slots name each other and all is counted as it is."""
        for group, places in enumerate(self._places):
            for key, (segment, slot) in places.items():
                if segment.keys[slot] != key or segment.layout.group != group:
                    raise RuntimeError("a key leads to a slot that has another key")
                if self.segments.get(segment.layout.number) is not segment or segment.is_void:
                    raise RuntimeError("a key leads to a segment that is gone")
        for segment in self.segments.values():
            slots = [slot for slot in range(segment.layout.num_slots) if self._place_of(segment, slot) is not None]
            if len(slots) != segment.num_live or len(slots) != sum(key is not None for key in segment.keys):
                raise RuntimeError("the pages of a segment are not counted as they are")
            if sum(segment.used[slot] for slot in slots) != segment.sum_used:
                raise RuntimeError("the use of a segment is not counted as it is")
            if any(slot >= segment.num_taken for slot in slots):
                raise RuntimeError("a page is in a slot that was not given out")
        if any(self.contains(*page) or write.is_forgotten for page, write in self.pending.items()):
            raise RuntimeError("a page is on its way that is there, or is not wanted")

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _place_of(self, segment: Segment, slot: int) -> Place | None:
        """The place of the page in a slot, if it can be found there."""
        key = segment.keys[slot]
        place = None if key is None else self._places[segment.layout.group].get(key)
        return place if place is not None and place[0] is segment and place[1] == slot else None


def _mean_use(segment: Segment) -> float:
    return segment.sum_used / segment.num_live if segment.num_live else -1.0
