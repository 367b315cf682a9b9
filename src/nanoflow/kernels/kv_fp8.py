"""Keys and values in 8 bits: each vector of a head becomes float8_e4m3fn numbers and one factor, a power of two.

Rounding an element costs at most 1/16 of it, whatever the size of the vector: e4m3 has four significant bits, and the
factor puts the largest element near the end of its range (448). A power of two changes no bit of an element, so a key
or a value times its factor is a number of every 16-bit type, the same in every kernel. Who writes and reads them is in
`reference.py` and the Triton kernels; which layers have them is said by `AttentionDims.kv_type`.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8, SCALE = torch.float8_e4m3fn, torch.bfloat16
# Bits of a float32. The largest number of e4m3 is 1.75 x 2^8: a vector whose largest element has the exponent E gets
# the factor 2^(E - 8) if that element has a mantissa of at most 1.75, else 2^(E - 7).
# No factor is less than the smallest number of float16.
MANTISSA_BITS, CARRY, TOP_EXPONENT = 23, 0x1FFFFF, 8
INFINITE, LEAST_EXPONENT = 0x7F800000, 127 - 24


def quantised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and factors of vectors.

    Args:
        vectors: [..., D], floating point.

    Returns:
        float8_e4m3fn [..., D], and bfloat16 [...]. A vector with an element that is not finite has the factor
        infinity, so that what is computed from it is not finite either.
    """
    exact = vectors.float()
    bits = exact.abs().amax(-1).view(torch.int32)
    exponents = (((bits + CARRY) >> MANTISSA_BITS) - TOP_EXPONENT).clamp(min=LEAST_EXPONENT)
    inverses = ((254 - exponents) << MANTISSA_BITS).view(torch.float32)
    factors = (exponents.masked_fill(bits >= INFINITE, 255) << MANTISSA_BITS).view(torch.float32)
    return (exact * inverses[..., None]).to(FP8), factors.to(SCALE)


def dequantised(numbers: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors [..., D] in a type, from float8_e4m3fn [..., D] and bfloat16 [...]; nothing is rounded."""
    return numbers.to(dtype) * factors.to(dtype)[..., None]
