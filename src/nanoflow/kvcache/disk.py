"""The disk tier of the KV cache: pages that have left the host's memory, kept in files and found again by their keys.

The engine's thread asks which pages are there, which is one look into a dict a page. It hands over pages to write and
arrays to read into, and gets futures; threads do the work (`disk_threads.py`) on files (`page_files.py`). Nothing the
disk does stops the engine: what cannot be written is refused, what cannot be read is not there, and a page that is read
is the page that was written. Of pages this knows no more than their bytes and keys.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanoflow.kvcache.disk_threads import PageReaders, PageWriters
from nanoflow.kvcache.keys import KEY_BYTES
from nanoflow.kvcache.page_files import PageFiles
from nanoflow.kvcache.segment_files import SegmentFiles
from nanoflow.kvcache.segments import Bytes
from nanoflow.kvcache.store_folder import DiskError, StoreFolder

__all__ = ["DiskCounts", "DiskError", "DiskTier"]

logger = logging.getLogger(__name__)

_QUEUE_BYTES = 256 << 20
_END_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCounts:
    """What a disk tier has done since it was opened.

    Attributes:
        num_written, bytes_written, write_s: Pages and bytes that were written, and seconds of threads writing.
        num_hits, bytes_read, read_s: The same of reads that gave the page.
        num_misses: Reads that did not.
        num_evicted: Pages whose room was needed for others.
        num_damaged: Pages that were lost or not as they were written, and segments that could not be read at the start.
        num_refused: Pages that were not stored: too many waited, or the disk did not take them.
        num_pages, stored_bytes: Pages that can be found now, and bytes of all files.
        failed: Why pages are not written now; None if they are.
    """

    num_written: int = 0
    bytes_written: int = 0
    write_s: float = 0.0
    num_hits: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    num_misses: int = 0
    num_evicted: int = 0
    num_damaged: int = 0
    num_refused: int = 0
    num_pages: int = 0
    stored_bytes: int = 0
    failed: str | None = None


class DiskTier:
    """Pages in files; made by `open`. Any thread may call any method.

    Args:
        pages: What is in the folder.
        page_bytes: Bytes of a page in each KV group.
        queue_bytes: Pages of so many bytes wait to be written; more are refused.
    """

    def __init__(self, pages: PageFiles, page_bytes: Sequence[int], queue_bytes: int) -> None:
        self._pages, self._files = pages, pages.files
        self._index, self._lock = self._files.index, self._files.lock
        self._page_bytes = tuple(page_bytes)
        self._writers, self._readers = PageWriters(pages, queue_bytes), PageReaders(pages)
        self._num_absent = self._num_misfits = 0
        self._is_closed = False

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        capacity_bytes: int,
        fingerprint: str,
        page_bytes: Sequence[int],
        queue_bytes: int = _QUEUE_BYTES,
    ) -> DiskTier:
        """The pages of a model in a folder, with those of earlier processes.

        If another process uses the pages of this model there, this one gets a store of its own and a warning is logged.

        Args:
            folder: Is made if need be; may have pages of other models.
            capacity_bytes: Most bytes of all files. Files of other stores in the folder that no process uses count, and
                go first.
            fingerprint: Text that stands for all that the bytes of a page depend on, besides its key.
            page_bytes: Bytes of a page in each KV group.
            queue_bytes: Pages of so many bytes wait to be written; more are refused.

        Raises:
            DiskError: The folder cannot be used, or the capacity is too small.
        """
        store = StoreFolder.open(folder, fingerprint)
        try:
            return cls(PageFiles(SegmentFiles(store, capacity_bytes, page_bytes)), page_bytes, queue_bytes)
        except OSError as error:
            store.close()
            raise DiskError(f"{store.path}: {error.strerror or error}: name another folder for KV pages") from error
        except BaseException:
            store.close()
            raise

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._files.folder.path

    @property
    def counts(self) -> DiskCounts:
        """What was done until now."""
        stored_bytes = self._files.stored_bytes
        with self._lock:
            writers, readers = self._writers, self._readers
            return DiskCounts(
                num_written=writers.num_done,
                bytes_written=writers.num_bytes,
                write_s=writers.seconds,
                num_hits=readers.num_done,
                bytes_read=readers.num_bytes,
                read_s=readers.seconds,
                num_misses=readers.num_refused + self._num_absent,
                num_evicted=self._files.num_evicted,
                num_damaged=self._files.num_damaged,
                num_refused=writers.num_refused + self._num_misfits,
                num_pages=self._index.num_pages,
                stored_bytes=stored_bytes,
                failed=writers.failed,
            )

    def contains(self, group: int, key: bytes) -> bool:
        """Whether a page can be read now; it may be gone when it is."""
        return self._index.contains(group, key)

    def find(self, group: int, keys: Sequence[bytes]) -> int:
        """How many of the first keys have pages that can be read now."""
        return self._index.find(group, keys)

    def write(self, group: int, key: bytes, data: Bytes) -> Future[bool]:
        """Store a page, unless it is there.

        Args:
            group: KV group.
            key: `KEY_BYTES` bytes.
            data: uint8 [page_bytes of the group], contiguous; must stay as it is until the future is done.

        Returns:
            Whether it can be found. False: it was refused, forgotten meanwhile, or the disk has failed (`counts`).
        """
        misfit = self._misfit(group, key, data)
        if misfit is not None:
            logger.error("a page is not stored: %s", misfit)
        with self._lock:
            if misfit is not None:
                self._num_misfits += 1
                return _is(False)
            if (place := self._index.place(group, key)) is not None:
                self._index.touch(place)
                return _is(True)
            if (pending := self._index.pending.get((group, key))) is not None:
                return pending.done
            return self._writers.put(group, key, data)

    def read(self, group: int, key: bytes, into: Bytes) -> Future[bool]:
        """Read a page.

        Args:
            group: KV group.
            key: `KEY_BYTES` bytes.
            into: uint8 [page_bytes of the group], contiguous; belongs to the tier until the future is done.

        Returns:
            Whether the page is in `into`; anything may be in it otherwise. False: it is not there any more, was
            damaged (then it is forgotten), or pages were forgotten while it was read.

        Raises:
            ValueError: `into` has another size or type, or is not writable.
        """
        if (misfit := self._misfit(group, key, into)) or not into.flags.writeable:
            raise ValueError(misfit or "the array to read into is not writable")
        with self._lock:
            place = self._index.place(group, key)
            if place is None:
                self._num_absent += 1
                return _is(False)
            return self._readers.put(key, place, into)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Pages with these keys, in all groups, are never found again: what is in them is wrong. Waits for the disk."""
        self._pages.forget(keys)

    def forget_all(self) -> None:
        """No page that is there now, or on its way, is ever found again. The files are removed afterwards."""
        try:
            self._pages.forget_all()
        except OSError as error:
            logger.warning("%s: forgotten KV pages may be found after a restart: %s", self.folder, error)
        self._writers.wake()

    def flush(self, within_s: float) -> None:
        """Wait until nothing is to be written and no file to be removed, but no longer than so many seconds."""
        self._writers.flush(within_s)

    def close(self) -> None:
        """End, and let go of the folder. What waits to be written is refused: `flush` before, if it shall be kept."""
        if not self._is_closed:
            self._is_closed = True
            if self._writers.close(_END_S) and self._readers.close(_END_S):
                self._files.close()
            else:
                logger.warning("%s: the disk does not answer; what is being done there is left", self.folder)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless all is counted as it is, in memory and on disk."""
        self._files.check_integrity()
        self._writers.check_integrity()

    def _misfit(self, group: int, key: bytes, data: Bytes) -> str | None:
        """What is wrong with an array for a page; None if nothing."""
        if not 0 <= group < len(self._page_bytes) or len(key) != KEY_BYTES:
            return f"no KV group {group}, or a key of {len(key)} bytes, not {KEY_BYTES}"
        if data.dtype != np.uint8 or data.nbytes != self._page_bytes[group] or not data.flags.c_contiguous:
            return f"a page of KV group {group} is a contiguous uint8 array of {self._page_bytes[group]:,} bytes"
        return None


def _is(value: bool) -> Future[bool]:
    future = Future[bool]()
    future.set_result(value)
    return future
