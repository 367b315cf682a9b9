"""Copies KV pages between the device's caches and host memory: the work of `kvcache/copies.py`.

A slot of host memory has one page of a KV group: for each layer of the group the parts of its cache, one after the
other. On a GPU copies run on streams of their own, beside batches: pages are gathered in a staging buffer, so that few
long pieces cross PCIe.
What may be copied when is decided in `scheduler/lower_tiers.py`; here is only the order of the work on the device.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanoflow.batch import Int32, NewPages
from nanoflow.device.pinned import PinnedMemory
from nanoflow.device.transfer import to_device
from nanoflow.kernels.launch import LayerCache
from nanoflow.kvcache.copies import PageCopies

STAGING_BYTES = 32 * 2**20
"""Bytes of each of the four staging buffers on a GPU, two for each direction; or a page if that is larger."""


class PageCopier(Protocol):
    """Queues copies in the order of batches; used by the thread that queues batches."""

    def copy(self, copies: PageCopies) -> Callable[[], float]:
        """Queue copies behind all batches queued so far.

        Returns:
            Waits for their end and returns the seconds that they took, without what they waited for.
        """

    def protect(self, new_pages: NewPages) -> None:
        """The next batch writes to these pages: let it wait for copies from them."""

    def close(self) -> None:
        """Give the memory back, once all copies have ended."""


class NoCopier:
    """Copies nothing."""

    def copy(self, copies: PageCopies) -> Callable[[], float]:
        """See `PageCopier`."""
        raise RuntimeError(f"there is no host memory for {copies.num_pages} pages")

    def protect(self, new_pages: NewPages) -> None:
        """See `PageCopier`."""

    def close(self) -> None:
        """See `PageCopier`."""


class CpuCopier:
    """Copies at once.

    Args:
        caches: Of all layers.
        memory: Host memory of each KV group, a slot for each page.
    """

    def __init__(self, caches: Sequence[LayerCache], memory: PinnedMemory) -> None:
        self._host = memory
        self._groups = []
        for group, array in enumerate(memory.arrays):
            parts = [_page_bytes(part) for cache in caches if cache.group == group for part in cache.parts]
            slots = torch.split(torch.from_numpy(array), [part.shape[1] for part in parts], dim=1)
            self._groups.append(tuple(zip(parts, slots, strict=True)))

    def copy(self, copies: PageCopies) -> Callable[[], float]:
        """See `PageCopier`."""
        start_s = time.perf_counter()
        for parts, pages, slots in zip(self._groups, copies.pages, copies.slots, strict=True):
            if len(pages):
                of_cache, of_memory = torch.from_numpy(pages).long(), torch.from_numpy(slots).long()
                for part, memory in parts:
                    if copies.is_load:
                        part[of_cache] = memory[of_memory]
                    else:
                        memory[of_memory] = part[of_cache]
        time_s = time.perf_counter() - start_s
        return lambda: time_s

    def protect(self, new_pages: NewPages) -> None:
        """See `PageCopier`."""

    def close(self) -> None:
        """See `PageCopier`."""
        self._host.close()


class GpuCopier:
    """Copies in both directions at once, beside batches.

    Args:
        caches: Of all layers.
        memory: Host memory of each KV group, a slot for each page.
        num_rows: Rows of the state table.
    """

    def __init__(self, caches: Sequence[LayerCache], memory: PinnedMemory, *, num_rows: int) -> None:
        self._device = caches[0].keys.device
        self._num_rows = num_rows
        self._host = memory
        self._host_memory = [torch.from_numpy(array) for array in memory.arrays]
        from nanoflow.kernels.triton_pages import PageParts

        self._parts = [
            PageParts.of([_page_bytes(part) for cache in caches if cache.group == group for part in cache.parts])
            for group in range(len(memory.arrays))
        ]
        size = max(STAGING_BYTES, *(array.shape[1] for array in memory.arrays))
        self._save, self._load = (_Lane(size, self._device) for _ in range(2))
        # Saves that may be on their way: when they have ended, and the pages of each group.
        self._saving: deque[tuple[torch.cuda.Event, tuple[Int32, ...]]] = deque()

    def copy(self, copies: PageCopies) -> Callable[[], float]:
        """See `PageCopier`."""
        lane = self._load if copies.is_load else self._save
        lane.first.wait_stream(torch.cuda.current_stream(self._device))
        if copies.is_load:
            # What is loaded may just be being saved, and a page that is loaded to may be the source of a save.
            lane.first.wait_stream(self._save.last)
        with torch.cuda.stream(lane.first):
            on_device = [to_device(pages, self._device) for pages in copies.pages]
        start, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(lane.first)
        for group, (pages, slots) in enumerate(zip(on_device, copies.slots, strict=True)):
            self._copy_group(group, pages, slots, lane, is_load=copies.is_load)
            pages.record_stream(lane.last)
        end.record(lane.last)
        if not copies.is_load:
            self._saving.append((end, copies.pages))

        def wait() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return wait

    def protect(self, new_pages: NewPages) -> None:
        """See `PageCopier`."""
        while self._saving and self._saving[0][0].query():  # type: ignore[no-untyped-call]
            self._saving.popleft()
        if not self._saving or not len(new_pages):
            return
        group_of = new_pages.rows // self._num_rows
        for end, pages in self._saving:
            if any(np.isin(new_pages.pages[group_of == group], of_group).any() for group, of_group in enumerate(pages)):
                torch.cuda.current_stream(self._device).wait_event(end)

    def close(self) -> None:
        """See `PageCopier`."""
        for lane in (self._save, self._load):
            lane.last.synchronize()
        self._host.close()

    def _copy_group(self, group: int, pages: Tensor, slots: Int32, lane: _Lane, *, is_load: bool) -> None:
        """Copy between pages, int32 [N] on the device, and slots, int32 [N]."""
        from nanoflow.kernels.triton_pages import copy_pages

        page_bytes = self._host_memory[group].shape[1]
        step = lane.num_bytes // page_bytes
        for first in range(0, len(pages), step):
            of_chunk = slice(first, first + step)
            buffer = lane.next_buffer()
            staging = buffer.memory[: len(pages[of_chunk]) * page_bytes].view(-1, page_bytes)
            with torch.cuda.stream(lane.first):
                buffer.is_free.wait()
                if is_load:
                    self._cross(group, slots[of_chunk], staging, is_load=True)
                else:
                    copy_pages(self._parts[group], pages[of_chunk], staging, is_load=False)
                buffer.is_filled.record()
            with torch.cuda.stream(lane.last):
                buffer.is_filled.wait()
                if is_load:
                    copy_pages(self._parts[group], pages[of_chunk], staging, is_load=True)
                else:
                    self._cross(group, slots[of_chunk], staging, is_load=False)
                buffer.is_free.record()

    def _cross(self, group: int, slots: Int32, staging: Tensor, *, is_load: bool) -> None:
        """Copy between slots, int32 [N], and staging, uint8 [N, page bytes], over PCIe."""
        for begin, end in runs(slots, self._host.piece_slots[group]):
            host = self._host_memory[group][int(slots[begin]) : int(slots[begin]) + end - begin]
            if is_load:
                staging[begin:end].copy_(host, non_blocking=True)
            else:
                host.copy_(staging[begin:end], non_blocking=True)


def _page_bytes(part: Tensor) -> Tensor:
    """A part of a cache as uint8 [pages, bytes of a page]."""
    return part.view(len(part), -1).view(torch.uint8)


class _Buffer:
    """Staging memory, uint8 [size], and when it has been filled and emptied again."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory: Tensor = torch.empty(size, dtype=torch.uint8, device=device)
        self.is_filled, self.is_free = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]


class _Lane:
    """The way of one direction: a piece goes to a staging buffer and then on, while the next one comes behind it.

    Attributes:
        first, last: The streams of these two steps.
        num_bytes: Of a piece at most.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.first, self.last = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self.num_bytes = num_bytes
        self._buffers = itertools.cycle([_Buffer(num_bytes, device) for _ in range(2)])

    def next_buffer(self) -> _Buffer:
        """Where the next piece goes; it may still be in use."""
        return next(self._buffers)


def runs(slots: Int32, piece_slots: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each longest run of consecutive slots, int32 [N], in one piece of memory."""
    is_border = (np.diff(slots) != 1) | (np.diff(slots // piece_slots) != 0)
    yield from itertools.pairwise([0, *(np.flatnonzero(is_border) + 1).tolist(), len(slots)])
