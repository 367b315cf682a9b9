"""Copies of pages on a CPU: their bytes, in models with several KV groups, and the memory that they go to."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from nanoflow.batch import Int32
from nanoflow.device import pinned
from nanoflow.device.pinned import PinnedMemory
from nanoflow.executor.page_copies import CpuCopier, NoCopier, runs
from nanoflow.kernels.launch import LayerCache
from nanoflow.kvcache.copies import PageCopies

CPU = torch.device("cpu")
PAGE_SIZE, HEAD = 4, 8


def int32(*values: int) -> Int32:
    return np.array(values, dtype=np.int32)


def cache(group: int, num_pages: int, num_heads: int, seed: int) -> LayerCache:
    torch.manual_seed(seed)
    keys, values = (torch.randn(num_pages, PAGE_SIZE, num_heads, HEAD, dtype=torch.bfloat16) for _ in range(2))
    return LayerCache(keys=keys, values=values, group=group)


@pytest.mark.parametrize(
    ("slots", "piece", "expected"),
    [
        (int32(3, 4, 5), 100, [(0, 3)]),
        (int32(3, 4, 5), 4, [(0, 1), (1, 3)]),
        (int32(5, 4, 3), 100, [(0, 1), (1, 2), (2, 3)]),
        (int32(0, 1, 7, 8, 9, 2), 100, [(0, 2), (2, 5), (5, 6)]),
        (int32(6), 4, [(0, 1)]),
    ],
    ids=str,
)
def test_runs_of_slots(slots: Int32, piece: int, expected: list[tuple[int, int]]) -> None:
    assert list(runs(slots, piece)) == expected


def test_pages_come_back_as_they_were_in_all_layers_and_groups() -> None:
    caches = [cache(0, 6, 2, 1), cache(1, 4, 3, 2), cache(0, 6, 2, 3)]
    page_bytes = (2 * 2 * PAGE_SIZE * 2 * HEAD * 2, 2 * PAGE_SIZE * 3 * HEAD * 2)
    memory = PinnedMemory([(5, size) for size in page_bytes], CPU)
    copier = CpuCopier(caches, memory)
    before = [(each.keys.clone(), each.values.clone()) for each in caches]
    pages, slots = (int32(5, 0), int32(2)), (int32(1, 4), int32(3))
    assert copier.copy(PageCopies(number=0, is_load=False, pages=pages, slots=slots))() >= 0
    # A slot has the keys and values of each layer of its group, one after the other.
    expected = torch.cat([part[5].reshape(-1) for layer in (0, 2) for part in before[layer]])
    assert torch.equal(torch.from_numpy(memory.arrays[0][1]).view(torch.bfloat16), expected)
    assert not memory.arrays[0][[0, 2, 3]].any() and not memory.arrays[1][[0, 1, 2, 4]].any()
    for each in caches:
        each.keys.fill_(7)
        each.values.fill_(7)
    back = (int32(3, 1), int32(0))
    copier.copy(PageCopies(number=1, is_load=True, pages=back, slots=slots))
    for each, (keys, values) in zip(caches, before, strict=True):
        for to, source in zip(back[each.group].tolist(), pages[each.group].tolist(), strict=True):
            assert torch.equal(each.keys[to], keys[source]) and torch.equal(each.values[to], values[source])
        others = [page for page in range(len(each.keys)) if page not in back[each.group].tolist()]
        assert (each.keys[others] == 7).all() and (each.values[others] == 7).all()
    copier.close()


def test_groups_without_pages_are_left_alone() -> None:
    caches = [cache(0, 3, 1, 1), cache(1, 3, 1, 2)]
    memory = PinnedMemory([(2, 2 * PAGE_SIZE * HEAD * 2)] * 2, CPU)
    copies = PageCopies(number=0, is_load=False, pages=(int32(), int32(1)), slots=(int32(), int32(0)))
    CpuCopier(caches, memory).copy(copies)
    assert not memory.arrays[0].any() and memory.arrays[1][0].any()
    assert copies.num_pages == 1 and copies.num_bytes((100, 10)) == 10


def test_without_host_memory_a_copy_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no host memory for 1 page"):
        NoCopier().copy(PageCopies(number=0, is_load=False, pages=(int32(1),), slots=(int32(0),)))


def test_memory_for_a_cpu_is_there_at_once_and_its_pieces_begin_at_whole_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_PIECE_BYTES", 8 * mmap.PAGESIZE)
    sizes = [(10, 3000), (7, 2 * mmap.PAGESIZE), (3, 64 * mmap.PAGESIZE)]
    memory = PinnedMemory(sizes, CPU)
    assert memory.num_ready == (10, 7, 3)
    for array, (count, size), piece in zip(memory.arrays, sizes, memory.piece_slots, strict=True):
        assert array.shape == (count, size) and array.dtype == np.uint8 and not array.any()
        assert piece >= 1 and piece * size % mmap.PAGESIZE == 0
        assert array.flags.writeable and array.flags.c_contiguous
    assert memory.piece_slots[1:] == (4, 1)
    memory.close()


def test_memory_that_the_system_does_not_give_is_an_error() -> None:
    with pytest.raises(MemoryError):
        PinnedMemory([(1 << 40, 1 << 16)], CPU)
