"""Page tables: for each row of the state table the pages that hold its tokens, first tokens first.

All rows of an iteration grow in a few vectorised operations. This file does not know which request a row belongs to,
nor when to take pages back (`scheduler/`); free pages come from `pages.py`. Rows with the same prefix may have the same
pages in their first columns.

These are the tables of one KV group; `pools.py` has those of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanoflow.batch import Int32, Int64, NewPages
from nanoflow.kvcache.pages import PagePool


class PageTables:
    """The pages of each row, and the pool they come from.

    A row holds the pages of its columns `begin` to `end - 1`. `begin` is 0 unless there is a window, behind which pages
    are given back.

    Args:
        pool: Where pages come from and go back to.
        num_rows: Rows of the state table.
        max_tokens: Most tokens a row ever holds.
        page_size: Tokens a page.
        window: How many tokens a token sees, itself among them; all before it if None.
    """

    def __init__(
        self, pool: PagePool, *, num_rows: int, max_tokens: int, page_size: int, window: int | None = None
    ) -> None:
        self.pool = pool
        self._page_size = page_size
        self._window = window
        self._begin, self._end = np.zeros((2, num_rows), dtype=np.int64)
        self._told = np.zeros(num_rows, dtype=np.int64)  # the pages before this column were handed to a batch
        self._table = np.zeros((num_rows, -(-max_tokens // page_size)), dtype=np.int32)

    def num_held(self, rows: Int64) -> Int64:
        """Pages that each of these rows holds, int64 [len(rows)]."""
        held: Int64 = self._end[rows] - self._begin[rows]
        return held

    def width(self, rows: Int64) -> int:
        """Columns that the widest table of these rows has."""
        return int(self._end[rows].max())

    def num_missing(self, rows: Int64, num_tokens: Int64) -> Int64:
        """Pages that each row (int64 [N]) lacks for its `num_tokens` (int64 [N]), int64 [N]."""
        missing: Int64 = np.maximum((num_tokens + self._page_size - 1) // self._page_size - self._end[rows], 0)
        return missing

    def grow(self, rows: Int64, num_pages: Int64) -> None:
        """Give each row (int64 [N], distinct) so many more pages (int64 [N]).

        Raises:
            OutOfPagesError: Fewer are free; nothing has changed.
        """
        growing = np.flatnonzero(num_pages)
        if len(growing):
            rows, num_pages = rows[growing], num_pages[growing]
            end = self._end[rows]
            before = np.cumsum(num_pages) - num_pages
            num_new = int(before[-1] + num_pages[-1])
            columns = np.arange(num_new) + np.repeat(end - before, num_pages)
            self._table[np.repeat(rows, num_pages), columns] = self.pool.allocate(num_new)
            self._end[rows] = end + num_pages

    def shrink(self, rows: Int64, num_tokens: Int64) -> None:
        """Give back the pages of these rows (int64 [N], distinct) behind their first `num_tokens` (int64 [N])."""
        end = self._end[rows]
        kept = np.minimum((num_tokens + self._page_size - 1) // self._page_size, end)
        if (kept < end).any():
            self.pool.release(self._pages(rows, kept, end).pages)
            self._end[rows] = kept
            self._told[rows] = np.minimum(self._told[rows], kept)

    def find(self, keys: Sequence[bytes]) -> tuple[int, Int32]:
        """The longest prefix with these keys that is cached.

        Returns:
            Its pages, of which those that later tokens do not see may be missing: the column of the first, and all from
            there on (int32 [any]). They are still cached when nothing was allocated since.
        """
        if self._window is None:
            return 0, self.pool.find(keys)
        stop = len(keys)
        while True:
            begin = self.needed(stop)
            pages = self.pool.find(keys[begin:stop])
            if begin + len(pages) == stop:
                return begin, pages
            # The first that is missing must not be needed.
            stop = begin + len(pages)

    def adopt(self, row: int, begin: int, pages: Int32) -> None:
        """Give a row that holds nothing these cached pages (int32 [N]), from the column `begin` on."""
        end = begin + len(pages)
        self.pool.hold(pages)
        self._table[row, begin:end] = pages
        self._begin[row], self._end[row], self._told[row] = begin, end, begin

    def cache(self, row: int, start: int, keys: Sequence[bytes]) -> tuple[int, Int32]:
        """The pages of a row from the column `start` on have the tokens of these keys; others may find them.

        Returns:
            Of these pages the first that the row still holds, counted from `start`, and all it holds from there on
            (int32 [any]).
        """
        begin, stop = max(start, int(self._begin[row])), min(start + len(keys), int(self._end[row]))
        pages = self._table[row, begin:stop].copy()
        for page, key in zip(pages.tolist(), keys[begin - start :], strict=False):
            self.pool.cache(page, key)
        return begin - start, pages

    def needed(self, num_pages: int) -> int:
        """The column of the first page that tokens see which follow so many full pages."""
        return 0 if self._window is None else int(self._first_seen(np.array(num_pages * self._page_size)))

    def slide(self, rows: Int64, num_computed: Int64) -> None:
        """Give back the pages that no token of these rows (int64 [N], distinct) from place `num_computed` on sees.

        A row that holds none yet begins with the first page that such a token sees.

        Args:
            rows: Of the state table.
            num_computed: int64 [N], tokens that will never be computed again, unless the row is released.
        """
        if self._window is None:
            return
        begin = self._first_seen(num_computed)
        moving = np.flatnonzero(begin > self._begin[rows])
        if len(moving):
            rows, begin = rows[moving], begin[moving]
            end = self._end[rows]
            self.pool.release(self._pages(rows, self._begin[rows], np.minimum(begin, end)).pages)
            self._begin[rows] = begin
            self._end[rows] = np.maximum(begin, end)
            self._told[rows] = np.maximum(begin, self._told[rows])

    def release(self, rows: Int64) -> None:
        """Give all pages of these rows (int64 [N], distinct) back to the pool."""
        self.pool.release(self._pages(rows, self._begin[rows], self._end[rows]).pages)
        self._begin[rows] = self._end[rows] = self._told[rows] = 0

    def drain(self, rows: Int64) -> NewPages:
        """The pages that these rows (int64 [N], distinct) have got since they were last drained, or given to a tenant.

        However often a row has grown or changed its tenant in between, each of its pages is told once.
        """
        end, told = self._end[rows], self._told[rows]
        growing = np.flatnonzero(end > told)
        self._told[rows] = end
        return self._pages(rows[growing], told[growing], end[growing])

    def slots(self, rows: Int64, positions: Int64) -> Int64:
        """Place in the KV cache (page * page_size + offset) of token `positions[i]` of row `rows[i]`, int64 [N]."""
        columns = positions // self._page_size
        pages = self._table.reshape(-1).take(rows * self._table.shape[1] + columns)
        return (pages - columns) * self._page_size + positions

    def _first_seen(self, num_computed: Int64) -> Int64:
        """The column of the first token that the next ones see."""
        assert self._window is not None
        column: Int64 = np.maximum(num_computed - self._window + 1, 0) // self._page_size
        return column

    def _pages(self, rows: Int64, start: Int64, stop: Int64) -> NewPages:
        """Entries start[i]..stop[i]-1 of each row; none where stop is not above start."""
        count = np.maximum(stop - start, 0)
        columns = np.arange(count.sum()) + np.repeat(start - (np.cumsum(count) - count), count)
        row_of_page = np.repeat(rows, count)
        return NewPages(
            rows=row_of_page.astype(np.int32),
            columns=columns.astype(np.int32),
            pages=self._table[row_of_page, columns],
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page has as many holders as tables, and none was told that is not held."""
        columns = np.arange(self._table.shape[1])
        is_held = (self._begin[:, None] <= columns) & (columns < self._end[:, None])
        num_tables = np.bincount(self._table[is_held], minlength=self.pool.num_pages)
        wrong = np.flatnonzero(num_tables != self.pool.num_holders())
        if len(wrong):
            raise RuntimeError(f"pages lost, or held by others than is counted: {wrong.tolist()}")
        if (self._told > self._end).any():
            raise RuntimeError(f"told more pages than held: rows {np.flatnonzero(self._told > self._end)}")

    def check_holders(self, rows: Int64, num_computed: Int64) -> None:
        """Raise RuntimeError unless these rows (int64 [N]) alone hold pages, and those of their `num_computed` tokens.

        With a window the pages that later tokens do not see may be missing, the first of them first.
        """
        begin, end = self._begin[rows], self._end[rows]
        too_many_gone = begin > (0 if self._window is None else self._first_seen(num_computed))
        if (end != -(-num_computed // self._page_size)).any() or too_many_gone.any():
            raise RuntimeError("a request holds more or fewer pages than its computed tokens need")
        if (end - begin).sum() - self.pool.num_shared != self.pool.num_in_use:
            raise RuntimeError("pages are held by rows that are not in use")
