"""Pools of several KV groups: rows grow in all or in none, and a window bounds what a request holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.batch import Int64
from nanoflow.kvcache import PagePools, PoolSize
from nanoflow.kvcache.sizes import Demand, chunk_pages, longest_sequence, most_pages, window_pages
from nanoflow.scheduler.admission import num_admissible
from nanoflow.scheduler.lengths import OutputLength
from nanoflow.scheduler.limits import SchedulerLimits
from tests.unit.test_admission import progress


def ints(*values: int) -> Int64:
    return np.array(values, dtype=np.int64)


def make_pools(*sizes: tuple[int, int | None], num_rows: int = 3, page_size: int = 4) -> PagePools:
    pools = [PoolSize(num_pages=num_pages, window=window) for num_pages, window in sizes]
    return PagePools(pools, num_rows=num_rows, max_tokens=64, page_size=page_size)


def num_held(pools: PagePools, row: int) -> list[int]:
    return [int(tables.num_held(ints(row))[0]) for tables in pools._groups]


def test_rows_grow_in_all_groups_or_in_none() -> None:
    pools = make_pools((9, None), (3, 5))
    assert pools.try_grow(ints(0), ints(8))
    assert not pools.try_grow(ints(0, 1), ints(8, 8))
    assert num_held(pools, 0) == [2, 2] and num_held(pools, 1) == [0, 0]
    pools.check_integrity(ints(0), ints(8))


def test_pages_are_free_once_no_later_token_sees_them() -> None:
    """A window of 5 tokens: token 8 sees 4 to 8, token 12 sees 8 to 12."""
    pools = make_pools((9, None), (9, 5))
    assert pools.try_grow(ints(0), ints(8))
    for num_computed, held in ((7, 2), (8, 1), (11, 1), (12, 1)):
        assert pools.try_grow(ints(0), ints(max(num_computed, 8)))
        pools.slide(ints(0), ints(num_computed))
        assert num_held(pools, 0) == [-(-max(num_computed, 8) // 4), held + (num_computed == 11)]
    pools.check_integrity(ints(0), ints(12))
    pools.release(ints(0))
    assert num_held(pools, 0) == [0, 0] and all(tables.pool.num_in_use == 0 for tables in pools._groups)


def test_a_row_that_begins_in_the_middle_gets_only_what_is_seen() -> None:
    pools = make_pools((9, None), (9, 5))
    pools.slide(ints(1), ints(22))
    assert pools.try_grow(ints(1), ints(23))
    assert num_held(pools, 1) == [6, 2]
    new = pools.drain(ints(1))
    assert new.columns[new.rows == 1].tolist() == [0, 1, 2, 3, 4, 5]
    assert new.columns[new.rows == 3 + 1].tolist() == [4, 5], "tables of the second group follow those of the first"


def test_tokens_that_are_taken_back_give_pages_back_in_every_group() -> None:
    pools = make_pools((9, None), (9, 5))
    assert pools.try_grow(ints(0), ints(13))
    pools.slide(ints(0), ints(9))
    pools.shrink(ints(0), ints(10))
    assert num_held(pools, 0) == [3, 2]
    pools.check_integrity(ints(0), ints(10))


def test_slots_of_all_groups_stand_one_after_the_other() -> None:
    pools = make_pools((9, None), (9, 5))
    assert pools.try_grow(ints(1, 0), ints(6, 9))
    rows, positions = ints(0, 1), ints(8, 5)
    expected = [int(slot) for tables in pools._groups for slot in tables.slots(rows, positions)]
    assert pools.slots(rows, positions).tolist() == expected and len(expected) == 4
    assert pools.width(rows) == 3


def test_the_fullest_pool_is_that_with_the_largest_part_in_use() -> None:
    pools = make_pools((9, None), (4, 5))
    assert pools.fullest.num_pages == 9, "of equals the first"
    assert pools.try_grow(ints(0), ints(5))
    assert (pools.fullest.num_in_use, pools.fullest.num_pages) == (2, 4)


def test_a_page_that_is_needed_and_gone_is_noticed() -> None:
    pools = make_pools((9, 5))
    assert pools.try_grow(ints(0), ints(12))
    pools.slide(ints(0), ints(12))
    pools.check_integrity(ints(0), ints(12))
    with pytest.raises(RuntimeError, match="more or fewer pages"):
        pools.check_integrity(ints(0), ints(11))
    with pytest.raises(RuntimeError, match="rows that are not in use"):
        pools.check_integrity(ints(), ints())


@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30)), min_size=1, max_size=6),
)
def test_windows_and_chunks_bound_what_requests_hold(
    window: int, page_size: int, requests: list[tuple[int, int]]
) -> None:
    pools = PagePools([PoolSize(num_pages=1000, window=window)], num_rows=6, max_tokens=120, page_size=page_size)
    rows, (before, taken) = np.arange(len(requests)), np.array(requests).T
    pools.slide(rows, before)
    assert pools.try_grow(rows, before + taken)
    held = pools._groups[0].num_held(rows)
    most = len(requests) * window_pages(window, page_size) + chunk_pages(int(taken.sum()), page_size)
    assert held.sum() <= most
    for count, total, chunk in zip(held, before + taken, taken, strict=True):
        assert count <= most_pages(window, int(total), page_size=page_size, max_batch_tokens=int(chunk))


DEMAND = Demand(max_num_seqs=4, max_model_len=1000, max_batch_tokens=64, page_size=16)


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.one_of(st.none(), st.integers(1, 1200)), st.integers(1, 5000)), min_size=1, max_size=4),
)
def test_pools_fill_the_room_and_no_more(room_bytes: int, groups: list[tuple[int | None, int]]) -> None:
    pools = DEMAND.divide(room_bytes, groups)
    used = sum(pool.num_pages * page_bytes for pool, (_, page_bytes) in zip(pools, groups, strict=True))
    assert used <= room_bytes
    largest = max(pool.num_pages for pool in pools)
    growing = [page_bytes for pool, (_, page_bytes) in zip(pools, groups, strict=True) if pool.num_pages == largest]
    for pool in pools:
        assert pool.num_pages in (largest, DEMAND.useful_pages(pool.window))
    if any(pool.window is None or pool.num_pages < DEMAND.useful_pages(pool.window) for pool in pools):
        assert used + sum(growing) > room_bytes, "one page more of each that can use it does not fit"


def test_what_a_window_saves_goes_to_the_layers_without_one() -> None:
    """4 requests in a window of 100 use at most 4 x (7 + 2) pages and 4 for chunks, so the others get the rest."""
    assert DEMAND.useful_pages(100) == 4 * 9 + 4
    groups: list[tuple[int | None, int]] = [(None, 10), (100, 50)]
    assert [pool.num_pages for pool in DEMAND.divide(600, groups)] == [10, 10]
    assert [pool.num_pages for pool in DEMAND.divide(60 * 40 + 10 * 7, groups)] == [47, 40]
    assert [pool.num_pages for pool in DEMAND.bounded(30, [None, 100])] == [30, 30]
    assert [pool.num_pages for pool in DEMAND.bounded(99, [None, 100])] == [99, 40]
    assert DEMAND.useful_bytes(groups) == 4 * 63 * 10 + 40 * 50


def test_the_longest_sequence_is_that_of_the_scarcest_pool() -> None:
    def longest(*sizes: tuple[int, int | None]) -> int:
        pools = [PoolSize(num_pages=num_pages, window=window) for num_pages, window in sizes]
        return longest_sequence(pools, 1000, page_size=16, max_batch_tokens=64)

    assert longest((63, None)) == 1000
    assert longest((62, None), (63, 100)) == 992
    assert longest((63, None), (9 + 4, 100)) == 1000, "a window and a chunk are enough"
    assert longest((63, None), (9 + 3, 100)) == 12 * 16
    limits = {"max_batch_tokens": 64, "max_num_seqs": 4, "max_model_len": 1000, "page_size": 16, "vocab_size": 9}
    for num_pages in (13, 12):
        pools = (PoolSize(num_pages=63), PoolSize(num_pages=num_pages, window=100))
        if num_pages == 13:
            assert SchedulerLimits(num_pages=63, group_pools=pools, **limits).pools == pools
        else:
            with pytest.raises(ValueError, match=r"exceeds the KV cache: 12 pages of 16 tokens hold 192"):
                SchedulerLimits(num_pages=63, group_pools=pools, **limits)


def test_a_window_lets_more_requests_in_and_never_more_than_every_pool_holds() -> None:
    """Requests of 100 tokens and 100 to come: 20 pages of 10 tokens each, in a window of 11 at most 4."""

    def admitted(*sizes: tuple[int, int | None]) -> int:
        return num_admissible(
            progress([]),
            progress([(100, 100)] * 6),
            OutputLength().counted_remaining,
            pools=[PoolSize(num_pages=num_pages, window=window) for num_pages, window in sizes],
            page_size=10,
            max_batch_tokens=20,
        )

    assert window_pages(11, 10) == 3 and chunk_pages(20, 10) == 2
    assert admitted((60, None)) == 3
    assert admitted((1000, None), (3 * 5 + 2, 11)) == 5
    assert admitted((60, None), (3 * 5 + 2, 11)) == 3
    assert admitted((40, None), (6, 11)) == 1
    # Where nobody reaches the window, a request needs what it would without one.
    assert admitted((60, 500)) == 3
    assert [admitted((3 * count + 2, 11)) for count in range(1, 8)] == [1, 2, 3, 4, 5, 6, 6]
