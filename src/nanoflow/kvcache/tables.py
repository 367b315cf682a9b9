"""Page tables: for each row of the state table the pages that hold its tokens, first tokens first.

All rows of an iteration grow in a few vectorised operations. This file does not know which request a row belongs to,
nor when to take pages back (`scheduler/`); free pages come from `pages.py`. Every page has one holder: sharing a prefix
would add a count of holders to the pool, tiers a second pool; neither would change who calls what here.
"""

from __future__ import annotations

import numpy as np

from nanoflow.batch import Int64, NewPages
from nanoflow.kvcache.pages import PagePool


class PageTables:
    """The pages of each row, and the pool they come from.

    Args:
        pool: Where pages come from and go back to.
        num_rows: Rows of the state table.
        max_tokens: Most tokens a row ever holds.
        page_size: Tokens a page.
    """

    def __init__(self, pool: PagePool, *, num_rows: int, max_tokens: int, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._num_held = np.zeros(num_rows, dtype=np.int64)
        self._num_told = np.zeros(num_rows, dtype=np.int64)  # of those held, the first so many were handed to a batch
        self._table = np.zeros((num_rows, -(-max_tokens // page_size)), dtype=np.int32)

    def num_held(self, rows: Int64) -> Int64:
        """Pages that each of these rows holds, int64 [len(rows)]."""
        return self._num_held[rows]

    def try_grow(self, rows: Int64, num_tokens: Int64) -> bool:
        """Give each row (int64 [N], distinct) enough pages for its `num_tokens` (int64 [N]).

        Returns:
            False, and nothing has changed, if too few pages are free.
        """
        held = self._num_held[rows]
        missing = np.maximum((num_tokens + self._page_size - 1) // self._page_size - held, 0)
        num_missing = int(missing.sum())
        if num_missing > self._pool.num_free:
            return False
        if num_missing:
            growing = np.flatnonzero(missing)
            rows, held, missing = rows[growing], held[growing], missing[growing]
            first_of_row = held - (np.cumsum(missing) - missing)
            columns = np.arange(num_missing) + np.repeat(first_of_row, missing)
            self._table[np.repeat(rows, missing), columns] = self._pool.allocate(num_missing)
            self._num_held[rows] = held + missing
        return True

    def shrink(self, rows: Int64, num_tokens: Int64) -> None:
        """Give back the pages of these rows (int64 [N], distinct) behind their first `num_tokens` (int64 [N])."""
        held = self._num_held[rows]
        kept = np.minimum((num_tokens + self._page_size - 1) // self._page_size, held)
        if (kept < held).any():
            self._pool.release(self._pages(rows, kept, held).pages)
            self._num_held[rows] = kept
            self._num_told[rows] = np.minimum(self._num_told[rows], kept)

    def release(self, rows: Int64) -> None:
        """Give all pages of these rows (int64 [N], distinct) back to the pool."""
        self._pool.release(self._pages(rows, np.zeros_like(rows), self._num_held[rows]).pages)
        self._num_held[rows] = self._num_told[rows] = 0

    def drain(self, rows: Int64) -> NewPages:
        """The pages that these rows (int64 [N], distinct) have got since they were last drained, or given to a tenant.

        However often a row has grown or changed its tenant in between, each of its pages is told once.
        """
        held, told = self._num_held[rows], self._num_told[rows]
        growing = np.flatnonzero(held > told)
        self._num_told[rows] = held
        return self._pages(rows[growing], told[growing], held[growing])

    def slots(self, rows: Int64, positions: Int64) -> Int64:
        """Place in the KV cache (page * page_size + offset) of token `positions[i]` of row `rows[i]`, int64 [N]."""
        columns = positions // self._page_size
        pages = self._table.reshape(-1).take(rows * self._table.shape[1] + columns)
        return (pages - columns) * self._page_size + positions

    def _pages(self, rows: Int64, start: Int64, stop: Int64) -> NewPages:
        """Entries start[i]..stop[i]-1 of each row."""
        count = stop - start
        columns = np.arange(count.sum()) + np.repeat(start - (np.cumsum(count) - count), count)
        row_of_page = np.repeat(rows, count)
        return NewPages(
            rows=row_of_page.astype(np.int32),
            columns=columns.astype(np.int32),
            pages=self._table[row_of_page, columns],
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page is free or in exactly one table, and none was told that is not held."""
        is_held = np.arange(self._table.shape[1]) < self._num_held[:, None]
        num_holders = np.bincount(self._table[is_held], minlength=self._pool.num_pages) + self._pool.free_mask()
        wrong = np.flatnonzero(num_holders != 1)
        if len(wrong):
            raise RuntimeError(f"pages lost, or held more than once: {wrong.tolist()}")
        if (self._num_told > self._num_held).any():
            raise RuntimeError(f"told more pages than held: rows {np.flatnonzero(self._num_told > self._num_held)}")
