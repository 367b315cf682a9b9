"""The pool of KV pages: a stack of free page ids.

A page is `page_size` consecutive token slots of the KV cache, in every layer at once. This file hands out ids and takes
them back; it knows neither what lies in a page nor who holds it (`tables.py`) nor where the memory is (`executor/`).
"""

from __future__ import annotations

import numpy as np

from nanoflow.batch import Bool, Int32


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free; nothing was taken."""


class PagePool:
    """Pages 0..num_pages-1, each free or held by exactly one holder.

    Raises:
        ValueError: Fewer than one page.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self._num_pages = num_pages
        self._num_free = num_pages
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # the first page handed out is page 0

    @property
    def num_pages(self) -> int:
        """Pages, free or not."""
        return self._num_pages

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can still give."""
        return self._num_free

    @property
    def num_in_use(self) -> int:
        """Pages that somebody holds."""
        return self._num_pages - self._num_free

    def allocate(self, count: int) -> Int32:
        """Take `count` free pages, int32 [count], in no particular order.

        Raises:
            OutOfPagesError: Fewer than `count` are free.
        """
        if count > self._num_free:
            raise OutOfPagesError(f"{count} pages asked for, {self._num_free} of {self._num_pages} are free")
        self._num_free -= count
        return self._stack[self._num_free : self._num_free + count].copy()

    def release(self, pages: Int32) -> None:
        """Give back pages that `allocate` gave, int32 [any]."""
        self._stack[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)

    def free_mask(self) -> Bool:
        """Which pages are free, bool [num_pages].

        Raises:
            RuntimeError: A page is free twice: somebody gave it back twice.
        """
        counts = np.bincount(self._stack[: self._num_free], minlength=self._num_pages)
        if counts.max() > 1:
            raise RuntimeError(f"pages free more than once: {np.flatnonzero(counts > 1).tolist()}")
        return np.equal(counts, 1)

    def check_integrity(self) -> None:
        """Raise RuntimeError if a page is free twice."""
        self.free_mask()
