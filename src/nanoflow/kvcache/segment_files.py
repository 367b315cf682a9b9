"""The segments of a store as files: found at the start, begun, closed when full, and removed where room is needed.

The room is that of the capacity and that of the file system. The segment used longest ago goes first; before it, those
of other stores in the user's folder that no process uses. What is in the slots is written and read by `page_files.py`,
which segment is next `segment_index.py` says.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from nanoflow.kvcache import segments
from nanoflow.kvcache.page_reads import PASSING_ERRORS
from nanoflow.kvcache.segment_index import PageWrite, Segment, SegmentIndex
from nanoflow.kvcache.store_folder import DiskError, StoreFolder

logger = logging.getLogger(__name__)

# Threads that write at the same time.
MAX_WRITERS = 2


class SegmentFiles:
    """The segments in a folder.

    Args:
        folder: Locked.
        capacity_bytes: Most bytes that files of this store have together.
        page_bytes: Bytes of a page in each KV group.

    Raises:
        DiskError: Fewer bytes than a few segments need.
        OSError: The folder cannot be read, or files cannot be removed.

    Attributes:
        index: Which pages are where.
        lock: Held, and only for a moment, while something of the index changes.
        changes: Taken before `lock`: whoever makes a page findable, or sees to it that it is not found any more after
            any end of the process, holds it until the files say so.
        keep: Reads those pages of a segment that goes which are worth it: segment, slots.
        rescued: Takes these pages, which are to be written anew. None: they go, too.
        num_evicted: Pages whose room was needed for others, since the start.
        num_damaged: Pages, and segments that have none which could be found, that were not as they were written.
    """

    def __init__(self, folder: StoreFolder, capacity_bytes: int, page_bytes: Sequence[int]) -> None:
        self.folder, self.capacity_bytes = folder, capacity_bytes
        self.index = SegmentIndex(len(page_bytes))
        self.lock, self.changes = threading.Lock(), threading.Lock()
        self.keep: Callable[[Segment, Sequence[int]], list[PageWrite]] = lambda segment, slots: []
        self.rescued: Callable[[list[PageWrite]], None] | None = None
        self.num_evicted = self.num_damaged = 0
        self._room = threading.Lock()  # taken before both
        self._doomed: list[Segment] = []
        self._ended = deque[int]()
        self._filling: list[Segment | None] = [None] * len(page_bytes)
        self._layouts = segments.layouts(capacity_bytes, page_bytes)
        # One of each group is being filled, one is written to by each thread, and one more is to be begun.
        sizes = [layout.max_bytes for layout in self._layouts]
        needed_bytes = sum(sizes) + (MAX_WRITERS + 1) * max(sizes)
        if needed_bytes > capacity_bytes:
            raise DiskError(f"{folder.path}: give KV pages on disk at least {needed_bytes:,} bytes")
        self._next_number = folder.first_number
        self._scan(page_bytes)
        # On a disk that has less room, segments are smaller: a few must fit.
        self._layouts = segments.layouts(min(capacity_bytes, self.stored_bytes + folder.free_bytes()), page_bytes)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files; of those that are being filled, the bytes that they will have."""
        with self.lock:
            return sum(each.file_bytes for each in (*self.index.segments.values(), *self._doomed))

    @property
    def has_doomed(self) -> bool:
        """Whether there are files that are still to be removed."""
        return bool(self._doomed)

    def take_slots(self, group: int, count: int) -> tuple[Segment, int, int]:
        """Slots for at most so many pages, to write to until `leave`: their segment, the first of them, how many.

        Raises:
            OSError: There is no room, or the folder takes no file.
        """
        with self._room:
            while True:
                segment = self._filling[group] or self._begin(group)
                with self.lock:
                    if segment.is_void:  # all was forgotten just now
                        continue
                    slot = segment.num_taken
                    count = min(count, segment.layout.num_slots - slot)
                    segment.num_taken += count
                    segment.num_writing += 1
                    self._filling[group] = None if segment.is_full else segment
                    return segment, slot, count

    def leave(self, segment: Segment) -> None:
        """Slots are not being written any more; a segment that takes no more pages is closed."""
        with self.lock:
            segment.num_writing -= 1
            if segment.is_full or segment.is_void:
                self._end(segment)
        self._close_ended()

    def evict(self) -> int:
        """Remove the segment used longest ago, to make room.

        Returns:
            Bytes of its file.

        Raises:
            OSError: There is none, or it cannot be removed.
        """
        with self._room:
            return self._evict()

    def lose(self, segment: Segment) -> None:
        """The file of a segment is gone, or must go, though nobody has evicted it."""
        with self.lock:
            self.num_damaged += segment.num_live
            self._void(segment)
        with contextlib.suppress(OSError):
            self.folder.remove(segment.layout.name)

    def forget_all(self) -> None:
        """No page is found any more, not even after any end of the process; hold `changes`. `sweep` removes the files.

        Raises:
            OSError: The folder does not take it: pages may be found again after a restart.
        """
        with self.lock:
            for segment in list(self.index.segments.values()):
                self._void(segment)
        self.folder.forget_below(self._next_number)

    def sweep(self) -> None:
        """Remove the files that nobody needs any more; OSError if that cannot be."""
        with self._room:
            self._sweep()

    def close(self) -> None:
        """Let go of the folder. Nobody may be writing."""
        for segment in self.index.segments.values():
            self._end(segment)
        self._close_ended()
        self.folder.close()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the index is right and files have no more bytes than they may."""
        with self._room, self.changes:
            with self.lock:
                self.index.check_integrity()
                known = {each.layout.name for each in (*self.index.segments.values(), *self._doomed)}
            found = {name: self.folder.size_of(name) for _, name in self.folder.segments()}
            if found.keys() - known:
                raise RuntimeError(f"files that are not counted: {sorted(found.keys() - known)}")
            if max(self.stored_bytes, sum(found.values())) > self.capacity_bytes:
                raise RuntimeError(f"{sum(found.values()):,} bytes are on disk, {self.capacity_bytes:,} may be")

    def _scan(self, page_bytes: Sequence[int]) -> None:
        """Find what an earlier process has left; remove what is forgotten or damaged, and what is too much."""
        for number, name in self.folder.segments():
            self._next_number = max(self._next_number, number + 1)
            try:
                if number < self.folder.first_number:
                    raise segments.SegmentError("it is forgotten")
                layout, entries, file_bytes = segments.read_table(
                    self.folder.descriptor, name, self.folder.fingerprint, page_bytes
                )
            except (segments.SegmentError, OSError) as error:
                if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
                    raise
                # An empty file is a segment that was just being begun.
                self.num_damaged += number >= self.folder.first_number and self.folder.size_of(name) > 0
                logger.info("%s/%s is removed: %s", self.folder.path, name, error)
                self.folder.remove(name)
                continue
            segment = Segment(layout=layout, file_bytes=file_bytes, num_taken=layout.num_slots)
            self.index.segments[number] = segment
            for entry in entries:
                self.index.add(segment, entry.slot, entry.key, entry.check)
        self._make_room(0)

    def _begin(self, group: int) -> Segment:
        self._make_room(self._layouts[group].max_bytes)
        while True:
            layout = replace(self._layouts[group], number=self._next_number)
            self._next_number += 1
            with contextlib.suppress(FileExistsError):  # somebody else's; it is left alone
                file = segments.create(self.folder.descriptor, layout, self.folder.fingerprint)
                break
        segment = Segment(layout=layout, file_bytes=layout.max_bytes, file=file)
        with self.lock:
            self.index.segments[layout.number] = segment
        return segment

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was used longest ago until so many bytes fit; OSError if they will not."""
        self._sweep()
        while self.stored_bytes + num_bytes > self.capacity_bytes:
            self._evict()
        idle = self.folder.idle_segments()
        # If a store has just been left by its process, it is not emptied for one segment.
        idle_bytes = sum(size for _, size, _ in idle)
        too_many = min(self.stored_bytes + idle_bytes + num_bytes - self.capacity_bytes, num_bytes)
        too_many = max(too_many, num_bytes - self._free_bytes())
        for _, size, path in idle:
            if too_many > 0 and self.folder.remove_idle(path):
                too_many -= size
        # Some file systems say late that they have got room back: what is missing is asked for once.
        missing = num_bytes - self._free_bytes()
        while missing > 0:
            missing -= self._evict()

    def _free_bytes(self) -> int:
        """What the file system has left besides what segments that are being filled will take."""
        with self.lock:
            filling = [each for each in self.index.segments.values() if each.file is not None]
            promised_bytes = sum(each.file_bytes - each.layout.offset(each.num_taken) for each in filling)
        return self.folder.free_bytes() - promised_bytes

    def _evict(self) -> int:
        with self.lock:
            segment = self.index.next_to_go()
            if segment is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            slots = [] if self.rescued is None else self.index.worth_keeping(segment)
        kept = self.keep(segment, slots)
        with self.changes, self.lock:
            kept = [write for write in kept if (self.index.place(write.group, write.key) or (None,))[0] is segment]
            self.num_evicted += segment.num_live - len(kept)
            self._doom(segment)
            for write in kept:
                self.index.begin_write(write)
        if self.rescued is not None:
            self.rescued(kept)
        self._sweep()
        return segment.file_bytes

    def _void(self, segment: Segment) -> None:
        """None of its pages is to be found, nor those that are being written to it."""
        segment.is_void = True
        if self._filling[segment.layout.group] is segment:
            self._filling[segment.layout.group] = None
        self._doom(segment)

    def _doom(self, segment: Segment) -> None:
        """Its pages are not found any more; its file is removed when `_sweep` comes to it."""
        if self.index.segments.get(segment.layout.number) is not segment:
            return
        self.index.drop(segment)
        self._end(segment)
        self._doomed.append(segment)

    def _end(self, segment: Segment) -> None:
        """Nothing is written to a segment any more, unless somebody is just doing it."""
        if segment.file is not None and not segment.num_writing:
            segment.file_bytes = segment.layout.offset(segment.num_taken)
            self._ended.append(segment.file)
            segment.file = None

    def _close_ended(self) -> None:
        """Without `lock`: to close a file may take as long as to write it."""
        with contextlib.suppress(IndexError):  # several threads may do this
            while True:
                os.close(self._ended.popleft())

    def _sweep(self) -> None:
        self._close_ended()
        while self._doomed:
            self.folder.remove(self._doomed[0].layout.name)
            with self.lock:
                del self._doomed[0]
