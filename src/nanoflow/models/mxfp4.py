"""Weights in MXFP4 as kernels take them: how the bytes of a checkpoint are laid out on a device, and read back.

A number has 4 bits (E2M1): its sign, two bits of exponent, one of mantissa. 32 numbers of a row share a power of two
(E8M0). A checkpoint has bytes of two neighbours, [E, N, K / 2], and scales [E, N, K / 32]. On a device the same bits
are

- words, int32 [E, N, K / 8]. Word 4 g + q of a row has the numbers 32 g + 2 q + 8 j and the next one, for j from 0 to
  3: the lower half of the word has the first of each such pair, the upper half the second. These are the numbers of a
  group that one thread has in the left factor of a product of a warpgroup. Within a half the bits stand where few
  shifts and masks bring them to their places in a bfloat16 number (`pairs_of`), up to a factor of 2^126;
- scales, uint8 [E, K / 32, N], as threads of a program need those of neighbouring rows.

Where the matrix has rows of gate and up, which checkpoints alternate, eight rows of each alternate here: a thread that
has row r of a product also has row r + 8, so that it can compute the activation alone.

Shape legend: E experts, N rows of a matrix, K numbers of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nanoflow.graph.layers import MXFP4_GROUP
from nanoflow.models.fields import ModelError, shown
from nanoflow.models.stored import Stored

# Rows of gate, then of up, that alternate.
ALTERNATING = 8
# Scales are 2^(s - 127). Kernels multiply by 2^(s - 1), which must be a bfloat16 number.
LARGEST_SCALE = 128
# Scales of random weights: either makes numbers with a deviation of about 0.02.
_DRAWN_SCALES = (119, 120)
# Words that are in memory in other forms at once, some ten times as large.
_WORDS_AT_ONCE = 2**21


def check_range(part: Stored, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError for a scale that kernels cannot multiply by, or that is no number."""
    largest = int(tensors["scales"].max())
    if largest > LARGEST_SCALE:
        where = f"{part.tensors['scales'].path}: {part.names['scales']}"
        raise ModelError(
            f"{where} has a scale of {shown(largest)}; weights are kept in MXFP4 up to {LARGEST_SCALE}, which stands "
            "for 2: read them into 16 bits (quantization none)"
        )


def lay_out(words: Tensor, scales: Tensor, *, is_gated: bool) -> None:
    """Change the bytes of a checkpoint to what kernels take, in place, some matrices at a time.

    Args:
        words: int32 [E, N, K / 8], contiguous, with the bytes of the blocks in it.
        scales: uint8 [E, K / 32, N], contiguous, with scales [E, N, K / 32] in it.
        is_gated: Whether rows of gate and up alternate.
    """
    count, num_rows, per_row = words.shape
    step = max(_WORDS_AT_ONCE // (num_rows * per_row), 1)
    for first in range(0, count, step):
        some, powers = words[first : first + step], scales[first : first + step]
        stored = some.view(torch.uint8).view(len(some), num_rows, -1, MXFP4_GROUP // 2)
        laid = words_of(_alternated(stored, is_gated=is_gated))
        some.copy_(laid.view_as(some))
        by_row = powers.reshape(len(some), num_rows, -1)
        powers.copy_(_alternated(by_row, is_gated=is_gated).transpose(1, 2).clone())


def _alternated(rows: Tensor, *, is_gated: bool) -> Tensor:
    """Rows [E, N, ...] in the order of kernels: of rows that alternate singly, eight and eight."""
    if not is_gated:
        return rows
    return torch.unflatten(rows, 1, (-1, ALTERNATING, 2)).transpose(2, 3).flatten(1, 3)


def words_of(blocks: Tensor) -> Tensor:
    """int32 [..., 4]: the words of groups, uint8 [..., 16]."""
    # Byte 4 j + q has pair j of word q.
    pairs = torch.unflatten(blocks, -1, (4, 4)).int()
    # The first number in the lowest bits of the lower half, the second in those of the upper half.
    pairs = (pairs & 0xF) | (pairs & 0xF0) << 12
    signs, sizes = pairs & 0x00080008, pairs & 0x00070007
    exponents, mantissas = pairs & 0x00060006, pairs & 0x00010001
    first = signs[..., 0, :] << 12 | sizes[..., 0, :] << 6
    second = signs[..., 1, :] << 9 | sizes[..., 1, :] << 3
    third = signs[..., 2, :] << 6 | sizes[..., 2, :]
    last = signs[..., 3, :] << 11 | exponents[..., 3, :] << 9 | mantissas[..., 3, :] << 13
    return first | second | third | last


def pairs_of(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int32: the four pairs of bfloat16 numbers of each word, times 2^-126."""
    in_place = 0x81C081C0 - 2**32
    return (
        words & in_place,
        words << 3 & in_place,
        words << 6 & in_place,
        words << 1 & (0x80008000 - 2**32) | words >> 3 & 0x01800180 | words >> 7 & 0x00400040,
    )


def numbers_of(words: Tensor, scales: Tensor, *, is_gated: bool) -> Tensor:
    """bfloat16 [..., N, K]: the numbers of words [..., N, K / 8] with scales [..., K / 32, N], exactly.

    Rows of gate come first, then those of up.
    """
    # [..., N, group, pair, word, half]
    pairs = torch.stack([torch.unflatten(each, -1, (-1, 4)) for each in pairs_of(words)], dim=-2).contiguous()
    numbers = torch.unflatten(pairs.view(torch.bfloat16), -1, (4, 2))
    factors = (scales.to(torch.int16) + 126 << 7).view(torch.bfloat16).transpose(-1, -2)
    rows = (numbers * factors[..., None, None, None]).flatten(-4)
    if not is_gated:
        return rows
    return torch.unflatten(rows, -2, (-1, 2, ALTERNATING)).transpose(-4, -3).flatten(-4, -2)


def draw_mxfp4(words: Tensor, scales: Tensor, generator: torch.Generator) -> None:
    """Random bits for all words, and scales that make numbers of the size of other random weights."""
    words.view(torch.uint8).random_(0, 256, generator=generator)
    scales.random_(_DRAWN_SCALES[0], _DRAWN_SCALES[-1] + 1, generator=generator)
