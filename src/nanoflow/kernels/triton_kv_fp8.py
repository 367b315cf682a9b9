"""Keys and values in 8 bits, for Triton programs that write or read them; `kv_fp8.py` says what they are.

The programs are in `triton_elementwise.py` (`rope_append` writes) and `triton_attention_programs.py` (attention reads).
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.kernels import kv_fp8

_MANTISSA_BITS = tl.constexpr(kv_fp8.MANTISSA_BITS)
_CARRY = tl.constexpr(kv_fp8.CARRY)
_TOP_EXPONENT = tl.constexpr(kv_fp8.TOP_EXPONENT)
_LEAST_EXPONENT = tl.constexpr(kv_fp8.LEAST_EXPONENT)
_INFINITE = tl.constexpr(kv_fp8.INFINITE)


@triton.jit
def quantised_heads(
    first: tl.tensor, second: tl.tensor, is_column: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Heads given as the two members of their pairs, each [heads, pairs], as e4m3 numbers, and factors [heads, 1].

    `is_column` [1, pairs] says which pairs exist. Factors are float32; see `kv_fp8.quantised`.
    """
    x, y = first.to(tl.float32), second.to(tl.float32)
    largest = tl.max(tl.where(is_column, tl.maximum(tl.abs(x), tl.abs(y)), 0.0), axis=1, keep_dims=True)
    bits = largest.to(tl.int32, bitcast=True)
    exponents = tl.maximum(((bits + _CARRY) >> _MANTISSA_BITS) - _TOP_EXPONENT, _LEAST_EXPONENT)
    inverses = ((254 - exponents) << _MANTISSA_BITS).to(tl.float32, bitcast=True)
    factors = (tl.where(bits >= _INFINITE, 255, exponents) << _MANTISSA_BITS).to(tl.float32, bitcast=True)
    return (x * inverses).to(tl.float8e4nv), (y * inverses).to(tl.float8e4nv), factors


@triton.jit
def widened(numbers: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Numbers in the type of activations; through float32, as Hopper converts float16 to bfloat16 slowly."""
    if numbers.dtype == dtype:
        return numbers
    else:  # noqa: RET505  (Triton compiles one of the branches)
        return numbers.to(tl.float32).to(dtype)


@triton.jit
def load_factors(cells: tl.tensor, exists: tl.tensor, IS_MASKED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Factors of keys and of values, float32: two bfloat16 in a word, so that one load of 4 bytes has both."""
    if IS_MASKED:
        both = tl.load(cells, mask=exists, other=0)
    else:
        both = tl.load(cells)
    return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
