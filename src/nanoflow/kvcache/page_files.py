"""Pages in files, found by key: writes them, reads them, and forgets them for good.

Every call waits for the disk; several threads may call. Who calls when, and what is refused meanwhile, is decided in
`disk_threads.py`. Which files there are and when they go, `segment_files.py` knows; the format is in `segments.py`.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from nanoflow.kvcache import segments
from nanoflow.kvcache.page_reads import PageRead, read_from
from nanoflow.kvcache.segment_files import SegmentFiles
from nanoflow.kvcache.segment_index import PageWrite, Place, Segment

_MAX_KEPT_BYTES = 32 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class PageFiles:
    """The pages in the segments of a store.

    Args:
        files: The segments.

    Attributes:
        num_forgets: How often pages were forgotten because they may be wrong.
    """

    def __init__(self, files: SegmentFiles) -> None:
        self.files = files
        self.num_forgets = 0
        self._index, self._lock = files.index, files.lock
        files.keep = self._read_again

    def store(self, writes: Sequence[PageWrite]) -> None:
        """Write pages of one group: `is_stored` says of each whether it can be found now.

        Raises:
            OSError: There is no room, or the disk has failed; some may be stored.
        """
        try:
            while writes:
                segment, slot, count = self.files.take_slots(writes[0].group, len(writes))
                try:
                    self._fill(segment, slot, writes[:count])
                finally:
                    self.files.leave(segment)
                writes = writes[count:]
        except OSError as error:
            if error.errno in _NO_SPACE:  # the next try shall find some
                with contextlib.suppress(OSError):
                    self.files.evict()
            raise

    def load(self, reads: Sequence[PageRead]) -> None:
        """Read pages: `is_read` says of each whether it is there. Pages that are damaged are forgotten."""
        ordered = sorted(reads, key=lambda read: _by_place(read.place))
        for segment, group in groupby(ordered, key=lambda read: read.place[0]):
            of_segment = list(group)
            try:
                self._forget_damaged(read_from(self.files.folder.descriptor, segment, of_segment))
            except FileNotFoundError:
                self.files.lose(segment)
            with self._lock:
                for read in of_segment:
                    # If pages were forgotten meanwhile, what is in this one may be wrong.
                    read.is_read &= read.num_forgets == self.num_forgets or self._is_at_its_place(read)
                    if read.is_read:
                        self._index.touch(read.place)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Pages with these keys are not found any more, not even after any end of the process."""
        keys = list(keys)
        with self.files.changes:
            with self._lock:
                self.num_forgets += 1
                self._index.cancel_writes(keys)
                places = [self._index.remove(group, key) for key in keys for group in range(self._index.num_groups)]
            self._erase([place for place in places if place is not None])

    def forget_all(self) -> None:
        """No page is found any more, not even after any end of the process; `SegmentFiles.sweep` removes the files.

        Raises:
            OSError: The folder does not take it: pages may be found again after a restart.
        """
        with self.files.changes:
            with self._lock:
                self.num_forgets += 1
                self._index.cancel_writes({key for _, key in self._index.pending})
            self.files.forget_all()

    def _fill(self, segment: Segment, slot: int, writes: Sequence[PageWrite]) -> None:
        """Write pages, then their entries; what was forgotten meanwhile gets none."""
        layout, file = segment.layout, segment.file
        assert file is not None
        checks = [segments.page_check(write.group, write.key, write.data) for write in writes]
        segments.write_pages(file, layout, slot, [write.data for write in writes])
        with self.files.changes:
            wanted = [not write.is_forgotten and not segment.is_void for write in writes]
            pages = list(zip(writes, checks, wanted, strict=True))
            entries = [(write.key, check) if is_wanted else None for write, check, is_wanted in pages]
            segments.write_entries(file, layout, slot, entries)
            with self._lock:
                for place, (write, check, is_wanted) in enumerate(pages, start=slot):
                    if is_wanted and not segment.is_void:
                        self._index.end_write(write)
                        self._index.add(segment, place, write.key, check, write.used_at)
                        write.is_stored = True

    def _read_again(self, segment: Segment, slots: Sequence[int]) -> list[PageWrite]:
        """The pages of these slots, as many as memory is given to."""
        group, page_bytes = segment.layout.group, segment.layout.page_bytes
        reads, used = list[PageRead](), dict[bytes, int]()
        for slot in slots[: _MAX_KEPT_BYTES // page_bytes]:
            if (key := segment.keys[slot]) is not None:
                used[key] = segment.used[slot]
                into = np.empty(page_bytes, dtype=np.uint8)
                reads.append(PageRead(key=key, place=(segment, slot), into=into, num_forgets=self.num_forgets))
        self.load(reads)
        return [
            PageWrite(group=group, key=read.key, data=read.into, used_at=used[read.key])
            for read in reads
            if read.is_read
        ]

    def _forget_damaged(self, reads: Sequence[PageRead]) -> None:
        """Pages that were not as they were written are not found any more."""
        if reads:
            with self.files.changes:
                with self._lock:
                    places = [read.place for read in reads if self._is_at_its_place(read)]
                    for segment, slot in dict.fromkeys(places):
                        key = segment.keys[slot]
                        assert key is not None
                        self._index.remove(segment.layout.group, key)
                    self.files.num_damaged += len(set(places))
                self._erase(places)

    def _is_at_its_place(self, read: PageRead) -> bool:
        return self._index.place(read.place[0].layout.group, read.key) == read.place

    def _erase(self, places: Sequence[Place]) -> None:
        """Take the entries of pages from their files; a file that does not take it is removed as a whole."""
        for segment, group in groupby(sorted(places, key=_by_place), key=lambda place: place[0]):
            try:
                segments.erase(self.files.folder.descriptor, segment.layout, [slot for _, slot in group])
            except OSError:
                self.files.lose(segment)


def _by_place(place: Place) -> tuple[int, int]:
    return place[0].layout.number, place[1]
