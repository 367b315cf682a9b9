"""The disk tier of the KV cache: what is written is found and read, also after a restart, within its bounds."""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nanoflow.kvcache import disk_threads, segments
from nanoflow.kvcache.disk import DiskError, DiskTier
from nanoflow.kvcache.store_folder import StoreFolder
from tests.disk_pages import PAGE_BYTES, WAIT_S, get, key_of, open_tier, page_of, put, segment_paths, there

# Segments of 4 pages of 4,096 bytes with a header and a table: 16 of them, of one group.
SMALL_BYTES = 16 * 6 * 4096
SMALL = {"capacity_bytes": SMALL_BYTES, "page_bytes": [4096]}


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    tier = open_tier(tmp_path)
    yield tier
    tier.flush(WAIT_S)
    tier.check_integrity()
    tier.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[DiskTier]:
    tier = open_tier(tmp_path, **SMALL)
    yield tier
    tier.flush(WAIT_S)
    tier.check_integrity()
    tier.close()


def put_small(tier: DiskTier, *numbers: int) -> list[bool]:
    keys = [key_of(number) for number in numbers]
    return [tier.write(0, key, page_of(0, key, [4096])).result(WAIT_S) for key in keys]


def get_small(tier: DiskTier, number: int) -> bool:
    page, key = np.zeros(4096, dtype=np.uint8), key_of(number)
    is_there = tier.read(0, key, page).result(WAIT_S)
    assert not is_there or np.array_equal(page, page_of(0, key, [4096]))
    return is_there


@pytest.mark.parametrize("group", [0, 1])
def test_pages_come_back(tier: DiskTier, group: int) -> None:
    assert all(put(tier, *range(100), group=group))
    assert there(tier, *range(101), group=group) == list(range(100))
    assert there(tier, *range(101), group=1 - group) == []
    assert get(tier, *range(99, -1, -1), 100, 7, 7, group=group) == [True] * 100 + [False, True, True]
    assert tier.find(group, [key_of(number) for number in (3, 4, 100, 5)]) == 2
    assert tier.find(group, [key_of(5)]) == 1 and tier.find(group, []) == 0
    counts = tier.counts
    assert (counts.num_written, counts.bytes_written) == (100, 100 * PAGE_BYTES[group])
    assert (counts.num_hits, counts.bytes_read, counts.num_misses) == (102, 102 * PAGE_BYTES[group], 1)
    assert (counts.num_pages, counts.num_evicted, counts.num_damaged, counts.num_refused) == (100, 0, 0, 0)
    assert counts.write_s > 0 and counts.read_s > 0 and counts.failed is None
    assert counts.stored_bytes >= sum(path.stat().st_size for path in segment_paths(tier)) > 100 * 4096


def test_pages_are_found_after_a_restart(tmp_path: Path) -> None:
    for start in range(3):
        tier = open_tier(tmp_path)
        assert all(get(tier, *range(10 * start), group=1)) and all(get(tier, *range(10 * start)))
        assert all(put(tier, *range(10 * start, 10 * start + 10))) and all(put(tier, *range(10 * start + 10), group=1))
        assert tier.counts.num_written == 20, "what is there is not written again"
        tier.check_integrity()
        tier.close()
    assert sum(path.stat().st_size for path in segment_paths(tier)) < 3 * 2 * (8192 + 10 * 8192 + 4096)


def test_a_page_is_written_once(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    page = page_of(0, key_of(1))
    first, second = tier.write(0, key_of(1), page), tier.write(0, key_of(1), page)
    gate.open()
    assert first.result(WAIT_S) and second.result(WAIT_S) and tier.write(0, key_of(1), page).result(WAIT_S)
    assert tier.counts.num_written == 1


def test_models_are_apart(tmp_path: Path) -> None:
    first, second = open_tier(tmp_path), open_tier(tmp_path, fingerprint="another model")
    assert put(first, 1) == put(second, 2) == [True]
    assert there(first, 1, 2) == [1] and there(second, 1, 2) == [2]
    first.close()
    second.close()
    # Even if somebody renames the folder.
    for path in second.folder.iterdir():
        path.unlink()
    second.folder.rmdir()
    first.folder.rename(second.folder)
    second = open_tier(tmp_path, fingerprint="another model")
    assert there(second, 1, 2) == []
    second.close()


def test_what_is_in_the_folder_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        tier = open_tier(tmp_path / "a" / "b")
        put(tier, 1)
        tier.close()
    finally:
        os.umask(old)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "a" / "b", tier.folder)] == [0o700, 0o700]
    files = list(tier.folder.iterdir())
    assert len(files) == 2 and all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    tier.folder.chmod(0o755)
    open_tier(tmp_path / "a" / "b").close()
    assert tier.folder.stat().st_mode & 0o777 == 0o700


def test_the_capacity_is_never_exceeded(small: DiskTier) -> None:
    for start in range(0, 300, 10):
        put_small(small, *range(start, start + 10))
        assert sum(path.stat().st_size for path in segment_paths(small)) <= SMALL_BYTES
        small.check_integrity()
    left = there(small, *range(300))
    assert left == list(range(300 - len(left), 300)) and 56 <= len(left) <= 64
    assert small.counts.num_evicted == 300 - len(left) and all(get_small(small, number) for number in left)


def test_what_was_used_lately_stays(small: DiskTier) -> None:
    assert all(put_small(small, *range(60)))
    assert get_small(small, 0) and get_small(small, 9)
    assert put_small(small, 17) == [True], "to write a page that is there is to use it"
    for start in range(60, 108, 8):
        assert all(put_small(small, *range(start, start + 8)))
        small.flush(WAIT_S)
    assert there(small, *range(40)) == [0, 9, 17]
    assert get_small(small, 0) and get_small(small, 9) and get_small(small, 17)
    assert all(put_small(small, *range(200, 300)))
    small.flush(WAIT_S)
    assert len(there(small, *range(200, 300))) >= 50, "room is gained nevertheless"


def test_a_smaller_capacity_keeps_what_fits(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, **SMALL)
    assert all(put_small(tier, *range(60)))
    tier.close()
    tier = open_tier(tmp_path, **SMALL | {"capacity_bytes": 8 * 6 * 4096})
    tier.check_integrity()
    assert there(tier, *range(60)) == list(range(28, 60))
    tier.close()
    with pytest.raises(DiskError, match="at least 49,152 bytes"):
        open_tier(tmp_path, **SMALL | {"capacity_bytes": 4096})


def test_idle_stores_of_others_give_way(tmp_path: Path) -> None:
    other = open_tier(tmp_path, **SMALL | {"fingerprint": "old model"})
    assert all(put_small(other, *range(60)))
    other.close()
    other = open_tier(tmp_path, **SMALL | {"fingerprint": "busy model"})
    assert all(put_small(other, *range(4)))
    tier = open_tier(tmp_path, **SMALL)
    assert all(put_small(tier, *range(30)))
    sizes = {path: sum(file.stat().st_size for file in path.glob("segment-*")) for path in tmp_path.iterdir()}
    assert sizes[other.folder] >= 4 * 4096, "a process uses it"
    assert sum(sizes.values()) - sizes[other.folder] <= SMALL_BYTES
    other.close()
    tier.close()
    old = open_tier(tmp_path, **SMALL | {"fingerprint": "old model"})
    left = there(old, *range(60))
    assert left == list(range(60 - len(left), 60)) and 20 <= len(left) <= 36
    old.close()


def test_forgotten_pages_stay_forgotten(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, *range(10))
    put(tier, *range(10), group=1)
    tier.forget([key_of(3), key_of(4), key_of(77)])
    expected = [0, 1, 2, 5, 6, 7, 8, 9]
    for _ in range(2):
        assert [there(tier, *range(10), group=group) for group in (0, 1)] == [expected, expected]
        assert get(tier, 3, 4, 5) == [False, False, True]
        tier.check_integrity()
        tier.close()
        tier = open_tier(tmp_path)
    assert put(tier, 3) == [True] and get(tier, 3) == [True]
    tier.close()


def test_all_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(tmp_path)
    put(tier, *range(10))
    kept = segment_paths(tier)[0].read_bytes()
    name = segment_paths(tier)[0]
    gate = Gate(monkeypatch)
    waiting = [tier.write(0, key_of(number), page_of(0, key_of(number))) for number in (20, 21)]
    tier.forget_all()
    assert there(tier, *range(30)) == []
    gate.open()
    assert [future.result(WAIT_S) for future in waiting] == [False, False]
    tier.flush(WAIT_S)
    assert segment_paths(tier) == [] and tier.counts.stored_bytes == 0
    assert put(tier, 1) == [True] and get(tier, 1, 2) == [True, False]
    tier.check_integrity()
    tier.close()
    name.write_bytes(kept)  # as if the process had ended before the file was removed
    tier = open_tier(tmp_path)
    assert there(tier, *range(30)) == [1] and not name.exists()
    tier.close()


class Gate:
    """Writes of pages wait until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_open, self.has_come = threading.Event(), threading.Event()
        self._write = segments.write_pages
        monkeypatch.setattr(segments, "write_pages", self._waiting)

    def open(self) -> None:
        self._is_open.set()

    def _waiting(self, *arguments: object) -> None:
        self.has_come.set()
        assert self._is_open.wait(WAIT_S)
        self._write(*arguments)  # type: ignore[arg-type]


def test_a_page_on_its_way_can_be_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(tmp_path)
    gate = Gate(monkeypatch)
    first = tier.write(0, key_of(1), page_of(0, key_of(1)))
    assert gate.has_come.wait(WAIT_S)
    tier.forget([key_of(1)])
    again = tier.write(0, key_of(1), page_of(0, key_of(1)))
    second = tier.write(0, key_of(2), page_of(0, key_of(2)))
    gate.open()
    assert (first.result(WAIT_S), again.result(WAIT_S), second.result(WAIT_S)) == (False, True, True)
    tier.check_integrity()
    tier.forget([key_of(1)])
    tier.close()
    tier = open_tier(tmp_path)
    assert there(tier, 1, 2) == [2]
    tier.close()


def test_what_was_forgotten_while_it_was_read_is_not_given(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tier, 1, 2)
    read, page = segments.read_pages, np.zeros(PAGE_BYTES[0], dtype=np.uint8)

    def forgotten(*arguments: object) -> None:
        tier.forget([key_of(1)])
        read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(segments, "read_pages", forgotten)
    assert not tier.read(0, key_of(1), page).result(WAIT_S)
    assert tier.read(0, key_of(2), page).result(WAIT_S)
    assert tier.counts.num_damaged == 0


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(tmp_path, queue_bytes=8 * PAGE_BYTES[0])
    gate = Gate(monkeypatch)
    futures = [tier.write(0, key_of(number), page_of(0, key_of(number))) for number in range(20)]
    assert [future.done() for future in futures] == [False] * 8 + [True] * 12
    assert not any(future.cancel() for future in futures)
    gate.open()
    assert [future.result(WAIT_S) for future in futures] == [True] * 8 + [False] * 12
    assert tier.counts.num_refused == 12 and put(tier, 19) == [True]
    tier.close()
    tier = open_tier(tmp_path, queue_bytes=1)
    assert put(tier, 30) == [True], "one page may always wait"
    tier.close()


def test_flush_waits_and_close_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(tmp_path)
    gate = Gate(monkeypatch)
    futures = [tier.write(group, key_of(7), page_of(group, key_of(7))) for group in (0, 1)]
    futures += [tier.write(0, key_of(number), page_of(0, key_of(number))) for number in range(3)]
    begin_s = time.monotonic()
    tier.flush(0.1)
    assert 0.1 <= time.monotonic() - begin_s < WAIT_S and not any(future.done() for future in futures)
    opener = threading.Timer(0.1, gate.open)
    opener.start()
    tier.flush(WAIT_S)
    assert all(future.done() and future.result() for future in futures)
    gate = Gate(monkeypatch)
    futures = [tier.write(index % 2, key_of(50 + index), page_of(index % 2, key_of(50 + index))) for index in range(9)]
    assert gate.has_come.wait(WAIT_S)
    opener = threading.Timer(0.1, gate.open)
    opener.start()
    tier.close()
    stored = [future.result(0) for future in futures]
    assert not all(stored), "what waited is refused"
    assert put(tier, 99) == [False] and get(tier, 1) == [False]
    tier.close()
    tier = open_tier(tmp_path)
    assert [tier.contains(index % 2, key_of(50 + index)) for index in range(9)] == stored
    tier.close()


def test_a_file_that_may_not_grow_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_threads, "RETRY_S", 600.0)
    tier = open_tier(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * 8192, old[1]))
    try:
        stored = put(tier, *range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not all(stored) and tier.counts.failed == os.strerror(errno.EFBIG)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{tier.folder}: no KV pages are written, which is tried again after 600 s: File too large"
    ]
    assert put(tier, 77) == [False], "for a while nothing is tried"
    assert get(tier, *range(60)) == stored
    tier._writers._retry_s = 0.0
    assert all(put(tier, *range(100, 200))) and tier.counts.failed is None
    tier.check_integrity()
    tier.close()


def test_nobody_waits_for_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(tmp_path)
    gate, has_come, num_tried = threading.Event(), threading.Event(), [0]

    def failing(*_: object) -> None:
        num_tried[0] += 1
        has_come.set()
        assert gate.wait(WAIT_S)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(segments, "write_pages", failing)
    # One batch each, as groups alternate.
    futures = [tier.write(index % 2, key_of(index), page_of(index % 2, key_of(index))) for index in range(20)]
    assert has_come.wait(WAIT_S)
    gate.set()
    assert [future.result(WAIT_S) for future in futures] == [False] * 20 and num_tried[0] <= 2
    assert tier.counts.num_refused == 20 and tier.counts.failed == os.strerror(errno.EIO)
    tier.check_integrity()
    tier.close()


def test_a_full_disk_costs_what_was_used_longest_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system has room for 8 of the 16 segments; that it is full is seen before, or only by a write."""
    monkeypatch.setattr(disk_threads, "RETRY_S", 0.0)
    tier = open_tier(tmp_path, **SMALL)
    folder, limit = tier._files.folder, 8 * 6 * 4096

    def used_bytes() -> int:
        return sum(path.stat().st_size for path in segment_paths(tier))

    monkeypatch.setattr(folder, "free_bytes", lambda: limit - used_bytes())
    assert all(put_small(tier, *range(60))) and used_bytes() <= limit
    left = there(tier, *range(60))
    assert left == list(range(60 - len(left), 60)) and len(left) >= 24

    write = segments.write_pages

    def full(file: int, layout: segments.Layout, *rest: object) -> None:
        if used_bytes() > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, layout, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(folder, "free_bytes", lambda: 1 << 40)
    monkeypatch.setattr(segments, "write_pages", full)
    stored = put_small(tier, *range(100, 160))
    assert 40 <= sum(stored) < 60 and tier.counts.num_refused == 60 - sum(stored)
    assert get_small(tier, 100 + max(index for index, is_stored in enumerate(stored) if is_stored))
    tier.flush(WAIT_S)
    tier.check_integrity()
    tier.close()


def test_a_disk_smaller_than_the_capacity_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free_bytes(folder: StoreFolder) -> int:
        return 400_000 - sum(path.stat().st_size for path in folder.path.glob("segment-*"))

    monkeypatch.setattr(StoreFolder, "free_bytes", free_bytes)
    tier = open_tier(tmp_path, capacity_bytes=1 << 40, page_bytes=[4096])
    assert all(put_small(tier, *range(300))) and tier.counts.failed is None
    assert 60 <= len(there(tier, *range(300))) <= 100
    tier.close()


def test_wrong_arrays_are_refused(tier: DiskTier) -> None:
    key, page = key_of(1), page_of(0, key_of(1))
    wrong: list[tuple[int, bytes, NDArray[Any]]] = [
        (0, key, page[:-1]),
        (0, b"short", page),
        (2, key, page),
        (-1, key, page),
    ]
    wrong += [(0, key, page.view(np.int8)), (0, key, np.repeat(page, 2)[::2])]
    for group, wrong_key, data in wrong:
        assert not tier.write(group, wrong_key, data).result(0)
        with pytest.raises(ValueError):
            tier.read(group, wrong_key, data)
    assert tier.counts.num_refused == 6
    page.flags.writeable = False
    assert tier.write(0, key, page).result(WAIT_S)
    with pytest.raises(ValueError, match="writable"):
        tier.read(0, key, page)


def test_many_threads_use_one_tier(small: DiskTier) -> None:
    wrong = list[str]()

    def use(seed: int) -> None:
        random = np.random.default_rng(seed)
        for number in random.integers(0, 120, 150).tolist():
            key = key_of(number)
            try:
                match number % 7:
                    case 0:
                        small.forget([key])
                    case 1 | 2:
                        get_small(small, number)
                    case _:
                        small.write(0, key, page_of(0, key, [4096])).result(WAIT_S)
                        get_small(small, number)
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    small.forget_all()
    for thread in threads:
        thread.join()
    small.flush(WAIT_S)
    assert not wrong and small.counts.failed is None and small.counts.num_damaged == 0
