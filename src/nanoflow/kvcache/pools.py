"""The KV pages of running requests in all KV groups: one pool and one set of page tables for each group.

A request needs pages for its tokens in every group, so rows grow in all groups or in none. How long a page is needed
differs: with a sliding window, until no later token sees it. Who calls this knows rows and numbers of tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanoflow.batch import Int32, Int64, NewPages
from nanoflow.kvcache.events import NO_WATCH, KeyWatch
from nanoflow.kvcache.pages import PagePool
from nanoflow.kvcache.sizes import PoolSize
from nanoflow.kvcache.tables import PageTables


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrefix:
    """A prefix that need not be computed.

    Attributes:
        num_pages: Full pages of it.
        parts: For each KV group the column of its first page that later tokens see, and the pages from there on (int32
            [any]).
    """

    num_pages: int = 0
    parts: tuple[tuple[int, Int32], ...] = ()


class PagePools:
    """The pages of each row in G groups.

    Args:
        sizes: The pool of each group.
        num_rows: Rows of the state table.
        max_tokens: Most tokens a row ever has.
        page_size: Tokens a page.
        watch: Is told which keys the pool of the first group can find; other groups may have more of a prefix, or less.
    """

    def __init__(
        self,
        sizes: Sequence[PoolSize],
        *,
        num_rows: int,
        max_tokens: int,
        page_size: int,
        watch: KeyWatch = NO_WATCH,
    ) -> None:
        self._num_rows, self._sizes = num_rows, tuple(sizes)
        self._groups = tuple(
            PageTables(
                PagePool(size.num_pages, NO_WATCH if group else watch),
                num_rows=num_rows,
                max_tokens=max_tokens,
                page_size=page_size,
                window=size.window,
            )
            for group, size in enumerate(sizes)
        )

    @property
    def pools(self) -> tuple[PagePool, ...]:
        """The pool of each group."""
        return tuple(tables.pool for tables in self._groups)

    @property
    def fullest(self) -> PagePool:
        """The pool of which the largest part is in use, of equals the first."""
        return max(self.pools, key=lambda pool: pool.num_in_use / pool.num_pages)

    @property
    def room(self) -> tuple[PoolSize, ...]:
        """The pools, with as many pages as requests would need if no page had several holders."""
        return tuple(
            replace(size, num_pages=size.num_pages + tables.pool.num_shared - tables.pool.num_reserved)
            for size, tables in zip(self._sizes, self._groups, strict=True)
        )

    def find(self, keys: Sequence[bytes]) -> CachedPrefix:
        """The longest prefix with these keys that is cached in every group, until pages are allocated."""
        stop = len(keys)
        while stop:
            parts = []
            for tables in self._groups:
                begin, pages = tables.find(keys[:stop])
                parts.append((begin, pages))
                stop = begin + len(pages)
            if all(begin + len(pages) == stop for begin, pages in parts):
                return CachedPrefix(num_pages=stop, parts=tuple(parts))
        return CachedPrefix()

    def num_held(self, prefix: CachedPrefix) -> list[int]:
        """How many pages of a prefix somebody holds, in each group."""
        if not prefix.parts:
            return [0] * len(self._groups)
        return [tables.pool.num_held(pages) for tables, (_, pages) in zip(self._groups, prefix.parts, strict=True)]

    def touch(self, prefix: CachedPrefix) -> None:
        """The pages of a prefix count as used just now: the memory of others is taken first."""
        for tables, (_, pages) in zip(self._groups, prefix.parts, strict=False):
            tables.pool.hold(pages)
            tables.pool.release(pages)

    def reserve_beside(self, keys: Sequence[bytes], counts: Sequence[int], num_spare: int) -> tuple[Int32, ...] | None:
        """Reserve pages in each group, and take none for that which has one of these keys.

        Args:
            keys: Of a prefix.
            counts: Pages to reserve, for each group.
            num_spare: Pages of each pool that must stay free.

        Returns:
            The pages, int32 [count] for each group; None, and nothing has changed, if fewer are free.
        """
        parts = [pool.known(keys) for pool in self.pools]
        for pool, pages in zip(self.pools, parts, strict=True):
            pool.hold(pages)
        reserved = None
        if all(pool.num_free >= count + num_spare for pool, count in zip(self.pools, counts, strict=True)):
            reserved = tuple(pool.reserve(count) for pool, count in zip(self.pools, counts, strict=True))
        for pool, pages in zip(self.pools, parts, strict=True):
            pool.release(pages)
        return reserved

    def adopt(self, row: int, prefix: CachedPrefix) -> None:
        """Give a row that holds nothing the pages of a cached prefix."""
        for tables, (begin, pages) in zip(self._groups, prefix.parts, strict=False):
            tables.adopt(row, begin, pages)

    def cache(self, row: int, start: int, keys: Sequence[bytes]) -> list[tuple[int, Int32]]:
        """The pages of a row from the column `start` on are computed and have these keys: others may find them.

        Returns:
            For each group the index of the first key whose page the row still holds, and the pages from there on.
        """
        return [tables.cache(row, start, keys) for tables in self._groups]

    def needed(self, num_pages: int) -> list[int]:
        """For each group the first page, of so many full ones of a prefix, that the tokens after them see."""
        return [tables.needed(num_pages) for tables in self._groups]

    def forget(self, keys: Sequence[bytes]) -> None:
        """What is in the pages of these keys may be wrong: nobody shall find them, also those behind a window."""
        for tables in self._groups:
            tables.pool.forget_keys(keys)

    def forget_all(self) -> None:
        """No page is to be found any more; rows keep theirs."""
        for tables in self._groups:
            tables.pool.forget_all()

    def try_grow(self, rows: Int64, num_tokens: Int64) -> bool:
        """Give each row (int64 [N], distinct) enough pages for its `num_tokens` (int64 [N]) in every group.

        Returns:
            False, and nothing has changed, if too few pages of any group are free.
        """
        missing = [tables.num_missing(rows, num_tokens) for tables in self._groups]
        if any(each.sum() > tables.pool.num_free for tables, each in zip(self._groups, missing, strict=True)):
            return False
        for tables, each in zip(self._groups, missing, strict=True):
            tables.grow(rows, each)
        return True

    def shrink(self, rows: Int64, num_tokens: Int64) -> None:
        """Give back the pages of these rows (int64 [N], distinct) behind their first `num_tokens` (int64 [N])."""
        for tables in self._groups:
            tables.shrink(rows, num_tokens)

    def slide(self, rows: Int64, num_computed: Int64) -> None:
        """Give back what no token of these rows (int64 [N], distinct) from place `num_computed` (int64 [N]) on sees."""
        for tables in self._groups:
            tables.slide(rows, num_computed)

    def release(self, rows: Int64) -> None:
        """Give back all pages of these rows (int64 [N], distinct)."""
        for tables in self._groups:
            tables.release(rows)

    def drain(self, rows: Int64) -> NewPages:
        """The pages that these rows (int64 [N], distinct) have got since they were last drained, in all groups."""
        return NewPages.of_groups([tables.drain(rows) for tables in self._groups], num_rows=self._num_rows)

    def slots(self, rows: Int64, positions: Int64) -> Int64:
        """Places of token `positions[i]` of row `rows[i]` in each group's cache, int64 [G * N], group after group."""
        if len(self._groups) == 1:
            return self._groups[0].slots(rows, positions)
        return np.concatenate([tables.slots(rows, positions) for tables in self._groups])

    def width(self, rows: Int64) -> int:
        """Columns of the widest table of these rows."""
        return self._groups[0].width(rows)

    def check_integrity(self, rows: Int64, num_computed: Int64) -> None:
        """Raise RuntimeError unless in every group each page is free or held once, by one of these rows.

        Args:
            rows: int64 [N], those in use.
            num_computed: int64 [N], tokens that they need pages for.
        """
        for tables in self._groups:
            tables.check_integrity()
            tables.check_holders(rows, num_computed)
