"""Keys and values in 8 bits: each vector of a head becomes float8_e4m3fn numbers and one scale.

The scale is the vector's largest element over 448, the largest number of e4m3, so the largest elements lose almost
nothing. Rounding any other costs at most 1/16 of it, as e4m3 has four significant bits, whatever the size of the
vector. A scale is stored in 16 bits, rounded up. Who writes and reads is in `reference.py` and the Triton kernels;
which layers have such a cache is said by `AttentionDims.kv_type`.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8, SCALE = torch.float8_e4m3fn, torch.bfloat16
# Of a vector of zeros too, so that its inverse is a number.
LEAST_SCALE = 2.0**-120
INVERSE_MAX = 1.0 / 448.0
# Added to the bits of a float32, and those of a bfloat16 taken: rounds up.
ROUND_UP, BFLOAT16_BITS = 0xFFFF, -0x10000
# All but the highest bit of the exponent.
_FLOAT16_BITS = -0x4001


def quantised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and scales of vectors.

    Args:
        vectors: [..., D], floating point.

    Returns:
        float8_e4m3fn [..., D], and bfloat16 [...]. Of a vector with an element that is not finite the scale is not
        finite, so that what is computed from it is not either.
    """
    exact = vectors.float()
    least = (exact.abs().amax(-1) * INVERSE_MAX).clamp(min=LEAST_SCALE)
    scales = ((least.view(torch.int32) + ROUND_UP) & BFLOAT16_BITS).view(torch.float32)
    return (exact * (1.0 / scales)[..., None]).to(FP8), scales.to(SCALE)


def dequantised(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors [..., D] in a type, from float8_e4m3fn [..., D] and bfloat16 [...].

    By bits, which takes a CPU a third of the time of a cast: the seven bits of an e4m3 number behind its sign are those
    of a float16, but its exponent counts from 8 less.
    """
    bits = (numbers.view(torch.int8).to(torch.int16) << 7).bitwise_and_(_FLOAT16_BITS)
    return bits.view(torch.float16).float().mul_(scales.float()[..., None] * 256.0).to(dtype)
