"""Reads of pages from one segment: neighbouring slots in one call, and every page compared with its checksum.

A page that cannot be trusted is told to the caller (`page_files.py`), who forgets it; nothing is changed here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nanoflow.kvcache import segments
from nanoflow.kvcache.segment_index import Place, Segment
from nanoflow.kvcache.segments import Bytes

# Errors that say nothing of the page: too many open files, or no memory.
PASSING_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN)


@dataclass(slots=True, kw_only=True, eq=False)
class PageRead:
    """A page that is to be read.

    Attributes:
        key: Of the page.
        place: Where it was when it was asked for.
        into: uint8 [page_bytes]; anything may be in it unless `is_read`.
        num_forgets: How often pages had been forgotten when it was asked for.
        is_read: It has the page.
    """

    key: bytes
    place: Place
    into: Bytes
    num_forgets: int
    is_read: bool = False


def read_from(folder: int, segment: Segment, reads: Sequence[PageRead]) -> list[PageRead]:
    """Read pages of one segment, in the order of their slots: `is_read` says of each whether it is right.

    Args:
        folder: Descriptor of the folder of the segment.

    Returns:
        Those that are not as they were written.

    Raises:
        FileNotFoundError: The segment is gone.
    """
    try:
        file = segments.open_to_read(folder, segment.layout)
    except FileNotFoundError:
        raise
    except OSError as error:
        return [] if error.errno in PASSING_ERRORS else list(reads)
    try:
        return [wrong for run in _runs(reads) for wrong in _read_run(file, segment, run)]
    finally:
        os.close(file)


def _runs(reads: Iterable[PageRead]) -> Iterator[list[PageRead]]:
    """Reads in the order of their slots, cut into runs of slots one after the other."""
    run = list[PageRead]()
    for read in reads:
        if run and read.place[1] != run[-1].place[1] + 1:
            yield run
            run = []
        run.append(read)
    if run:
        yield run


def _read_run(file: int, segment: Segment, run: Sequence[PageRead]) -> list[PageRead]:
    """Read a run of slots; those whose pages are not as they were written."""
    layout, first = segment.layout, run[0].place[1]
    try:
        segments.read_pages(file, layout, first, [read.into for read in run])
    except OSError as error:
        if error.errno in PASSING_ERRORS:
            return []
        if len(run) > 1:  # one of them, perhaps
            return [wrong for read in run for wrong in _read_run(file, segment, [read])]
        return list(run)
    for slot, read in enumerate(run, start=first):
        read.is_read = segments.page_check(layout.group, read.key, read.into) == segment.checks[slot]
    return [read for read in run if not read.is_read]
