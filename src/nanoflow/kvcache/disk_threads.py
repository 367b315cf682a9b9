"""Threads that write and read pages in files, and the queues in front of them.

What waits is taken in batches. While the disk takes no pages, those that come are refused at once, and one is tried
again after some seconds. What a page is and where it goes, `page_files.py` knows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from nanoflow.kvcache.page_files import PageFiles
from nanoflow.kvcache.page_reads import PageRead
from nanoflow.kvcache.segment_files import MAX_WRITERS
from nanoflow.kvcache.segment_index import PageWrite, Place, running_future
from nanoflow.kvcache.segments import Bytes

logger = logging.getLogger(__name__)

RETRY_S = 5.0
_NUM_READERS = 4
_BATCH_BYTES, _BATCH_PAGES = 8 << 20, 256


@dataclass(slots=True, kw_only=True, eq=False)
class _QueuedRead(PageRead):
    done: Future[bool] = field(default_factory=running_future)


class PageWriters:
    """Pages that wait to be written. `put` and everything that counts is used under the lock of the files.

    Args:
        pages: Where they go.
        queue_bytes: Pages of so many bytes wait, and at least one page.

    Attributes:
        num_done, num_bytes, seconds: Pages and bytes written, and seconds of threads writing.
        num_refused: Pages that were not stored though they were wanted.
        failed: Why pages are not written now; None if they are.
    """

    def __init__(self, pages: PageFiles, queue_bytes: int) -> None:
        self.num_done = self.num_bytes = self.num_refused = 0
        self.seconds = 0.0
        self.failed: str | None = None
        self._pages, self._files, self._lock = pages, pages.files, pages.files.lock
        self._queue_bytes = queue_bytes
        self._can_write, self._is_done = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue = deque[PageWrite]()
        self._waiting_bytes = self._num_busy = 0
        self._retry_s = 0.0
        self._is_closed = False
        self._files.rescued = self._put_first
        self._threads = [_started(self._loop) for _ in range(MAX_WRITERS)]

    def put(self, group: int, key: bytes, data: Bytes) -> Future[bool]:
        """Have a page written, or refuse it. It must not be on its way."""
        write = PageWrite(group=group, key=key, data=data)
        has_room = not self._waiting_bytes or self._waiting_bytes + data.nbytes <= self._queue_bytes
        if self._is_closed or not has_room or not self._may_try():
            self.num_refused += 1
            write.done.set_result(False)
        else:
            self._files.index.begin_write(write)
            self._waiting_bytes += data.nbytes
            self._queue.append(write)
            self._can_write.notify()
        return write.done

    def wake(self) -> None:
        """There may be files to remove."""
        with self._lock:
            self._can_write.notify()

    def flush(self, within_s: float) -> None:
        """Wait until nothing is to be written or removed, but no longer than so many seconds."""
        with self._lock:
            self._can_write.notify()
            self._is_done.wait_for(lambda: not (self._waiting_bytes or self._num_busy or self._must_sweep()), within_s)

    def close(self, within_s: float) -> bool:
        """Refuse what waits, and end: whether all threads have ended within so many seconds."""
        with self._lock:
            self._is_closed = True
            self._can_write.notify_all()
            left = self._drain()
        self._end(left)
        return _joined(self._threads, within_s)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless what waits is counted as it is."""
        with self._lock:
            if sum(write.data.nbytes for write in self._files.index.pending.values()) > self._waiting_bytes:
                raise RuntimeError("pages on their way are not counted as they are")

    def _may_try(self) -> bool:
        return self.failed is None or time.monotonic() >= self._retry_s

    def _must_sweep(self) -> bool:
        return self._files.has_doomed and self._may_try()

    def _put_first(self, writes: list[PageWrite]) -> None:
        """Pages of a segment that goes are written before all others, and not refused while there are threads."""
        with self._lock:
            self._waiting_bytes += sum(write.data.nbytes for write in writes)
            self._queue.extendleft(writes)
            self._can_write.notify()
            left = self._drain() if self._is_closed else []
        self._end(left)

    def _loop(self) -> None:
        while (writes := self._take()) is not None:
            begin_s, failed = time.monotonic(), None
            try:
                if writes:
                    self._pages.store([write for write in writes if not write.is_forgotten])
                else:
                    self._files.sweep()
            except OSError as error:
                failed = error.strerror or str(error)
            except Exception as error:
                logger.exception("%s: KV pages were not written", self._files.folder.path)
                failed = str(error)
            with self._lock:
                self._num_busy -= 1
                self.seconds += time.monotonic() - begin_s
                left = self._note(failed, writes, begin_s)
            self._end([*writes, *left])

    def _take(self) -> list[PageWrite] | None:
        """The next pages of one group; none if only files are to be removed; None at the end."""
        with self._lock:
            while not (self._is_closed or self._queue or self._must_sweep()):
                self._can_write.wait(RETRY_S if self._files.has_doomed else None)
            if self._is_closed:
                return None
            self._num_busy += 1
            writes, num_bytes = list[PageWrite](), 0
            while self._queue and len(writes) < _BATCH_PAGES and num_bytes < _BATCH_BYTES:
                if writes and self._queue[0].group != writes[0].group:
                    break
                writes.append(self._queue.popleft())
                num_bytes += writes[-1].data.nbytes
            return writes

    def _note(self, failed: str | None, writes: Sequence[PageWrite], begin_s: float) -> list[PageWrite]:
        """Remember whether the disk takes pages. If not, those that wait are not kept waiting: they are returned."""
        if failed is None:
            # What was begun before a failure says nothing of what comes after it.
            if begin_s >= self._retry_s and any(write.is_stored for write in writes):
                self.failed = None
            return []
        if self.failed is None:
            text = "%s: no KV pages are written, which is tried again after %.0f s: %s"
            logger.warning(text, self._files.folder.path, RETRY_S, failed)
        self.failed, self._retry_s = failed, time.monotonic() + RETRY_S
        return self._drain()

    def _drain(self) -> list[PageWrite]:
        left = list(self._queue)
        self._queue.clear()
        return left

    def _end(self, writes: Sequence[PageWrite]) -> None:
        """Count pages that are not on their way any more, and tell who waits for them."""
        with self._lock:
            for write in writes:
                self._files.index.end_write(write)
                self._waiting_bytes -= write.data.nbytes
                self.num_done += write.is_stored
                self.num_bytes += write.data.nbytes if write.is_stored else 0
                self.num_refused += not write.is_stored and not write.is_forgotten
        for write in writes:
            write.done.set_result(write.is_stored)
        with self._lock:
            self._is_done.notify_all()


class PageReaders:
    """Pages that wait to be read. `put` and everything that counts is used under the lock of the files.

    Args:
        pages: Where they are.

    Attributes:
        num_done, num_bytes, seconds: Pages and bytes read, and seconds of threads reading.
        num_refused: Pages that were asked for and not read.
    """

    def __init__(self, pages: PageFiles) -> None:
        self.num_done = self.num_bytes = self.num_refused = 0
        self.seconds = 0.0
        self._pages, self._lock = pages, pages.files.lock
        self._can_read = threading.Condition(self._lock)
        self._queue = deque[_QueuedRead]()
        self._is_closed = False
        self._threads = [_started(self._loop) for _ in range(_NUM_READERS)]

    def put(self, key: bytes, place: Place, into: Bytes) -> Future[bool]:
        """Have a page read."""
        read = _QueuedRead(key=key, place=place, into=into, num_forgets=self._pages.num_forgets)
        if self._is_closed:
            self.num_refused += 1
            read.done.set_result(False)
        else:
            self._queue.append(read)
            self._can_read.notify()
        return read.done

    def close(self, within_s: float) -> bool:
        """Refuse what waits, and end: whether all threads have ended within so many seconds."""
        with self._lock:
            self._is_closed = True
            self._can_read.notify_all()
            left = list(self._queue)
            self._queue.clear()
        self._end(left, 0.0)
        return _joined(self._threads, within_s)

    def _loop(self) -> None:
        while (reads := self._take()) is not None:
            begin_s = time.perf_counter()
            try:
                self._pages.load(reads)
            except Exception:
                logger.exception("%s: KV pages were not read", self._pages.files.folder.path)
            self._end(reads, time.perf_counter() - begin_s)

    def _take(self) -> list[_QueuedRead] | None:
        """The next reads, no more than leave some for other threads; None at the end."""
        with self._lock:
            while not self._is_closed and not self._queue:
                self._can_read.wait()
            if self._is_closed:
                return None
            share = min(-(-len(self._queue) // _NUM_READERS), _BATCH_PAGES)
            reads, num_bytes = list[_QueuedRead](), 0
            while self._queue and len(reads) < share and num_bytes < _BATCH_BYTES:
                reads.append(self._queue.popleft())
                num_bytes += reads[-1].into.nbytes
            return reads

    def _end(self, reads: Sequence[_QueuedRead], seconds: float) -> None:
        with self._lock:
            self.seconds += seconds
            for read in reads:
                self.num_done += read.is_read
                self.num_bytes += read.into.nbytes if read.is_read else 0
                self.num_refused += not read.is_read
        for read in reads:
            read.done.set_result(read.is_read)


def _started(loop: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=loop, name="KV pages on disk", daemon=True)
    thread.start()
    return thread


def _joined(threads: Sequence[threading.Thread], within_s: float) -> bool:
    end_s = time.monotonic() + within_s
    for thread in threads:
        thread.join(max(end_s - time.monotonic(), 0.0))
    return not any(thread.is_alive() for thread in threads)
