"""The KV pages of running requests in all KV groups: one pool and one set of page tables for each group.

A request needs pages for its tokens in every group, so rows grow in all groups or in none. How long a page is needed
differs: with a sliding window, until no later token sees it. Who calls this knows rows and numbers of tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanoflow.batch import Int64, NewPages
from nanoflow.kvcache.pages import PagePool
from nanoflow.kvcache.sizes import PoolSize
from nanoflow.kvcache.tables import PageTables


class PagePools:
    """The pages of each row in G groups.

    Args:
        sizes: The pool of each group.
        num_rows: Rows of the state table.
        max_tokens: Most tokens a row ever has.
        page_size: Tokens a page.
    """

    def __init__(self, sizes: Sequence[PoolSize], *, num_rows: int, max_tokens: int, page_size: int) -> None:
        self._num_rows = num_rows
        self._groups = tuple(
            PageTables(
                PagePool(size.num_pages),
                num_rows=num_rows,
                max_tokens=max_tokens,
                page_size=page_size,
                window=size.window,
            )
            for size in sizes
        )

    @property
    def fullest(self) -> PagePool:
        """The pool of which the largest part is in use, of equals the first."""
        pools = (tables.pool for tables in self._groups)
        return max(pools, key=lambda pool: pool.num_in_use / pool.num_pages)

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
