"""Pages that can be used again: what is in them is known, so a request with the same prefix need not compute it.

A page is *cached* once its keys and values are computed and its key is known (`keys.py`). Cached pages that nobody
holds stay until their memory is needed: they count as free, and those used longest ago are taken first. Of one prefix
the last pages go first, since a page is of no use without all pages before it. Holders are counted in `pages.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, KeysView, Sequence

import numpy as np

from nanoflow.batch import Bool, Int32
from nanoflow.kvcache.events import NO_WATCH, KeyWatch


class CachedPages:
    """The cached pages of one pool.

    Args:
        num_pages: Pages of the pool.
        watch: Is told of every key that can be found, or can no more.

    Attributes:
        is_cached: bool [num_pages].
        num_evicted: Cached pages whose memory was taken, since the start.
    """

    def __init__(self, num_pages: int, watch: KeyWatch = NO_WATCH) -> None:
        self._watch = watch
        self.is_cached: Bool = np.zeros(num_pages, dtype=np.bool_)
        self.num_evicted = 0
        self._page_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_pages
        # Those that nobody holds, the next to be taken first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Cached pages that nobody holds."""
        return len(self._idle)

    @property
    def keys(self) -> KeysView[bytes]:
        """The keys of all cached pages."""
        return self._page_of.keys()

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of these keys, up to the first that has none."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def known(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of these keys, of those that have one."""
        return [self._page_of[key] for key in keys if key in self._page_of]

    def add(self, page: int, key: bytes) -> None:
        """A page that somebody holds has what the key says; nothing changes if another page has the same."""
        if key not in self._page_of and self._key_of[page] is None:
            self._page_of[key] = page
            self._key_of[page] = key
            self.is_cached[page] = True
            self._watch.stored(key)

    def forget(self, pages: Iterable[int]) -> Int32:
        """What is in these pages is not to be used again.

        Returns:
            int32 [any], those of them that nobody holds: they are free now.
        """
        free = []
        for page in pages:
            if self._key_of[page] is not None:
                self._remove_key(page)
                if page in self._idle:
                    del self._idle[page]
                    free.append(page)
        return np.array(free, dtype=np.int32)

    def set_idle(self, pages: Int32) -> None:
        """Nobody holds these cached pages (int32 [N]) any more. Of them the last is taken first."""
        for page in pages[::-1].tolist():
            self._idle[page] = None

    def set_held(self, pages: Int32) -> None:
        """Somebody holds these pages (int32 [N]) again that nobody held."""
        for page in pages.tolist():
            del self._idle[page]

    def evict(self, count: int) -> Int32:
        """Take the memory of so many pages that nobody holds, int32 [count]; there must be as many."""
        pages = [self._idle.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._remove_key(page)
        self.num_evicted += count
        return np.array(pages, dtype=np.int32)

    def _remove_key(self, page: int) -> None:
        key, self._key_of[page] = self._key_of[page], None
        assert key is not None
        del self._page_of[key]
        self.is_cached[page] = False
        self._watch.removed(key)

    def check_integrity(self, num_holders: Int32) -> None:
        """Raise RuntimeError unless keys and pages name each other and exactly those are idle that nobody holds.

        Args:
            num_holders: int32 [num_pages], of each page.
        """
        if any(self._key_of[page] != key for key, page in self._page_of.items()):
            raise RuntimeError("a key leads to a page that has another key")
        cached = {page for page, key in enumerate(self._key_of) if key is not None}
        if cached != set(self._page_of.values()) or cached != set(np.flatnonzero(self.is_cached).tolist()):
            raise RuntimeError("a cached page cannot be found by its key")
        if set(self._idle) != {page for page in cached if num_holders[page] == 0}:
            raise RuntimeError("cached pages that nobody holds are not those that may be taken")
