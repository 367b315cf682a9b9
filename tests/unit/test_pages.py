"""Pages are handed out once, tables grow by whole pages, and both notice when their books do not balance."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow.batch import Int64, NewPages
from nanoflow.kvcache import OutOfPagesError, PagePool, PageTables


def ints(*values: int) -> Int64:
    return np.array(values, dtype=np.int64)


def make_tables(num_pages: int, *, num_rows: int = 3, page_size: int = 4) -> tuple[PagePool, PageTables]:
    pool = PagePool(num_pages)
    return pool, PageTables(pool, num_rows=num_rows, max_tokens=num_pages * page_size, page_size=page_size)


def try_grow(tables: PageTables, rows: Int64, num_tokens: Int64) -> bool:
    """Pages for so many tokens of each row; False if too few are free."""
    try:
        tables.grow(rows, tables.num_missing(rows, num_tokens))
    except OutOfPagesError:
        return False
    return True


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
    with pytest.raises(RuntimeError, match="given back more often than taken"):
        pool.check_integrity()


def test_rows_grow_by_whole_pages_all_at_once() -> None:
    pool, tables = make_tables(10)
    rows = ints(2, 0)
    assert try_grow(tables, rows, ints(4, 5))
    assert tables.num_held(rows).tolist() == [1, 2] and pool.num_in_use == 3
    assert try_grow(tables, rows, ints(4, 8))
    assert pool.num_in_use == 3
    before = tables.slots(ints(2, 0, 0), ints(0, 0, 4))
    assert try_grow(tables, rows, ints(13, 9))
    assert tables.num_held(rows).tolist() == [4, 3]
    assert tables.slots(ints(2, 0, 0), ints(0, 0, 4)).tolist() == before.tolist()
    tables.check_integrity()


def test_growing_is_all_or_nothing() -> None:
    pool, tables = make_tables(3)
    assert try_grow(tables, ints(0), ints(8))
    assert not try_grow(tables, ints(0, 1), ints(9, 4))
    assert tables.num_held(ints(0, 1, 2)).tolist() == [2, 0, 0] and pool.num_free == 1
    assert try_grow(tables, ints(), ints())


def test_a_row_never_shrinks_until_released() -> None:
    pool, tables = make_tables(4)
    assert try_grow(tables, ints(1), ints(16))
    assert try_grow(tables, ints(1), ints(3))
    assert pool.num_free == 0
    tables.release(ints(1))
    assert pool.num_free == 4 and tables.num_held(ints(1)).tolist() == [0]
    tables.release(ints(1))
    tables.check_integrity()


def test_slots_follow_the_table() -> None:
    _, tables = make_tables(6)
    assert (
        try_grow(tables, ints(0), ints(5)) and try_grow(tables, ints(1), ints(4)) and try_grow(tables, ints(0), ints(9))
    )
    pages = tables.drain(ints(0)).pages
    expected = [int(pages[position // 4]) * 4 + position % 4 for position in range(9)]
    slots = tables.slots(np.zeros(9, dtype=np.int64), np.arange(9))
    assert slots.tolist() == expected and slots.dtype == np.int64
    assert int(tables.slots(ints(1), ints(2))[0]) == int(tables.drain(ints(1)).pages[0]) * 4 + 2


def entries(new: NewPages) -> dict[tuple[int, int], int]:
    """Page of each (row, column); no place may stand there twice."""
    places = list(zip(new.rows.tolist(), new.columns.tolist(), strict=True))
    assert len(set(places)) == len(places) == len(new)
    return dict(zip(places, new.pages.tolist(), strict=True))


def test_every_page_is_told_once_to_those_who_ask_for_its_row() -> None:
    _, tables = make_tables(9)
    assert try_grow(tables, ints(0, 1), ints(1, 12)) and try_grow(tables, ints(1), ints(13))
    assert set(entries(tables.drain(ints(1)))) == {(1, 0), (1, 1), (1, 2), (1, 3)}
    assert len(tables.drain(ints(1))) == 0
    assert try_grow(tables, ints(1, 0), ints(17, 5))
    assert set(entries(tables.drain(ints(2, 0, 1)))) == {(0, 0), (0, 1), (1, 4)}
    new = tables.drain(ints(0, 1, 2))
    assert len(new) == 0 and new.rows.dtype == new.columns.dtype == new.pages.dtype == np.int32


def test_what_a_row_held_before_its_release_is_not_told_and_its_next_tenant_begins_anew() -> None:
    _, tables = make_tables(9)
    # Told and released; grown, never told, and released; grown twice by the next tenant.
    assert try_grow(tables, ints(0), ints(9)) and len(tables.drain(ints(0))) == 3
    tables.release(ints(0))
    assert try_grow(tables, ints(0), ints(9))
    tables.release(ints(0))
    tables.check_integrity()
    assert try_grow(tables, ints(0), ints(3)) and try_grow(tables, ints(0), ints(6))
    told = entries(tables.drain(ints(0)))
    assert set(told) == {(0, 0), (0, 1)}
    assert [told[0, position // 4] * 4 + position % 4 for position in range(6)] == tables.slots(
        np.zeros(6, dtype=np.int64), np.arange(6)
    ).tolist()


def test_integrity_notices_lost_and_shared_pages() -> None:
    pool, tables = make_tables(4)
    pages = pool.allocate(1)
    with pytest.raises(RuntimeError, match="lost, or held by others than is counted"):
        tables.check_integrity()
    pool.release(pages)
    tables.check_integrity()
    assert try_grow(tables, ints(0, 1), ints(4, 4))
    tables._table[1, 0] = tables._table[0, 0]
    with pytest.raises(RuntimeError, match="lost, or held by others than is counted"):
        tables.check_integrity()


def test_integrity_notices_pages_that_were_told_and_are_not_held() -> None:
    _, tables = make_tables(4)
    tables._told[1] = 1
    with pytest.raises(RuntimeError, match=r"told more pages than held: rows \[1\]"):
        tables.check_integrity()


def test_pages_that_were_handed_out_stay_what_they_are() -> None:
    """Also when others come back to where they were kept."""
    pool = PagePool(4)
    one, other = pool.allocate(1), pool.allocate(1)
    before = other.tolist()
    pool.release(one)
    assert other.tolist() == before != one.tolist()
