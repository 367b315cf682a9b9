"""Keys and values in 8 bits, for Triton programs that write or read them; `kv_fp8.py` says what they are.

The programs are in `triton_elementwise.py` (`rope_append` writes) and `triton_attention_programs.py` (attention reads).
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.kernels import kv_fp8

_LEAST_SCALE = tl.constexpr(kv_fp8.LEAST_SCALE)
_INVERSE_MAX = tl.constexpr(kv_fp8.INVERSE_MAX)
_ROUND_UP = tl.constexpr(kv_fp8.ROUND_UP)
_BFLOAT16_BITS = tl.constexpr(kv_fp8.BFLOAT16_BITS)
# log2 of the largest element of a row in float16, whose numbers end at 2^16. And of the least scale that weights are
# relative to: with less, sums of powers would exceed float32.
_LARGEST_LOG, _LEAST_LOG = tl.constexpr(14.0), tl.constexpr(-80.0)
_FROM_BITS = tl.constexpr(2.0**-23)


@triton.jit
def quantised_heads(
    first: tl.tensor, second: tl.tensor, is_column: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Heads given as the two members of their pairs, each [heads, pairs], as e4m3 numbers, and scales [heads, 1].

    `is_column` [1, pairs] says which pairs exist. Scales are float32 with the digits of a bfloat16; see
    `kv_fp8.quantised`.
    """
    x, y = first.to(tl.float32), second.to(tl.float32)
    largest = tl.max(tl.where(is_column, tl.maximum(tl.abs(x), tl.abs(y)), 0.0), axis=1, keep_dims=True)
    least = tl.maximum(largest * _INVERSE_MAX, _LEAST_SCALE)
    scales = ((least.to(tl.int32, bitcast=True) + _ROUND_UP) & _BFLOAT16_BITS).to(tl.float32, bitcast=True)
    inverses = tl.div_rn(1.0, scales)
    return (x * inverses).to(tl.float8e4nv), (y * inverses).to(tl.float8e4nv), scales


@triton.jit
def widened(numbers: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Numbers in the type of a product: float16, which one instruction makes of two, or float32."""
    if numbers.dtype == dtype:
        return numbers
    else:  # noqa: RET505  (Triton compiles one of the branches)
        return numbers.to(dtype)


@triton.jit
def in_float16(rows: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Rows [M, D] of a 16-bit type, each divided by a power of two near its largest element, and these powers [M].

    So no element is too large for float16, and none that counts too small.
    """
    exact = rows.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(exact), axis=1), 1e-30)
    power = tl.floor(tl.log2(largest)) - _LARGEST_LOG
    return (exact * tl.exp2(-power)[:, None]).to(tl.float16), tl.exp2(power)


@triton.jit
def load_scales(cells: tl.tensor, exists: tl.tensor, IS_MASKED: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Scales of keys and of values, float32, and about log2 of the largest of the latter.

    Two bfloat16 are in a word, so that one load of 4 bytes has both. The logarithm is at least `_LEAST_LOG`.
    """
    if IS_MASKED:
        both = tl.load(cells, mask=exists, other=0)
    else:
        both = tl.load(cells)
    of_values = both & _BFLOAT16_BITS
    # The bits of a float32 as a number: its exponent counts from 127, and digits below it grow nearly as log2.
    largest = tl.max(of_values, axis=0).to(tl.float32) * _FROM_BITS - 127.0
    scales = (both << 16).to(tl.float32, bitcast=True), of_values.to(tl.float32, bitcast=True)
    return scales[0], scales[1], tl.maximum(largest, _LEAST_LOG)
