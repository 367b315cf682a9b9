"""Pages that several requests hold, and pages that are used again, against a model of sets and counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.batch import Int32
from nanoflow.kvcache import OutOfPagesError, PagePool
from nanoflow.kvcache.keys import KEY_BYTES, page_keys, root_key, split

NUM_PAGES = 12


def int32(*pages: int) -> Int32:
    return np.array(pages, dtype=np.int32)


def test_a_key_stands_for_all_tokens_up_to_its_page() -> None:
    root = root_key()
    keys = page_keys(range(10), 4, root)
    assert len(keys) == 2 and all(len(key) == KEY_BYTES for key in keys)
    assert page_keys(range(4, 8), 4, keys[0]) == keys[1:]
    assert page_keys([*range(4), 4, 5, 6, 8], 4, root)[0] == keys[0]
    assert page_keys([*range(4), 4, 5, 6, 8], 4, root)[1] != keys[1]
    assert page_keys([9, 1, 2, 3, *range(4, 8)], 4, root)[1] != keys[1]
    assert page_keys(range(3), 4, root) == page_keys([], 4, root) == []


def test_roots_tell_salts_apart() -> None:
    roots = [root_key(), root_key(""), root_key("a"), root_key("b"), root_key("None")]
    assert len(set(roots)) == len(roots)
    assert split(b"".join(roots)) == tuple(roots)


def test_pages_are_found_up_to_the_first_that_is_not_there() -> None:
    pool, keys = PagePool(NUM_PAGES), page_keys(range(16), 4, root_key())
    pages = pool.allocate(4)
    for place in (0, 1, 3):
        pool.cache(int(pages[place]), keys[place])
    assert pool.find(keys).tolist() == pages[:2].tolist()
    assert pool.find(keys[1:]).tolist() == pages[1:2].tolist()
    assert pool.find(page_keys(range(16), 4, root_key("other"))).tolist() == []


def test_a_page_is_free_when_its_last_holder_has_left() -> None:
    pool, keys = PagePool(NUM_PAGES), page_keys(range(8), 4, root_key())
    pages = pool.allocate(2)
    for page, key in zip(pages.tolist(), keys, strict=True):
        pool.cache(page, key)
    pool.hold(pages)
    assert (pool.num_in_use, pool.num_shared) == (2, 2)
    pool.release(pages)
    assert (pool.num_in_use, pool.num_shared) == (2, 0)
    pool.release(pages)
    assert (pool.num_in_use, pool.num_shared, pool.num_free) == (0, 0, NUM_PAGES)
    assert pool.find(keys).tolist() == pages.tolist()
    pool.hold(pages)
    assert (pool.num_in_use, pool.num_shared) == (2, 0)
    pool.check_integrity()


def test_empty_pages_go_first_then_those_used_longest_ago_and_the_last_of_a_prefix_first() -> None:
    pool = PagePool(6)
    first_keys, second_keys = (page_keys(range(start, start + 8), 4, root_key()) for start in (0, 100))
    first, second = pool.allocate(2), pool.allocate(2)
    for pages, keys in ((first, first_keys), (second, second_keys)):
        for page, key in zip(pages.tolist(), keys, strict=True):
            pool.cache(page, key)
    pool.release(second)
    pool.release(first)
    pool.allocate(2)
    assert (pool.find(first_keys).tolist(), pool.find(second_keys).tolist()) == (first.tolist(), second.tolist())
    assert pool.allocate(1).tolist() == [second[1]]
    assert pool.find(second_keys).tolist() == [second[0]]
    pool.hold(second[:1])
    # Now the first prefix was used longest ago, and the page that is held is nobody's to take.
    assert pool.allocate(2).tolist() == [first[1], first[0]]
    assert pool.find(first_keys).tolist() == [] and pool.find(second_keys).tolist() == [second[0]]
    with pytest.raises(OutOfPagesError):
        pool.allocate(1)
    assert pool.num_evicted == 3
    pool.check_integrity()


def test_what_is_wrong_is_not_found_again() -> None:
    pool, keys = PagePool(NUM_PAGES), page_keys(range(8), 4, root_key())
    pages = pool.allocate(3)
    for page, key in zip(pages.tolist(), keys, strict=False):
        pool.cache(page, key)
    pool.release(pages[1:2])
    pool.forget(pages)
    assert pool.find(keys).tolist() == [] and pool.num_in_use == 2
    pool.check_integrity()
    pool.release(pages[[0, 2]])
    assert pool.num_free == NUM_PAGES
    pool.check_integrity()


def test_of_two_pages_with_the_same_tokens_the_first_is_found() -> None:
    pool, (key,) = PagePool(NUM_PAGES), page_keys(range(4), 4, root_key())
    pages = pool.allocate(2)
    for page in pages.tolist():
        pool.cache(page, key)
    assert pool.find([key]).tolist() == pages[:1].tolist()
    pool.release(pages)
    pool.check_integrity()
    assert pool.find([key]).tolist() == pages[:1].tolist()


@dataclasses.dataclass
class Holder:
    """Pages that one request holds, first tokens first, and the keys of those that are cached."""

    pages: list[int]
    keys: list[bytes]


@given(st.data())
def test_no_page_is_lost_given_twice_or_wrong(data: st.DataObject) -> None:
    """Requests of a few prefixes come, grow, share and leave; a page has what its key says as long as it is found."""
    pool, holders = PagePool(NUM_PAGES), list[Holder]()
    content: dict[int, bytes] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["come", "come", "grow", "leave", "fail"]))
        if action == "come":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=4, max_size=10))
            keys = page_keys(tokens, 2, root_key())
            found = pool.find(keys)
            assert [content[page] for page in found.tolist()] == keys[: len(found)]
            pool.hold(found)
            try:
                new = pool.allocate(len(keys) - len(found))
            except OutOfPagesError:
                assert pool.num_free < len(keys) - len(found)
                pool.release(found)
                continue
            held = {page for holder in holders for page in holder.pages}
            assert not held & set(new.tolist())
            pages = [*found.tolist(), *new.tolist()]
            content |= dict(zip(pages, keys, strict=True))
            for page, key in zip(pages, keys, strict=True):
                pool.cache(page, key)
            holders.append(Holder(pages, keys))
        elif holders:
            holder = holders[data.draw(st.integers(0, len(holders) - 1))]
            if action == "grow" and pool.num_free:
                page = int(pool.allocate(1)[0])
                assert all(page not in other.pages for other in holders)
                holder.pages.append(page)
                content.pop(page, None)
            elif action == "leave":
                pool.release(np.array(holder.pages, dtype=np.int32))
                holders.remove(holder)
            elif action == "fail":
                pool.forget(np.array(holder.pages, dtype=np.int32))
                pool.release(np.array(holder.pages, dtype=np.int32))
                holders.remove(holder)
        counts = np.bincount([p for holder in holders for p in holder.pages], minlength=NUM_PAGES)
        assert pool.num_holders().tolist() == counts.tolist()
        assert pool.num_in_use == np.count_nonzero(counts)
        assert pool.num_shared == np.maximum(counts - 1, 0).sum()


def test_pages_that_several_give_back_at_once_are_left_once() -> None:
    pool, keys = PagePool(NUM_PAGES), page_keys(range(8), 4, root_key())
    pages = pool.allocate(2)
    pool.cache(int(pages[0]), keys[0])
    pool.hold(pages[:1])
    pool.release(np.concatenate((pages, pages[:1])))
    assert (pool.num_free, pool.num_shared) == (NUM_PAGES, 0)
    pool.check_integrity()
