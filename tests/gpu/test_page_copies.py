"""Pages between caches and host memory on a GPU: the right bytes, between the batches that write them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.batch import NewPages
from nanoflow.device import pinned as pinned_module
from nanoflow.device.pinned import PinnedMemory
from nanoflow.executor.page_copies import GpuCopier
from nanoflow.kernels.launch import LayerCache
from nanoflow.kvcache.copies import PageCopies

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
_PAGES, _SLOTS, _ROWS = 80, 200, 4
_SLOW_CYCLES = 200_000_000


def _caches() -> tuple[LayerCache, ...]:
    """Three layers in two groups whose pages differ in size."""
    torch.manual_seed(0)
    shapes = [(0, 8, 128), (1, 2, 64), (0, 8, 128)]
    return tuple(
        LayerCache(
            keys=torch.randn(_PAGES, heads, 16, size, device=GPU).bfloat16(),
            values=torch.randn(_PAGES, heads, 16, size, device=GPU).bfloat16(),
            group=group,
        )
        for group, heads, size in shapes
    )


_PAGE_BYTES = (2 * 2 * 8 * 16 * 128 * 2, 2 * 2 * 16 * 64 * 2)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[PinnedMemory]:
    """In many small pieces, whose borders no copy may cross."""
    monkeypatch.setattr(pinned_module, "_PIECE_BYTES", 3 * _PAGE_BYTES[0])
    pinned = PinnedMemory([(_SLOTS, size) for size in _PAGE_BYTES], GPU)
    while pinned.num_ready != (_SLOTS, _SLOTS):
        time.sleep(0.01)
    yield pinned
    pinned.close()


def _copies(pages: list[list[int]], slots: list[list[int]], *, is_load: bool) -> PageCopies:
    as_arrays = [tuple(np.array(group, np.int32) for group in groups) for groups in (pages, slots)]
    return PageCopies(number=0, is_load=is_load, pages=as_arrays[0], slots=as_arrays[1])


def _sleep(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def _bytes(caches: tuple[LayerCache, ...], group: int, page: int) -> bytes:
    parts = [part[page] for cache in caches if cache.group == group for part in (cache.keys, cache.values)]
    return b"".join(part.contiguous().view(torch.uint8).cpu().numpy().tobytes() for part in parts)


def test_what_was_saved_comes_back_to_other_pages(memory: PinnedMemory) -> None:
    caches = _caches()
    copier = GpuCopier(caches, memory, num_rows=_ROWS)
    rng = np.random.default_rng(1)
    pages = [rng.permutation(_PAGES)[:70].tolist(), rng.permutation(_PAGES)[:33].tolist()]
    slots = [[*range(40, 100), *rng.permutation(40)[:10].tolist()], rng.permutation(_SLOTS)[:33].tolist()]
    expected = [[_bytes(caches, group, page) for page in pages[group]] for group in (0, 1)]
    assert copier.copy(_copies(pages, slots, is_load=False))() > 0
    for group, array in enumerate(memory.arrays):
        assert [array[slot].tobytes() for slot in slots[group]] == expected[group]
    for cache in caches:
        cache.keys.zero_()
        cache.values.zero_()
    targets = [rng.permutation(_PAGES)[:70].tolist(), rng.permutation(_PAGES)[:33].tolist()]
    copier.copy(_copies(targets, slots, is_load=True))()
    for group in (0, 1):
        assert [_bytes(caches, group, page) for page in targets[group]] == expected[group]
        others = set(range(_PAGES)) - set(targets[group])
        assert all(not any(_bytes(caches, group, page)) for page in others)


def test_a_save_waits_for_the_batch_that_writes_and_the_next_writer_for_the_save(memory: PinnedMemory) -> None:
    caches = _caches()
    copier = GpuCopier(caches, memory, num_rows=_ROWS)
    copier.copy(_copies([[1], [1]], [[1], [1]], is_load=False))()
    for value in range(1, 6):
        _sleep(_SLOW_CYCLES // 10)
        caches[0].keys[:64].fill_(value)
        wait = copier.copy(_copies([list(range(64)), []], [list(range(64)), []], is_load=False))
        tables = np.full((1, 1), 7, np.int32)
        copier.protect(NewPages.of_tables(tables))
        caches[0].keys[:64].fill_(-1)
        wait()
        saved = torch.from_numpy(memory.arrays[0][:64]).view(torch.bfloat16).view(64, 2, 2, -1)[:, 0, 0]
        assert torch.equal(saved, torch.full_like(saved, value))


def test_batches_that_write_elsewhere_do_not_wait(memory: PinnedMemory) -> None:
    caches = _caches()
    copier = GpuCopier(caches, memory, num_rows=_ROWS)
    copier.copy(_copies([[1], [1]], [[1], [1]], is_load=False))()
    end = torch.cuda.Event()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(copier._save.last):
        _sleep(_SLOW_CYCLES)
    copier.copy(_copies([[5], []], [[5], []], is_load=False))
    # Page 5 of the other group is another page.
    copier.protect(
        NewPages(rows=np.array([_ROWS], np.int32), columns=np.zeros(1, np.int32), pages=np.array([5], np.int32))
    )
    caches[0].keys[6].fill_(1)
    end.record()
    end.synchronize()
    assert not copier._save.last.query()


def test_a_load_waits_for_a_save_of_the_same_slot(memory: PinnedMemory) -> None:
    caches = _caches()
    copier = GpuCopier(caches, memory, num_rows=_ROWS)
    expected = _bytes(caches, 0, 3)
    with torch.cuda.stream(copier._save.first):
        _sleep(_SLOW_CYCLES)
    copier.copy(_copies([[3], []], [[9], []], is_load=False))
    copier.copy(_copies([[60], []], [[9], []], is_load=True))()
    assert _bytes(caches, 0, 60) == expected
