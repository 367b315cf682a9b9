"""Pages whose parts differ in size, to a buffer and back: on a CPU, and by the GPU's kernel in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.device.pinned import PinnedMemory
from nanoflow.executor.page_copies import CpuCopier
from nanoflow.kernels.kv_fp8 import FP8, SCALE
from nanoflow.kernels.launch import LayerCache
from nanoflow.kernels.triton_pages import PageParts, copy_pages
from nanoflow.kvcache.copies import PageCopies

CPU = torch.device("cpu")
NUM_PAGES = 7
# Heads, tokens a page and head size, and the bytes of the words that such pages are copied in.
SHAPES = pytest.mark.parametrize(
    ("shape", "word_bytes"), [((2, 4, 16), 8), ((1, 1, 24), 4), ((3, 2, 8), 8), ((1, 3, 1200), 4)], ids=str
)


def _caches(shape: tuple[int, int, int], num_layers: int = 2) -> list[LayerCache]:
    """Random bytes."""

    def part(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(0, 256, (NUM_PAGES, *sizes, dtype.itemsize), dtype=torch.uint8).view(dtype).squeeze(-1)

    torch.manual_seed(0)
    return [
        LayerCache(
            keys=part(*shape, dtype=FP8),
            values=part(*shape, dtype=FP8),
            scales=part(*shape[:2], 2, dtype=SCALE),
        )
        for _ in range(num_layers)
    ]


def _rows(caches: list[LayerCache]) -> list[torch.Tensor]:
    """The parts of the caches, uint8 [pages, bytes]; they share their memory."""
    return [part.view(len(part), -1).view(torch.uint8) for cache in caches for part in cache.parts]


@SHAPES
def test_a_kernel_gathers_and_scatters_all_parts(shape: tuple[int, int, int], word_bytes: int) -> None:
    rows = _rows(_caches(shape))
    before, parts = [row.clone() for row in rows], PageParts.of(rows)
    assert parts.word_bytes == word_bytes
    pages = torch.tensor([5, 0, 3], dtype=torch.int32)
    staging = torch.full((3, sum(row.shape[1] for row in rows)), 9, dtype=torch.uint8)
    copy_pages(parts, pages, staging, is_load=False)
    assert torch.equal(staging, torch.cat([row[pages.long()] for row in rows], dim=1))
    copy_pages(parts, torch.tensor([1, 2, 6], dtype=torch.int32), staging, is_load=True)
    for row, old in zip(rows, before, strict=True):
        assert torch.equal(row[[1, 2, 6]], old[[5, 0, 3]]) and torch.equal(row[[0, 3, 4, 5]], old[[0, 3, 4, 5]])


@SHAPES
def test_a_cpu_copies_all_parts(shape: tuple[int, int, int], word_bytes: int) -> None:
    caches = _caches(shape)
    rows = _rows(caches)
    before = [row.clone() for row in rows]
    memory = PinnedMemory([(4, sum(row.shape[1] for row in rows))], CPU)
    copier = CpuCopier(caches, memory)
    slots = (np.array([2, 0], np.int32),)
    copier.copy(PageCopies(number=0, is_load=False, pages=(np.array([5, 0], np.int32),), slots=slots))
    assert memory.arrays[0][2].tobytes() == torch.cat([row[5] for row in rows]).numpy().tobytes()
    copier.copy(PageCopies(number=1, is_load=True, pages=(np.array([1, 6], np.int32),), slots=slots))
    for row, old in zip(rows, before, strict=True):
        assert torch.equal(row[[1, 6]], old[[5, 0]]) and torch.equal(row[[0, 2, 3, 4, 5]], old[[0, 2, 3, 4, 5]])
    copier.close()
