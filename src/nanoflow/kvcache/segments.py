"""The format of a segment: a file with pages of one KV group, which is filled from its first slot to its last.

    header    4,096 bytes: what kind of file this is, the fingerprint of the model, the sizes
    table     64 bytes a slot: key, sizes, checksum of the page, checksum of the entry itself
    slots     one page each, every one at a multiple of 4,096 bytes

All that a start must know is at the beginning of the file, so it reads no pages. An entry is written after its page
and stands for itself: what is torn or flipped costs the pages that it hits, and no others. A slot is written once.

This file knows bytes and offsets. Which files there are, and which pages are worth keeping, others say
(`page_files.py`, `segment_index.py`).
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanoflow.kvcache.keys import KEY_BYTES

Bytes = NDArray[np.uint8]

VERSION = 1
MAX_SLOTS = 4096

_MAGIC = b"nanoflow KV\r\n\x1a\n\x00"
_ALIGN_BYTES = 4096
_MAX_SEGMENT_BYTES = 128 << 20
_SEGMENTS_A_GROUP = 16
# Magic, version, group, number, bytes a page, slots, fingerprint; then the checksum of these.
_HEADER = struct.Struct("<16sIIQII32s")
# Key, number of the segment, group, slot, bytes a page, checksum of the page, zeros; then the checksum of these.
_ENTRY = struct.Struct(f"<{KEY_BYTES}sQIIIII")
_CHECK = struct.Struct("<I")
ENTRY_BYTES = _ENTRY.size + _CHECK.size
_FIRST_READ_BYTES = 2 * _ALIGN_BYTES
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class SegmentError(ValueError):
    """A file is no segment of this store: of another kind, version or model, or damaged where it says what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where things are in a segment.

    Attributes:
        number: Of the segment, counted up in its store; its file is named after it.
        group: KV group of its pages.
        page_bytes: Bytes of each page.
        num_slots: Pages that fit.
    """

    number: int
    group: int
    page_bytes: int
    num_slots: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"segment-{self.number:012d}"

    @property
    def slot_bytes(self) -> int:
        """Bytes from one slot to the next."""
        return _aligned(self.page_bytes)

    @property
    def max_bytes(self) -> int:
        """Size of the file when it is full."""
        return self.offset(self.num_slots)

    def offset(self, slot: int) -> int:
        """Where the page of a slot begins."""
        return _ALIGN_BYTES + _aligned(self.num_slots * ENTRY_BYTES) + slot * self.slot_bytes

    def entry_offset(self, slot: int) -> int:
        """Where the entry of a slot begins."""
        return _ALIGN_BYTES + slot * ENTRY_BYTES


class Entry(NamedTuple):
    """What the table says of a page: its slot, its key, and its checksum as of `page_check`."""

    slot: int
    key: bytes
    check: int


def layouts(capacity_bytes: int, page_bytes: Sequence[int]) -> list[Layout]:
    """Layouts of the segments of all KV groups, numbered 0: so small that a store has enough to remove one by one."""
    at_most_bytes = min(capacity_bytes // (_SEGMENTS_A_GROUP * len(page_bytes)), _MAX_SEGMENT_BYTES)
    return [
        Layout(
            number=0,
            group=group,
            page_bytes=size,
            num_slots=max(min(at_most_bytes // _aligned(size) - 2, MAX_SLOTS), 1),
        )
        for group, size in enumerate(page_bytes)
    ]


def page_check(group: int, key: bytes, data: Bytes) -> int:
    """Checksum of a page (uint8 [page_bytes]) under its key and group, so that no page passes for another.

    A CRC of 32 bits: of pages that were damaged anyhow, one in 2**32 is not noticed.
    """
    return zlib.crc32(data.data, zlib.crc32(key + group.to_bytes(4, "little")))


def create(folder: int, layout: Layout, fingerprint: bytes) -> int:
    """Make the file of a segment that has no pages yet.

    Args:
        folder: Descriptor of its folder.
        fingerprint: 32 bytes that stand for the model.

    Returns:
        A descriptor to write pages to.

    Raises:
        OSError: It cannot be made (FileExistsError: there is one of its name); none is left.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(layout.name, flags, 0o600, dir_fd=folder)
    sizes = (layout.group, layout.number, layout.page_bytes, layout.num_slots)
    header = _HEADER.pack(_MAGIC, VERSION, *sizes, fingerprint)
    try:
        _transfer(os.pwritev, file, [(header + _CHECK.pack(zlib.crc32(header))).ljust(_ALIGN_BYTES, b"\0")], 0)
    except OSError:
        os.close(file)
        os.unlink(layout.name, dir_fd=folder)
        raise
    return file


def open_to_read(folder: int, layout: Layout) -> int:
    """A descriptor to read the pages of a segment; OSError where there is none."""
    return os.open(layout.name, _READ_FLAGS, dir_fd=folder)


def read_table(
    folder: int, name: str, fingerprint: bytes, page_bytes: Sequence[int]
) -> tuple[Layout, list[Entry], int]:
    """What a segment has, without reading its pages.

    Args:
        folder: Descriptor of its folder.
        name: Of its file.
        fingerprint: 32 bytes that stand for the model.
        page_bytes: Bytes of a page in each KV group.

    Returns:
        Its layout, the entries that are whole and whose pages lie inside the file, and the size of the file.

    Raises:
        SegmentError: It is no segment with this name, of this model.
        OSError: It cannot be read.
    """
    file = os.open(name, _READ_FLAGS, dir_fd=folder)
    try:
        begin, file_bytes = os.pread(file, _FIRST_READ_BYTES, 0), os.fstat(file).st_size
        layout = _layout(begin, fingerprint, page_bytes)
        if layout.name != name or file_bytes > layout.max_bytes:
            raise SegmentError("it has another number or is longer than it says")
        table_bytes = layout.num_slots * ENTRY_BYTES
        table = begin[_ALIGN_BYTES : _ALIGN_BYTES + table_bytes]
        if len(table) < table_bytes:
            table += os.pread(file, table_bytes - len(table), len(begin))
    finally:
        os.close(file)
    return layout, _entries(table, layout, file_bytes), file_bytes


def write_pages(file: int, layout: Layout, slot: int, pages: Sequence[Bytes]) -> None:
    """Write pages (uint8 [page_bytes] each) to the slots from `slot` on; OSError if not all could be written."""
    gap = bytes(layout.slot_bytes - layout.page_bytes)
    _transfer(os.pwritev, file, [part for page in pages for part in (page, gap)], layout.offset(slot))


def write_entries(file: int, layout: Layout, slot: int, pages: Sequence[tuple[bytes, int] | None]) -> None:
    """Say which pages are in the slots from `slot` on, by key and checksum; None: nothing that is to be found."""
    entries = []
    for place, page in enumerate(pages, start=slot):
        entry = bytes(_ENTRY.size)
        if page is not None:
            key, check = page
            entry = _ENTRY.pack(key, layout.number, layout.group, place, layout.page_bytes, check, 0)
        entries.append(entry + _CHECK.pack(zlib.crc32(entry) if page is not None else 0))
    _transfer(os.pwritev, file, [b"".join(entries)], layout.entry_offset(slot))


def erase(folder: int, layout: Layout, slots: Sequence[int]) -> None:
    """See that the pages of these slots are not found again, not even after a power cut; OSError if that cannot be."""
    file = os.open(layout.name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
    try:
        for slot in slots:
            write_entries(file, layout, slot, [None])
        os.fdatasync(file)
    finally:
        os.close(file)


def read_pages(file: int, layout: Layout, slot: int, pages: Sequence[Bytes]) -> None:
    """Read the slots from `slot` on into these arrays (uint8 [page_bytes] each), whatever is there.

    Raises:
        OSError: The file ends before, or cannot be read.
    """
    gap = bytearray(layout.slot_bytes - layout.page_bytes)
    _transfer(os.preadv, file, [part for page in pages for part in (page, gap)], layout.offset(slot))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _layout(begin: bytes, fingerprint: bytes, page_bytes: Sequence[int]) -> Layout:
    """The layout that a header says, once it has proved right."""
    header, check = begin[: _HEADER.size], begin[_HEADER.size : _HEADER.size + _CHECK.size]
    if len(begin) < _ALIGN_BYTES or _CHECK.pack(zlib.crc32(header)) != check:
        raise SegmentError("its header is damaged")
    magic, version, group, number, size, slots, model = _HEADER.unpack(header)
    if (magic, version, model) != (_MAGIC, VERSION, fingerprint):
        raise SegmentError("it is of another kind, version or model")
    if group >= len(page_bytes) or page_bytes[group] != size or not 1 <= slots <= MAX_SLOTS:
        raise SegmentError("it has pages of another size")
    return Layout(number=number, group=group, page_bytes=size, num_slots=slots)


def _entries(table: bytes, layout: Layout, file_bytes: int) -> list[Entry]:
    found, expected = [], (layout.number, layout.group, layout.page_bytes)
    num_whole = max(file_bytes - layout.offset(0), 0) // layout.slot_bytes
    for slot in range(min(len(table) // ENTRY_BYTES, num_whole)):
        data = table[slot * ENTRY_BYTES : (slot + 1) * ENTRY_BYTES]
        if _CHECK.pack(zlib.crc32(data[: _ENTRY.size])) == data[_ENTRY.size :]:
            key, number, group, place, size, check, _ = _ENTRY.unpack_from(data)
            if (number, group, size) == expected and place == slot:
                found.append(Entry(slot=slot, key=key, check=check))
    return found


def _transfer(call: Callable[[int, list[memoryview], int], int], file: int, parts: Sequence[object], at: int) -> None:
    """Read or write all of these buffers from the offset `at` on, however much the system does at once."""
    views = [view for part in parts if (view := memoryview(part)).nbytes]  # type: ignore[arg-type]
    while views:
        done = call(file, views, at)
        if done == 0:
            raise OSError(errno.EIO, "the file ends too early")
        at += done
        while views and done >= views[0].nbytes:
            done -= views.pop(0).nbytes
        if done:
            views[0] = views[0][done:]
