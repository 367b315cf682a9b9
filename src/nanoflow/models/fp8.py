"""Numbers in FP8 (e4m3: 4 bits of exponent, 3 of mantissa, up to 448) and the float32 scales that they are times.

Rows are quantised by their largest absolute value, which becomes 448. `fp8_stored.py` says which weights are stored so,
`kernels/` has the same rule for the rows of activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nanoflow.models.stored import Scaled, Stored

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# The scale of a row is at least this, so that a row of zeros can be divided by it.
SMALLEST_SCALE = 1e-12
# Numbers that are in memory as float32 at once.
_CHUNK_NUMBERS = 2**20


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] of any floating-point type as e4m3 [N, K], and the scale of each row, float32 [N, 1].

    An element is divided by its row's scale, in float32, and rounded to the nearest number, ties to even.
    """
    exact = rows.float()
    scales = (exact.abs().amax(-1, keepdim=True) / LARGEST).clamp_(min=SMALLEST_SCALE)
    return (exact / scales).clamp_(-LARGEST, LARGEST).to(E4M3), scales


def quantised_chunks(rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`quantise_rows` of rows [N, K], a few at a time.

    Yields:
        The first of them, e4m3 numbers, and their scales, float32 [rows].
    """
    step = max(_CHUNK_NUMBERS // max(rows[:1].numel(), 1), 1)
    for first in range(0, len(rows), step):
        numbers, scales = quantise_rows(rows[first : first + step])
        yield first, numbers, scales[:, 0]


def dequantised(numbers: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """What e4m3 numbers [N, K] stand for, float32 [N, K]; `scales` are [N], or one for each block."""
    if block is None:
        return numbers.float() * scales[:, None]
    height, width = block
    of_rows = scales.repeat_interleave(height, 0)[: numbers.shape[0]]
    return numbers.float() * of_rows.repeat_interleave(width, 1)[:, : numbers.shape[1]]


def stored_scales(part: Stored, tensors: Mapping[str, Tensor]) -> Tensor:
    """The scales of a part in FP8, float32: [N], also if the tensor has one for all rows, or one for each block."""
    scales = tensors["weight_scale"].float()
    if isinstance(part.form, Scaled) and part.form.block is not None:
        return scales.reshape(scales.shape[0], -1)
    return scales.flatten().expand(part.shape[0])
