"""Stores on disk that were damaged, replaced, taken away or made by others: a right page, no page, or one line."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.kvcache import disk_threads, segments
from nanoflow.kvcache.disk import DiskError
from tests.disk_pages import PAGE_BYTES, WAIT_S, get, key_of, open_tier, page_of, put, segment_paths, there

NUMBERS = range(12)
BLOCK = 4096


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two lives: four segments, pages that were forgotten, keys in both groups."""
    folder = tmp_path_factory.mktemp("template")
    for half in (NUMBERS[:6], NUMBERS[6:]):
        tier = open_tier(folder)
        assert all([*put(tier, *half), *put(tier, *half, group=1)])
        tier.close()
    tier = open_tier(folder)
    tier.forget([key_of(5)])
    tier.close()
    return folder


@contextlib.contextmanager
def copied(template: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A copy of the store: the user's folder, and the files of the store, the lock's first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "kv"
        shutil.copytree(template, folder)
        (store,) = folder.iterdir()
        yield folder, sorted(store.iterdir(), key=lambda path: (path.name != "store", path.name))


def check_what_is_left(folder: Path) -> int:
    """Open a damaged store and use it: the number of pages that came back, each of them right."""
    tier = open_tier(folder)
    try:
        assert there(tier, 5) == there(tier, 5, group=1) == [], "it was forgotten"
        found = sum(get(tier, *NUMBERS)) + sum(get(tier, *NUMBERS, group=1))
        assert found == len(there(tier, *NUMBERS)) + len(there(tier, *NUMBERS, group=1)), "what is damaged is forgotten"
        assert all(put(tier, *NUMBERS)) and all(get(tier, *NUMBERS)), "it goes on"
        tier.check_integrity()
    finally:
        tier.close()
    tier = open_tier(folder)
    assert all(get(tier, *NUMBERS))
    tier.close()
    return found


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    """What, to which file, from where, how much; places near the beginning of a file are likelier."""
    kinds = st.sampled_from(["flip", "flip", "flip", "zero", "noise", "cut", "grow", "swap", "copy", "remove"])
    place = st.one_of(st.integers(0, 300), st.integers(BLOCK, BLOCK + 500), st.integers(0, 60_000))
    damage = st.tuples(kinds, st.integers(0, 4), place, st.integers(1, 20_000))
    return draw(st.lists(damage, min_size=1, max_size=4))


def do_damage(files: list[Path], kind: str, index: int, start: int, size: int) -> None:
    path = files[index]
    data = bytearray(path.read_bytes() if path.exists() else b"")
    start %= len(data) or 1
    random = np.random.default_rng(size)
    match kind:
        case "flip":
            data[start : start + 1] = bytes(byte ^ 1 << size % 8 for byte in data[start : start + 1])
        case "zero":
            data[start : start + size] = bytes(len(data[start : start + size]))
        case "noise":
            data[start : start + size] = random.bytes(len(data[start : start + size]))
        case "cut":
            del data[start:]
        case "grow":
            data += random.bytes(size)
        case "swap":
            first, second = start // BLOCK * BLOCK, size // BLOCK * BLOCK
            low, high = data[first : first + BLOCK], data[second : second + BLOCK]
            if len(low) == len(high):
                data[first : first + BLOCK], data[second : second + BLOCK] = high, low
        case "copy":
            data = bytearray(files[size % len(files)].read_bytes()) if files[size % len(files)].exists() else data
        case "remove":
            path.unlink(missing_ok=True)
            return
    path.write_bytes(data)


@given(todo=damages())
@settings(max_examples=25)
def test_any_damage_costs_pages_and_never_gives_a_wrong_one(
    template: Path, todo: list[tuple[str, int, int, int]]
) -> None:
    with copied(template) as (folder, files):
        for damage in todo:
            do_damage(files, *damage)
        check_what_is_left(folder)


@given(todo=damages())
@settings(max_examples=15)
def test_damage_while_it_is_open(template: Path, todo: list[tuple[str, int, int, int]]) -> None:
    with copied(template) as (folder, files):
        tier = open_tier(folder)
        for damage in todo:
            do_damage(files, *damage)
        assert sum(get(tier, *NUMBERS)) + sum(get(tier, *NUMBERS, group=1)) <= 22
        assert all(put(tier, *range(20, 32))) and all(get(tier, *range(20, 32))), "it goes on"
        tier.close()
        check_what_is_left(folder)


def test_every_single_flip_in_the_head_of_a_segment_is_noticed(template: Path) -> None:
    """Header and entries: a page is lost or all of the file, never is one taken for another."""
    with copied(template) as (folder, files):
        whole = files[1].read_bytes()
        entries = BLOCK + 6 * segments.ENTRY_BYTES
        for start in [*range(0, 80, 5), *range(BLOCK, entries, 7)]:
            data = bytearray(whole)
            data[start] ^= 1 << start % 8
            files[1].write_bytes(data)
            tier = open_tier(folder)
            # This file has 5, as one is forgotten: in the header all are lost, in an entry its page.
            found = len(there(tier, *NUMBERS)) + len(there(tier, *NUMBERS, group=1))
            lost = (5 if start < 76 else 0) if start < BLOCK else (1 if start < BLOCK + 5 * segments.ENTRY_BYTES else 0)
            assert found == 22 - lost, start
            tier.close()
            files[1].write_bytes(whole)


def test_a_flip_in_a_page_costs_that_page(template: Path) -> None:
    with copied(template) as (folder, files):
        data = bytearray(files[1].read_bytes())
        position = data.index(page_of(0, key_of(2))[:64].tobytes())
        data[position + 3000] ^= 4
        files[1].write_bytes(data)
        tier = open_tier(folder)
        assert there(tier, *NUMBERS) == [number for number in NUMBERS if number != 5], "pages are not read at the start"
        assert get(tier, *NUMBERS) == [number not in (2, 5) for number in NUMBERS]
        assert tier.counts.num_damaged == 1 and there(tier, 2) == []
        tier.check_integrity()
        tier.close()
        tier = open_tier(folder)
        assert there(tier, 2) == [], "it is forgotten for good"
        tier.close()


def test_a_page_in_the_place_of_another_is_not_taken_for_it(template: Path) -> None:
    """The checksum covers key and group, not only what is in the page."""
    same = np.zeros(PAGE_BYTES[1], dtype=np.uint8)
    assert len({segments.page_check(group, key_of(number), same) for group in (0, 1) for number in range(9)}) == 18
    with copied(template) as (folder, files):
        tier = open_tier(folder)
        files[1].write_bytes(files[3].read_bytes())
        assert get(tier, *NUMBERS[:5]) == [False] * 5
        tier.close()


def test_an_entry_in_the_place_of_another_is_none(template: Path) -> None:
    with copied(template) as (folder, files):
        data = bytearray(files[1].read_bytes())
        first, fourth = (slice(BLOCK + slot * 64, BLOCK + slot * 64 + 64) for slot in (0, 3))
        data[fourth] = data[first]
        files[1].write_bytes(data)
        tier = open_tier(folder)
        assert get(tier, *NUMBERS[:5]) == [True, True, True, False, True] and tier.counts.num_damaged == 0
        tier.close()


def test_a_file_that_says_it_is_large_takes_no_room_from_others(template: Path) -> None:
    with copied(template) as (folder, files):
        os.truncate(files[1], 1 << 30)
        tier = open_tier(folder)
        assert there(tier, *NUMBERS) == list(NUMBERS[6:]) and not files[1].exists() and tier.counts.num_damaged == 1
        tier.check_integrity()
        tier.close()


def test_a_file_that_ends_too_early_keeps_what_is_whole(template: Path) -> None:
    with copied(template) as (folder, files):
        os.truncate(files[1], files[1].stat().st_size - 2 * 8192 - 1)
        tier = open_tier(folder)
        assert there(tier, *NUMBERS[:6]) == [0, 1, 2] and get(tier, 0, 1, 2) == [True] * 3
        tier.check_integrity()
        tier.close()


def test_files_of_others_are_left_alone(template: Path, tmp_path: Path) -> None:
    with copied(template) as (folder, files):
        store = files[0].parent
        (folder / "notes.txt").write_text("mine")
        (folder / "v1-0123456789abcdef").mkdir()
        (folder / "v7-0123456789abcdef").write_text("no folder")
        secret = tmp_path / "secret"
        secret.write_bytes(b"x" * 10_000)
        (store / "segment-000000000050").symlink_to(secret)
        (store / "segment-000000000051").mkdir()
        os.mkfifo(store / "segment-000000000052")
        (store / "segment-5").write_text("another name")
        before = {path.name for path in store.iterdir()}
        assert check_what_is_left(folder) == 22
        assert before <= {path.name for path in store.iterdir()} and secret.read_bytes() == b"x" * 10_000
        assert (folder / "notes.txt").read_text() == "mine"


def test_another_version_is_another_store(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with copied(template) as (folder, files):
        monkeypatch.setattr("nanoflow.kvcache.store_folder.VERSION", 2)
        monkeypatch.setattr(segments, "VERSION", 2)
        tier = open_tier(folder)
        assert tier.folder != files[0].parent and there(tier, *NUMBERS) == []
        tier.close()
        # Even if its files stand where those of this version are expected.
        files[1].rename(tier.folder / files[1].name)
        tier = open_tier(folder)
        assert there(tier, *NUMBERS) == [] and tier.counts.num_damaged == 1
        tier.close()


def test_a_file_that_cannot_be_read_is_removed(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with copied(template) as (folder, files):
        read = segments.read_table

        def failing(directory: int, name: str, *rest: object) -> object:
            if name == files[2].name:
                raise OSError(errno.EIO, "a bad sector")
            return read(directory, name, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(segments, "read_table", failing)
        assert check_what_is_left(folder) == 22 - 5 and not files[2].exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_a_read_that_fails(template: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A bad sector costs the page; too many open files cost nothing."""
    with copied(template) as (folder, _):
        tier = open_tier(folder)
        with monkeypatch.context() as patch:

            def failing(*_: object) -> None:
                raise OSError(code, os.strerror(code))

            patch.setattr(segments, "read_pages", failing)
            assert get(tier, *NUMBERS[:5]) == [False] * 5
        is_kept = code == errno.EMFILE
        assert get(tier, *NUMBERS[:5]) == [is_kept] * 5 and tier.counts.num_damaged == (0 if is_kept else 5)
        tier.check_integrity()
        tier.close()


def test_files_may_disappear(template: Path) -> None:
    with copied(template) as (folder, _):
        tier = open_tier(folder)
        put(tier, *range(20, 30))
        for path in segment_paths(tier):
            path.unlink()
        assert not any(get(tier, *NUMBERS)) and not any(get(tier, *range(20, 30)))
        assert there(tier, *NUMBERS, *range(20, 30)) == []
        assert all(put(tier, *NUMBERS)) and all(get(tier, *NUMBERS))
        tier.flush(WAIT_S)
        tier.check_integrity()
        tier.close()


def test_the_folder_may_disappear(
    template: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_threads, "RETRY_S", 0.0)
    with copied(template) as (folder, _):
        tier = open_tier(folder)
        shutil.rmtree(folder)
        assert not any(get(tier, *NUMBERS)) and not any(put(tier, *range(20, 30)))
        assert tier.counts.failed == "No such file or directory" and len(caplog.records) == 1
        # Another process begins a store in its place: they do not meet.
        other = open_tier(folder)
        assert all(put(other, *NUMBERS)) and not any(put(tier, *range(20, 30)))
        tier.forget_all()
        tier.close()
        assert all(get(other, *NUMBERS))
        other.close()


def test_the_second_process_has_a_store_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.disk_pages import *\n"
        "tier = open_tier(Path(sys.argv[1])); put(tier, 1, 2); print(tier.folder.name, flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    name = first.stdout.readline().strip()
    second = open_tier(tmp_path)
    assert second.folder == tmp_path / f"{name}-2" and there(second, 1, 2) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / name}: another process uses it; this process keeps its KV pages in {second.folder}"
    ]
    assert put(second, 3) == [True]
    first.kill()
    first.wait()
    third = open_tier(tmp_path)
    assert third.folder.name == name and there(third, 1, 2, 3) == [1, 2]
    third.close()
    second.close()


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever may write to the user's folder could put wrong pages where a store is expected."""
    tier = open_tier(tmp_path)
    tier.close()
    elsewhere = tmp_path / "elsewhere"
    tier.folder.rename(elsewhere)
    tier.folder.symlink_to(elsewhere)
    second = open_tier(tmp_path)
    assert second.folder.name == f"{tier.folder.name}-2"
    second.close()
    if os.geteuid() == 0:
        os.chown(second.folder, 12345, 12345)
        third = open_tier(tmp_path)
        assert third.folder.name == f"{tier.folder.name}-3"
        third.close()
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_folders_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    for path, says in [
        (file, "is not a folder"),
        (file / "below", "Not a directory"),
        (tmp_path / "dangling", "is not a folder"),
        (Path("/proc/nothing"), "No such file or directory"),
    ]:
        with pytest.raises(DiskError, match=says) as error:
            open_tier(path)
        assert str(path) in str(error.value) and "name a folder" in str(error.value) and "\n" not in str(error.value)
    tier = open_tier(tmp_path / "link")
    assert put(tier, 1) == [True], "a link to a folder is what the user says"
    tier.close()
    shutil.rmtree(tier.folder / "store", ignore_errors=True)
    (tier.folder / "store").unlink()
    (tier.folder / "store").mkdir()
    with pytest.raises(DiskError, match="Is a directory"):
        open_tier(tmp_path / "link")

    def read_only(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(DiskError, match="Read-only file system: name a folder for KV pages that can be written"):
        open_tier(tmp_path)


@pytest.mark.parametrize("hurt", ["cut", "flip", "removed"])
def test_without_the_number_of_what_is_forgotten_all_is(template: Path, hurt: str) -> None:
    with copied(template) as (folder, files):
        match hurt:
            case "cut":
                files[0].write_text("")
            case "flip":
                files[0].write_bytes(files[0].read_bytes().replace(b"from 000000000001", b"from 000000000000"))
            case _:
                files[0].unlink()
        assert check_what_is_left(folder) == 0


def test_a_torn_batch_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are written after their pages: without them, there is nothing."""
    tier = open_tier(tmp_path)
    put(tier, *NUMBERS[:3])

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(segments, "write_entries", failing)
    assert put(tier, *NUMBERS[3:]) == [False] * 9 and get(tier, *NUMBERS[:3]) == [True] * 3
    tier.close()
    monkeypatch.undo()
    tier = open_tier(tmp_path)
    assert there(tier, *NUMBERS) == [0, 1, 2] and tier.counts.num_damaged == 0
    tier.close()
