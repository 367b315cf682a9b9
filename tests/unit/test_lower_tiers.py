"""Lower tiers one question at a time: what a load takes, what it leaves, when it is worth it, and how all ends."""

from __future__ import annotations

import logging
import random
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine import tier_memory
from nanoflow.engine.copying import Copying
from nanoflow.engine.tier_memory import opened_tiers, staging_bytes
from nanoflow.kvcache.copies import PageCopies
from nanoflow.kvcache.host import HostPages
from nanoflow.kvcache.keys import page_keys, root_key
from nanoflow.kvcache.pools import PagePools
from nanoflow.kvcache.sizes import PoolSize
from nanoflow.scheduler.disk_copies import DiskCopies
from nanoflow.scheduler.load_gain import LoadGain
from nanoflow.scheduler.loads import Attempts
from nanoflow.scheduler.lower_tiers import LowerTiers
from tests.unit.fake_tiers import FakeDisk

PAGE_SIZE = 4
KEYS = page_keys(range(PAGE_SIZE * 12), PAGE_SIZE, root_key())


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Bench:
    """Tiers below a pool of pages, without a scheduler."""

    def __init__(self, *, num_pages: int = 12, num_slots: int = 12, has_disk: bool = False) -> None:
        self.clock = Clock()
        self.pools = PagePools(
            [PoolSize(num_pages=num_pages)], num_rows=2, max_tokens=PAGE_SIZE * num_pages, page_size=PAGE_SIZE
        )
        (self.pool,) = self.pools.pools
        self.host = HostPages(num_slots, has_disk=has_disk)
        self.memory = [np.zeros((num_slots, 8), dtype=np.uint8)]
        self.files = FakeDisk(random.Random(0), 100, fault=0.0)
        disk = DiskCopies(self.files, self.memory, page_size=PAGE_SIZE, capacity_bytes=1, clock=self.clock)
        self.tiers = LowerTiers(
            self.pools,
            [self.host],
            page_bytes=[8],
            page_size=PAGE_SIZE,
            disk=disk if has_disk else None,
            clock=self.clock,
        )
        self.tiers.note_iteration(64, 1e3)

    def save(self, *places: int) -> None:
        """Pages are computed, saved, and taken away again."""
        pages = self.pool.allocate(len(places))
        self.tiers.save([KEYS[place] for place in places], [(0, pages)], is_computed=True)
        for copies in self.copy():
            self.memory[0][copies.slots[0]] = np.array(places, dtype=np.uint8)[:, None]
        self.pool.release(pages)

    def copy(self) -> list[PageCopies]:
        taken = list(self.tiers.take_copies())
        for copies in taken:
            self.tiers.note_copied(copies.number, 1e-6)
        return taken


def test_what_is_computed_first_is_saved_too() -> None:
    bench = Bench()
    pages = bench.pool.allocate(2)
    bench.tiers.save(KEYS[:2], [(0, pages)], is_computed=False)
    assert list(bench.tiers.take_copies()) == [], "it is not computed before the next batch has been launched"
    (copies,) = bench.tiers.take_copies()
    assert not copies.is_load and copies.pages[0].tolist() == pages.tolist() and copies.slots[0].tolist() == [0, 1]


def test_a_load_takes_none_of_its_own_pages_on_the_device() -> None:
    """A hole in the prefix is filled; what the device has behind it must stay for that."""
    bench = Bench(num_pages=12)
    bench.save(*range(8))
    pages, others = bench.pool.allocate(8), bench.pool.allocate(4)
    for place, page in enumerate(pages.tolist()):
        if place not in range(1, 5):
            bench.pool.cache(page, KEYS[place])
    for page, key in zip(others.tolist(), KEYS[8:], strict=True):
        bench.pool.cache(page, key)
    # The prefix was used before the others, and no page is empty.
    bench.pool.release(pages)
    bench.pool.release(others)
    held = bench.pool.allocate(4)
    assert bench.tiers.find(KEYS[:8], 1).num_pages == 8
    assert bench.tiers.start_load(KEYS[:8], num_spare=0)
    assert all(bench.pool.has(KEYS[place]) for place in (0, 5, 6, 7))
    assert bench.tiers.find(KEYS[:8], 1).is_loading and bench.tiers.is_loading
    assert bench.pool.num_reserved == 4
    assert bench.copy()[0].num_pages == 4
    assert len(bench.pool.find(KEYS)) == 8 and not bench.tiers.is_loading
    bench.pool.release(held)
    bench.tiers.check_integrity()


def test_a_load_leaves_what_others_need() -> None:
    bench = Bench(num_pages=8)
    bench.save(*range(6))
    assert not bench.tiers.start_load(KEYS[:6], num_spare=3) and bench.pool.num_reserved == 0
    assert bench.tiers.start_load(KEYS[:6], num_spare=2)
    assert bench.tiers.start_load(KEYS[:6], num_spare=2), "it has begun"
    assert bench.pool.num_reserved == 6


def test_room_for_pages_from_disk_is_not_made_of_pages_of_the_same_prefix() -> None:
    bench = Bench(num_slots=6, has_disk=True)
    bench.save(*range(6))
    while bench.tiers.idle():
        bench.files.advance(1.0)
    bench.save(8, 9)
    in_host = [place for place in range(6) if KEYS[place] in bench.host]
    assert len(in_host) == 4
    assert bench.tiers.start_load(KEYS[:6], num_spare=0)
    assert all(KEYS[place] in bench.host for place in range(6))
    bench.files.advance(1.0)
    (copies,) = bench.copy()
    assert bench.memory[0][copies.slots[0]][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(bench.pool.find(KEYS)) == 6
    bench.tiers.check_integrity()


def test_a_load_that_host_memory_has_no_room_for_is_refused() -> None:
    bench = Bench(num_slots=4, has_disk=True)
    for first in (0, 4):
        bench.save(*range(first, first + 4))
        while bench.tiers.idle():
            bench.files.advance(1.0)
    held = [bench.host.hold(key) for key in KEYS[4:6]]
    assert not bench.tiers.start_load(KEYS[:4], num_spare=0)
    assert bench.pool.num_reserved == 0 and not bench.tiers.is_loading
    for slot in held:
        bench.host.release(slot)
    assert bench.tiers.start_load(KEYS[:4], num_spare=0)
    bench.tiers.check_integrity()


@pytest.mark.parametrize("forgets", ["keys", "all"])
@pytest.mark.parametrize("when", ["read", "copied", "saved"])
def test_what_is_forgotten_on_its_way_does_not_arrive(forgets: str, when: str) -> None:
    bench = Bench(num_slots=16, has_disk=True)

    def forget() -> None:
        bench.tiers.forget(KEYS[2:3]) if forgets == "keys" else bench.tiers.forget_all()

    if when == "saved":
        pages = bench.pool.allocate(4)
        bench.tiers.save(KEYS[:4], [(0, pages)], is_computed=True)
        (copies,) = bench.tiers.take_copies()
        forget()
        bench.tiers.note_copied(copies.number, 0.0)
        bench.pool.release(pages)
    else:
        bench.save(*range(6))
        bench.tiers.start_load(KEYS[:6], num_spare=0)
        taken = bench.tiers.take_copies() if when == "copied" else []
        forget()
        for copies in taken:
            bench.tiers.note_copied(copies.number, 0.0)
        bench.copy()
        assert not bench.tiers.is_loading and bench.pool.num_reserved == 0
    bench.files.advance(1.0)
    bench.copy()
    assert KEYS[2] not in bench.host and not bench.pool.has(KEYS[2])
    assert (KEYS[1] in bench.host) is (forgets == "keys")
    assert not bench.host._num_holders.any()
    bench.tiers.check_integrity()


@pytest.mark.parametrize(("has_disk", "is_slow", "losses"), [(False, False, 0), (True, False, 0), (True, True, 4)])
def test_pages_that_leave_before_the_disk_has_them_are_counted(has_disk: bool, is_slow: bool, losses: int) -> None:
    bench = Bench(num_slots=4, has_disk=has_disk)
    bench.save(0, 1, 2, 3)
    while not is_slow and bench.tiers.idle():
        bench.files.advance(1.0)
    bench.save(4, 5, 6, 7)
    host = bench.tiers.counts["host"]
    assert (host.evictions, host.losses) == (4, losses)


def test_a_disk_that_does_not_answer_is_waited_for_no_longer_than_some_seconds() -> None:
    bench = Bench(num_slots=4, has_disk=True)
    for first in (0, 4):
        bench.save(*range(first, first + 4))
        while bench.tiers.idle():
            bench.files.advance(1.0)
    assert bench.tiers._gain.is_worth(1, 0, 320)
    assert bench.tiers.start_load(KEYS[:4], num_spare=0)
    bench.copy()
    assert bench.tiers.is_loading
    bench.clock.now_s += 5
    bench.copy()
    assert not bench.tiers.is_loading and bench.pool.num_reserved == 0
    assert bench.host._num_holders.sum() == 4, "their slots belong to the disk"
    assert not bench.tiers._gain.is_worth(1, 0, 320), "what takes so long is computed"
    bench.files.advance(1.0)
    bench.copy()
    assert not bench.host._num_holders.any()
    bench.tiers.check_integrity()


def test_a_prefix_is_loaded_some_times_and_then_computed_until_it_is_used() -> None:
    attempts = Attempts()
    for _ in range(3):
        assert not attempts.are_over(KEYS[0])
        attempts.note(KEYS[0])
    assert attempts.are_over(KEYS[0]) and not attempts.are_over(KEYS[1])
    attempts.forget(KEYS[:1])
    assert not attempts.are_over(KEYS[0])


def test_a_load_is_worth_it_by_what_was_measured() -> None:
    clock = Clock()
    gain = LoadGain(clock)
    assert gain.is_worth(64, 100_000, 0) and not gain.is_worth(64, 100_000_000, 0)
    assert not gain.is_worth(5, 0, 0), "less than what any load takes"
    for _ in range(50):
        gain.note_iteration(1000, 1.0)
        gain.note_iteration(8, 80.0)
    assert gain.is_worth(64, 1_000_000_000, 0) and not gain.is_worth(64, 10_000_000_000, 0)
    # A slow disk says nothing of host memory.
    for _ in range(50):
        gain.note_load(10, 1_000_000, 1.0)
    assert not gain.is_worth(64, 0, 1_000_000) and gain.is_worth(64, 1_000_000_000, 0)
    for _ in range(50):
        gain.note_load(1_000_000, 0, 1.0)
    assert not gain.is_worth(64, 1_000_000, 0)
    # After a while one is tried.
    clock.now_s += 11
    assert gain.is_worth(64, 1_000_000, 0) and not gain.is_worth(64, 1_000_000, 0)
    gain.note_load(0, 0, 1.0)


# The loop's part


class Tiers:
    """What `Copying` asks of tiers."""

    is_loading = False

    def __init__(self, *batches: list[PageCopies]) -> None:
        self.batches, self.copied, self.num_closed = list(batches), list[int](), 0

    def take_copies(self) -> list[PageCopies]:
        return self.batches.pop(0) if self.batches else []

    def note_copied(self, number: int, time_s: float) -> None:
        del time_s
        self.copied.append(number)

    def idle(self) -> bool:
        return False

    def close(self) -> None:
        self.num_closed += 1


def copies(number: int) -> PageCopies:
    return PageCopies(number=number, is_load=False, pages=(), slots=())


def worker(**failing: str) -> Any:
    """Copies at once; those whose number is named fail."""

    def copy(what: PageCopies) -> Future[float]:
        future: Future[float] = Future()
        error = failing.get(f"copy_{what.number}")
        future.set_exception(RuntimeError(error)) if error else future.set_result(0.0)
        return future

    return SimpleNamespace(copy=copy)


def test_an_idle_engine_copies_on() -> None:
    tiers = Tiers([copies(0)], [copies(1)])
    copying = Copying(tiers, worker())  # type: ignore[arg-type]
    copying.idle()
    copying.idle()
    assert tiers.copied == [0, 1] and copying.idle() is False


@pytest.mark.parametrize("failing", [{}, {"copy_1": "lost"}])
def test_closing_saves_the_pages_of_the_last_batches_and_happens_once(
    failing: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    tiers = Tiers([copies(0)], [copies(1)], [copies(2)])
    copying = Copying(tiers, worker(**failing))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        copying.close()
        copying.close()
    assert tiers.copied == ([0] if failing else [0, 1]) and tiers.num_closed == 1
    assert ("lost" in caplog.text) is bool(failing)


# The options

PAGE_BYTES = (4096, 8192)


def opened(**options: Any) -> Any:
    config = EngineConfig(**options)
    return opened_tiers(config, PAGE_BYTES, device=torch.device("cpu"), fingerprint="a model")


def test_without_options_there_is_nothing() -> None:
    with opened() as memory:
        assert memory is None
    with opened(kv_host_gib=0) as memory:
        assert memory is None
    assert staging_bytes(EngineConfig(), PAGE_BYTES) == 0 < staging_bytes(EngineConfig(kv_host_gib=1), PAGE_BYTES)


def test_host_memory_is_divided_equally_among_the_groups() -> None:
    with opened(kv_host_gib=0.001) as memory:
        assert memory is not None and memory.disk is None
        num_slots = int(0.001 * 2**30) // sum(PAGE_BYTES)
        assert [array.shape for array in memory.pinned.arrays] == [(num_slots, size) for size in PAGE_BYTES]
        memory.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_host_gib": -1}, "kv_host_gib must be a number of GiB, at least 0, got -1"),
        ({"kv_host_gib": float("nan")}, "kv_host_gib must be a number"),
        ({"kv_disk_gib": float("inf")}, "kv_disk_gib must be a number"),
        ({"kv_dir": "x", "kv_host_gib": 0}, "kv_dir needs host memory"),
        ({"kv_host_gib": 1, "enable_prefix_caching": False}, "do not switch it off"),
        ({"kv_dir": "x", "enable_prefix_caching": False}, "do not switch it off"),
        ({"kv_host_gib": 1e-6}, "a KV page alone takes"),
        ({"kv_host_gib": 1e6}, r"the host has [\d.]+ GiB free: lower it"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught, opened(**options):
        pass
    assert "\n" not in str(caught.value)


def test_memory_that_the_system_keeps_back_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_memory, "free_host_bytes", lambda: 1 << 62)
    with pytest.raises(ConfigError, match="does not let this process reserve"), opened(kv_host_gib=2.0**24):
        pass


@pytest.mark.parametrize("kind", ["a file", "read-only", "too small"])
def test_a_folder_that_cannot_be_used_is_told_and_serving_goes_on(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kv"
    if kind == "a file":
        folder.write_text("")
    elif kind == "read-only":
        folder = Path("/proc/kv")
    disk_gib = 1e-7 if kind == "too small" else 1.0
    with (
        caplog.at_level(logging.WARNING),
        opened(kv_dir=str(folder), kv_disk_gib=disk_gib, kv_host_gib=0.001) as memory,
    ):
        assert memory is not None and memory.disk is None
        memory.close()
    assert "KV pages are not kept on disk" in caplog.text and len(caplog.records) == 1


def test_what_was_opened_is_closed_if_the_engine_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), opened(kv_dir=str(tmp_path), kv_host_gib=0.001) as memory:
        assert memory is not None and memory.disk is not None
        name = memory.disk.folder
        raise ZeroDivisionError
    with opened(kv_dir=str(tmp_path), kv_host_gib=0.001) as again:
        assert again is not None and again.disk is not None and again.disk.folder == name, "the lock was let go"
        again.close()
