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
    """Numbers in the type of activations; through float32, as Hopper converts float16 to bfloat16 slowly."""
    if numbers.dtype == dtype:
        return numbers
    else:  # noqa: RET505  (Triton compiles one of the branches)
        return numbers.to(tl.float32).to(dtype)


@triton.jit
def load_scales(cells: tl.tensor, exists: tl.tensor, IS_MASKED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Scales of keys and of values, float32: two bfloat16 in a word, so that one load of 4 bytes has both."""
    if IS_MASKED:
        both = tl.load(cells, mask=exists, other=0)
    else:
        both = tl.load(cells)
    return (both << 16).to(tl.float32, bitcast=True), (both & _BFLOAT16_BITS).to(tl.float32, bitcast=True)
