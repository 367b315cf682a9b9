"""The pool of KV pages: which are free, how many requests hold each, and which may be used again.

A page is `page_size` consecutive token slots of the KV cache, in every layer of a KV group. Several requests with the
same prefix hold its pages together. A page that nobody holds is free; if it is cached (`cached.py`), it keeps what is
in it until no other page is free. This file hands out ids and takes them back; it does not know who holds a page
(`tables.py`) nor where the memory is (`executor/`).
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Sequence

import numpy as np

from nanoflow.batch import Bool, Int32
from nanoflow.kvcache.cached import CachedPages
from nanoflow.kvcache.events import NO_WATCH, KeyWatch


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free; nothing was taken."""


class PagePool:
    """Pages 0..num_pages-1; the watch is told of every key that can be found, or can no more.

    Raises:
        ValueError: Fewer than one page.

    Attributes:
        num_pages: Pages, free or not.
        num_shared: Holders beyond the first of each page: so many pages more would be in use without sharing.
        num_reserved: Pages that are being filled with a copy from host memory; nobody holds them yet.
    """

    def __init__(self, num_pages: int, watch: KeyWatch = NO_WATCH) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self.num_shared = self.num_reserved = 0
        self._num_holders = np.zeros(num_pages, dtype=np.int32)
        self._is_reserved = np.zeros(num_pages, dtype=np.bool_)
        self._cached = CachedPages(num_pages, watch)
        # Free and not cached: the first so many of the stack.
        self._num_empty = num_pages
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # the first page handed out is page 0

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can still give."""
        return self._num_empty + self._cached.num_idle

    @property
    def num_in_use(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - self.num_free - self.num_reserved

    @property
    def num_evicted(self) -> int:
        """Cached pages whose memory was needed for others, since the start."""
        return self._cached.num_evicted

    def allocate(self, count: int) -> Int32:
        """Take `count` free pages, int32 [count], in no particular order; those that are not cached first.

        Raises:
            OutOfPagesError: Fewer than `count` are free.
        """
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages asked for, {self.num_free} of {self.num_pages} are free")
        num_taken = min(count, self._num_empty)
        self._num_empty -= num_taken
        pages = self._stack[self._num_empty : self._num_empty + num_taken].copy()
        if num_taken < count:
            pages = np.concatenate((pages, self._cached.evict(count - num_taken)))
        self._num_holders[pages] = 1
        return pages

    @property
    def cached_keys(self) -> KeysView[bytes]:
        """The keys of all pages that can be found."""
        return self._cached.keys

    def has(self, key: bytes) -> bool:
        """Whether a page with this key can be found."""
        return key in self._cached.keys

    @property
    def num_filled(self) -> int:
        """Pages that somebody holds, or that can be found."""
        return self.num_pages - self._num_empty

    def find(self, keys: Sequence[bytes]) -> Int32:
        """The cached pages of these keys, up to the first that has none, int32 [any]."""
        return np.array(self._cached.find(keys), dtype=np.int32)

    def known(self, keys: Iterable[bytes]) -> Int32:
        """The cached pages of these keys, of those that have one, int32 [any]."""
        return np.array(self._cached.known(keys), dtype=np.int32)

    def num_held(self, pages: Int32) -> int:
        """How many of these pages (int32 [N]) somebody holds."""
        return int(np.count_nonzero(self._num_holders[pages]))

    def hold(self, pages: Int32) -> None:
        """One holder more for each of these pages (int32 [N], distinct), which are cached or held."""
        idle = pages[self._num_holders[pages] == 0]
        self._cached.set_held(idle)
        self._num_holders[pages] += 1
        self.num_shared += len(pages) - len(idle)

    def release(self, pages: Int32) -> None:
        """One holder less for each of these pages (int32 [N]), as often as it is named.

        Of the cached pages that nobody holds then, the last named is the first whose memory is taken: name the pages
        of a prefix in their order.
        """
        np.subtract.at(self._num_holders, pages, 1)
        is_left = self._num_holders[pages] == 0
        left = pages[is_left]
        if self.num_shared:
            # A page that several name at once is left once.
            left = left[np.sort(np.unique(left, return_index=True)[1])]
            self.num_shared -= len(pages) - len(left)
        is_cached = self._cached.is_cached[left]
        if is_cached.any():
            self._cached.set_idle(left[is_cached])
            left = left[~is_cached]
        self._push(left)

    def reserve(self, count: int) -> Int32:
        """Take `count` free pages, int32 [count], to be filled; `settle` or `cancel` gives them back.

        Raises:
            OutOfPagesError: Fewer than `count` are free.
        """
        pages = self.allocate(count)
        self._is_reserved[pages] = True
        self.num_reserved += count
        return pages

    def settle(self, pages: Int32, keys: Sequence[bytes]) -> None:
        """Reserved pages (int32 [N], first ones first) have what the N keys say: they are cached, and free."""
        for page, key in zip(pages.tolist(), keys, strict=True):
            self._cached.add(page, key)
        self.cancel(pages)

    def cancel(self, pages: Int32) -> None:
        """Reserved pages (int32 [N]) are free again."""
        self._is_reserved[pages] = False
        self.num_reserved -= len(pages)
        self.release(pages)

    def cache(self, page: int, key: bytes) -> None:
        """A page that somebody holds has the tokens that the key stands for: it can be found and used again."""
        self._cached.add(page, key)

    def forget(self, pages: Int32) -> None:
        """These pages (int32 [N]) are not to be found any more: what is in them is wrong."""
        self._push(self._cached.forget(pages.tolist()))

    def forget_keys(self, keys: Iterable[bytes]) -> None:
        """The pages of these keys are not to be found any more: what is in them is wrong."""
        self._push(self._cached.forget(self._cached.known(keys)))

    def forget_all(self) -> None:
        """No page is to be found any more; who holds pages keeps them."""
        self.forget(np.flatnonzero(self._cached.is_cached).astype(np.int32))

    def empty_mask(self) -> Bool:
        """Which pages are free and not cached, bool [num_pages].

        Raises:
            RuntimeError: A page is free twice: somebody gave it back twice.
        """
        counts = np.bincount(self._stack[: self._num_empty], minlength=self.num_pages)
        if counts.max() > 1:
            raise RuntimeError(f"pages free more than once: {np.flatnonzero(counts > 1).tolist()}")
        return np.equal(counts, 1)

    def num_holders(self) -> Int32:
        """Holders of each page, int32 [num_pages]; 0 for reserved pages.

        Raises:
            RuntimeError: Pages that are free, held or cached are not counted as they are.
        """
        is_empty = self.empty_mask()
        wrong = np.flatnonzero(self._num_holders < 0)
        if len(wrong):
            raise RuntimeError(f"pages given back more often than taken: {wrong.tolist()}")
        if self._num_holders[is_empty].any():
            raise RuntimeError("a page that somebody holds is free")
        if np.maximum(self._num_holders - 1, 0).sum() != self.num_shared:
            raise RuntimeError("holders of shared pages are not counted as they are")
        self._cached.check_integrity(self._num_holders)
        if ((self._num_holders == 0) & ~self._cached.is_cached & ~is_empty).any():
            raise RuntimeError("a page that nobody holds is lost")
        if (
            np.count_nonzero(self._is_reserved) != self.num_reserved
            or (self._num_holders[self._is_reserved] != 1).any()
        ):
            raise RuntimeError("a page that is being filled is held by somebody, or not counted")
        return self._num_holders - self._is_reserved.astype(np.int32)

    def check_integrity(self) -> None:
        """Raise RuntimeError if a page is lost, free twice, or free and held."""
        self.num_holders()

    def _push(self, pages: Int32) -> None:
        self._stack[self._num_empty : self._num_empty + len(pages)] = pages
        self._num_empty += len(pages)
