"""Numbers from blocks of GGUF files, in torch: each type by its definition in llama.cpp (ggml-quants.c).

A block has a few scales and the small numbers that they belong to. `gguf_file.py` knows the sizes of blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanoflow.models.gguf_file import TYPES


def rows_of_blocks(rows: Tensor, dtype: str) -> Tensor:
    """float32 [rows, numbers] of uint8 [rows, bytes], blocks one after the other.

    Args:
        rows: The bytes; a whole number of blocks in each row.
        dtype: A key of `TYPES` that is served, as "Q4_K".
    """
    if dtype in _PLAIN:
        return rows.contiguous().view(_PLAIN[dtype]).float()
    blocks = rows.contiguous().view(-1, TYPES[dtype].num_bytes)
    return _READERS[dtype](blocks).reshape(len(rows), -1)


def _half(blocks: Tensor, start: int) -> Tensor:
    """float32 [blocks, 1] from two bytes."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """The low halves of all bytes, then the high ones."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """16 in each of 32 places whose bit is set in four bytes, else 0; uint8 [blocks, 32]."""
    places = torch.arange(32)
    return (blocks[:, start + places // 8] >> (places % 8).to(torch.uint8) & 1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)).float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight groups of a block, float32 [blocks, 8, 1] each, from twelve bytes."""
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), 1)
    minima = torch.cat((mid & 63, high >> 4 | mid >> 6 << 4), 1)
    return scales.float()[..., None], minima.float()[..., None]


def _with_minima(blocks: Tensor, numbers: Tensor) -> Tensor:
    """Numbers [blocks, 8, 32] of a block with 6-bit scales and minima."""
    scales, minima = _six_bits(blocks[:, 4:16])
    return _half(blocks, 0)[..., None] * scales * numbers - _half(blocks, 2)[..., None] * minima


def _q4_k(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _with_minima(blocks, numbers.float())


def _q5_k(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifths = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return _with_minima(blocks, (numbers | fifths << 4).float())


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3
    numbers = (low | high << 4).reshape(-1, 16, 16).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()[..., None]
    return _half(blocks, 208)[..., None] * scales * numbers


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
