"""Pages are handed out once, tables grow by whole pages, and both notice when their books do not balance."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow.batch import Int64
from nanoflow.kvcache import OutOfPagesError, PagePool, PageTables


def ints(*values: int) -> Int64:
    return np.array(values, dtype=np.int64)


def make_tables(num_pages: int, *, num_rows: int = 3, page_size: int = 4) -> tuple[PagePool, PageTables]:
    pool = PagePool(num_pages)
    return pool, PageTables(pool, num_rows=num_rows, max_tokens=num_pages * page_size, page_size=page_size)


def test_pool_hands_out_each_page_once() -> None:
    pool = PagePool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted([*first.tolist(), *second.tolist()]) == [0, 1, 2, 3, 4]
    assert (pool.num_pages, pool.num_free, pool.num_in_use) == (5, 0, 5)
    pool.release(first)
    assert sorted(pool.allocate(2).tolist()) == sorted(first.tolist())


def test_pool_refuses_more_than_is_free_and_keeps_what_it_has() -> None:
    pool = PagePool(3)
    pool.allocate(2)
    with pytest.raises(OutOfPagesError, match="2 pages asked for, 1 of 3 are free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        PagePool(0)


def test_allocated_pages_are_a_copy() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    kept = pages.copy()
    pool.allocate(2)
    pool.release(np.array([1, 0], dtype=np.int32))
    assert pages.tolist() == kept.tolist()


def test_pool_notices_a_page_given_back_twice() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.release(pages[:1])
    pool.check_integrity()
    pool.release(pages[:1])
    with pytest.raises(RuntimeError, match="free more than once"):
        pool.check_integrity()


def test_rows_grow_by_whole_pages_all_at_once() -> None:
    pool, tables = make_tables(10)
    rows = ints(2, 0)
    assert tables.try_grow(rows, ints(4, 5))
    assert tables.num_held(rows).tolist() == [1, 2] and pool.num_in_use == 3
    assert tables.try_grow(rows, ints(4, 8))
    assert pool.num_in_use == 3
    before = tables.select(rows)
    assert tables.try_grow(rows, ints(13, 9))
    assert tables.num_held(rows).tolist() == [4, 3]
    assert tables.select(rows)[0, :1].tolist() == before[0, :1].tolist()
    assert tables.select(rows)[1, :2].tolist() == before[1, :2].tolist()
    tables.check_integrity()


def test_growing_is_all_or_nothing() -> None:
    pool, tables = make_tables(3)
    assert tables.try_grow(ints(0), ints(8))
    assert not tables.try_grow(ints(0, 1), ints(9, 4))
    assert tables.num_held(ints(0, 1, 2)).tolist() == [2, 0, 0] and pool.num_free == 1
    assert tables.try_grow(ints(), ints())


def test_a_row_never_shrinks_until_released() -> None:
    pool, tables = make_tables(4)
    assert tables.try_grow(ints(1), ints(16))
    assert tables.try_grow(ints(1), ints(3))
    assert pool.num_free == 0
    tables.release(1)
    assert pool.num_free == 4 and tables.num_held(ints(1)).tolist() == [0]
    tables.release(1)
    tables.check_integrity()


def test_slots_follow_the_table() -> None:
    _, tables = make_tables(6)
    assert tables.try_grow(ints(0), ints(5)) and tables.try_grow(ints(1), ints(4)) and tables.try_grow(ints(0), ints(9))
    pages = tables.select(ints(0))[0]
    expected = [int(pages[position // 4]) * 4 + position % 4 for position in range(9)]
    slots = tables.slots(np.zeros(9, dtype=np.int64), np.arange(9))
    assert slots.tolist() == expected and slots.dtype == np.int64
    assert int(tables.slots(ints(1), ints(2))[0]) == int(tables.select(ints(1))[0, 0]) * 4 + 2


def test_selected_tables_are_as_wide_as_the_longest_and_hold_valid_ids() -> None:
    pool, tables = make_tables(8)
    assert tables.try_grow(ints(0, 1), ints(1, 12))
    selected = tables.select(ints(0, 1))
    assert selected.shape == (2, 3) and selected.dtype == np.int32
    assert ((selected >= 0) & (selected < pool.num_pages)).all()


def test_integrity_notices_lost_and_shared_pages() -> None:
    pool, tables = make_tables(4)
    pages = pool.allocate(1)
    with pytest.raises(RuntimeError, match="lost, or held more than once"):
        tables.check_integrity()
    pool.release(pages)
    tables.check_integrity()
    assert tables.try_grow(ints(0, 1), ints(4, 4))
    tables._table[1, 0] = tables._table[0, 0]
    with pytest.raises(RuntimeError, match="lost, or held more than once"):
        tables.check_integrity()
