"""Triton kernel that copies KV pages between the caches of all layers and one contiguous staging buffer.

A page lies in several pieces for each layer: keys, values and, in 8 bits, their scales. A copy over PCIe wants few
long pieces instead, so pages are gathered into the buffer before they leave the device, and scattered from it when they
come back: one launch for all layers. `executor/page_copies.py` calls it.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PageParts:
    """The pieces of a page.

    Attributes:
        table: int64 [P, 3], for each piece the address of its tensor, its place in a page of the staging buffer, and
            its length, both in words.
        word_bytes: Bytes of a word, the largest that all lengths are multiples of, at most 8.
        page_words, most_words: Length of a page, and of its longest piece.
    """

    table: Tensor
    word_bytes: int
    page_words: int
    most_words: int

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> PageParts:
        """The pieces of pages whose bytes are the rows of these tensors, each uint8 [pages, bytes] and contiguous."""
        word_bytes = math.gcd(max(_WORDS), *(tensor.shape[1] for tensor in tensors))
        words = [tensor.shape[1] // word_bytes for tensor in tensors]
        *places, page_words = itertools.accumulate(words, initial=0)
        rows = [(tensor.data_ptr(), *where) for tensor, *where in zip(tensors, places, words, strict=True)]
        return PageParts(
            table=torch.tensor(rows, dtype=torch.int64, device=tensors[0].device),
            word_bytes=word_bytes,
            page_words=page_words,
            most_words=max(words),
        )


def copy_pages(parts: PageParts, pages: Tensor, staging: Tensor, *, is_load: bool) -> None:
    """Copy pages to the staging buffer, or from it.

    Args:
        parts: The pieces of a page.
        pages: int32 [N], which pages.
        staging: uint8 [N, page bytes], contiguous; a page's pieces one after the other.
        is_load: From the buffer to the caches.
    """
    grid = (len(pages), len(parts.table), triton.cdiv(parts.most_words, _BLOCK))
    _copy_pages[grid](
        *(parts.table, pages, staging, parts.page_words),
        IS_LOAD=is_load,
        WORD=_WORDS[parts.word_bytes],
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _copy_pages(
    parts: tl.tensor,
    pages: tl.tensor,
    staging: tl.tensor,
    page_words: int,
    IS_LOAD: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index, part = tl.program_id(0).to(tl.int64), parts + tl.program_id(1) * 3
    address, place, num_words = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    words = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_there = words < num_words
    page = tl.load(pages + index).to(tl.int64)
    cache = address.to(tl.pointer_type(WORD)) + page * num_words + words
    buffer = staging.to(tl.pointer_type(WORD)) + index * page_words + place + words
    if IS_LOAD:
        tl.store(cache, tl.load(buffer, mask=is_there), mask=is_there)
    else:
        tl.store(buffer, tl.load(cache, mask=is_there), mask=is_there)
