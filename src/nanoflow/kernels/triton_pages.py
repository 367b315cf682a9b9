"""Triton kernel that copies KV pages between the caches of all layers and one contiguous staging buffer.

A page lies in two pieces for each layer, keys and values. A copy over PCIe wants few long pieces instead, so pages are
gathered into the buffer before they leave the device, and scattered from it when they come back: one launch for all
layers. `executor/page_copies.py` calls it.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_WORD_BYTES = 8
_BLOCK = 1024


def copy_pages(parts: Tensor, pages: Tensor, staging: Tensor, *, is_load: bool) -> None:
    """Copy pages to the staging buffer, or from it.

    Args:
        parts: int64 [P], addresses of the caches: the keys of a layer, its values, those of the next layer and so on,
            each with pages of the same size.
        pages: int32 [N], which pages.
        staging: uint8 [N, page bytes], contiguous; a page's P parts one after the other.
        is_load: From the buffer to the caches.
    """
    num_words = staging.shape[1] // (_WORD_BYTES * len(parts))
    grid = (len(pages), len(parts), triton.cdiv(num_words, _BLOCK))
    _copy_pages[grid](parts, pages, staging, num_words, IS_LOAD=is_load, BLOCK=_BLOCK, num_warps=4)


@triton.jit
def _copy_pages(
    parts: tl.tensor,
    pages: tl.tensor,
    staging: tl.tensor,
    num_words: tl.tensor,
    IS_LOAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    words = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_there = words < num_words
    page = tl.load(pages + index).to(tl.int64)
    cache = tl.load(parts + part).to(tl.pointer_type(tl.int64)) + page * num_words + words
    buffer = staging.to(tl.pointer_type(tl.int64)) + (index * num_parts + part) * num_words + words
    if IS_LOAD:
        tl.store(cache, tl.load(buffer, mask=is_there), mask=is_there)
    else:
        tl.store(buffer, tl.load(cache, mask=is_there), mask=is_there)
