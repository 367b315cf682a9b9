"""Row-wise kernels in Triton that write rows in FP8 (e4m3) and a float32 scale for each row, one launch each.

The references are the functions of the same names in `reference_fp8.py`, with the same rounding: to the model's type,
then by the largest absolute value of the row, which becomes 448. So a program has a whole row. Numbers are read once
and written once, in half as many bytes.

Shape legend: T tokens, W width.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.graph.operation import NormDims, OpKind
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.triton_elementwise import _weighted

_ELEMENTS_PER_THREAD = 16
_THREADS_PER_WARP = 32
# With twice as many there would be one program on an SM, and nothing beside it while it waits.
_MAX_WARPS = 16


def rms_norm_fp8(launch: Launch) -> None:
    """RMSNorm of hidden [T, W]: rows e4m3 [T, W], scales float32 [T, 1], and perhaps the rows as well [T, W]."""
    assert isinstance(launch.op.dims, NormDims)
    (hidden,) = launch.reads
    numbers, scales, *kept = launch.writes
    block, num_warps = _block_of(numbers)
    _rms_norm_fp8[(len(hidden),)](
        *(hidden, numbers, scales, kept[0] if kept else None, launch.weights[0], launch.op.dims.eps),
        *(hidden.shape[1], block),
        num_warps=num_warps,
    )


def swiglu_fp8(launch: Launch) -> None:
    """silu(gate) * up of [T, 2 W], gate then up: rows e4m3 [T, W] and scales float32 [T, 1]."""
    _gated(launch, is_gelu=False)


def geglu_fp8(launch: Launch) -> None:
    """gelu(gate) * up of [T, 2 W] with the tanh form of GELU: rows e4m3 [T, W] and scales float32 [T, 1]."""
    _gated(launch, is_gelu=True)


def quantise_fp8(launch: Launch) -> None:
    """Rows e4m3 [T, W] and scales float32 [T, P] of x [T, W], whose rows are P equal parts with a scale each."""
    (x,), (numbers, scales) = launch.reads, launch.writes
    parts = numbers.view(scales.numel(), -1)
    block, num_warps = _block_of(parts)
    _quantise_fp8[(len(parts),)](x, parts, scales, parts.shape[1], block, num_warps=num_warps)


def _gated(launch: Launch, *, is_gelu: bool) -> None:
    (gate_up,) = launch.reads
    numbers, scales, *kept = launch.writes
    block, num_warps = _block_of(numbers)
    _gated_fp8[(len(gate_up),)](
        *(gate_up, numbers, scales, kept[0] if kept else None),
        *(numbers.shape[1], block, is_gelu),
        num_warps=num_warps,
    )


def _block_of(rows: Tensor) -> tuple[int, int]:
    """Elements of a program, a power of two, and its warps."""
    block = triton.next_power_of_2(rows.shape[1])
    return block, min(max(block // (_ELEMENTS_PER_THREAD * _THREADS_PER_WARP), 1), _MAX_WARPS)


@triton.jit
def _rms_norm_fp8(
    hidden: tl.tensor,
    numbers: tl.tensor,
    scales: tl.tensor,
    kept: tl.tensor | None,
    weight: tl.tensor,
    eps: float,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    cells = tl.program_id(0).to(tl.int64) * WIDTH + columns
    exact = tl.load(hidden + cells, mask=is_inside, other=0.0).to(tl.float32)
    # Loaded before the sum, which every thread waits for.
    factors = tl.load(weight + columns, mask=is_inside, other=0.0)
    exact *= tl.rsqrt(tl.sum(exact * exact) / WIDTH + eps)
    rows = _weighted(exact, factors).to(hidden.dtype.element_ty)
    if kept is not None:
        tl.store(kept + cells, rows, mask=is_inside)
    _put(rows, numbers + cells, scales, is_inside)


@triton.jit
def _gated_fp8(
    gate_up: tl.tensor,
    numbers: tl.tensor,
    scales: tl.tensor,
    kept: tl.tensor | None,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_GELU: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    source = gate_up + row * 2 * WIDTH + columns
    gate = tl.load(source, mask=is_inside, other=0.0)
    up = tl.load(source + WIDTH, mask=is_inside, other=0.0).to(tl.float32)
    exact = gate.to(tl.float32)
    turned = exact
    if IS_GELU:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)) with z = sqrt(2 / pi) (x + 0.044715 x^3).
        turned = 1.5957691216057308 * (exact + 0.044715 * exact * exact * exact)
    # Rounded between the two factors, as the separate operations of a model in this dtype do.
    activated = (exact / (1.0 + tl.exp(-turned))).to(gate.dtype).to(tl.float32)
    rows = (activated * up).to(gate.dtype)
    cells = row * WIDTH + columns
    if kept is not None:
        tl.store(kept + cells, rows, mask=is_inside)
    _put(rows, numbers + cells, scales, is_inside)


@triton.jit
def _quantise_fp8(
    x: tl.tensor, numbers: tl.tensor, scales: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    cells = tl.program_id(0).to(tl.int64) * WIDTH + columns
    _put(tl.load(x + cells, mask=is_inside, other=0.0), numbers + cells, scales, is_inside)


@triton.jit
def _put(rows: tl.tensor, places: tl.tensor, scales: tl.tensor, is_inside: tl.tensor) -> None:
    """Quantise the row of this program, whose elements outside are 0, and write it and its scale."""
    exact = rows.to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(exact)), 448.0), 1e-12)
    # A division for each number would be a third of all instructions. The product may be another number in its last
    # bit, which is far below the steps of FP8; the largest number of a row still becomes 448.
    number = exact * tl.div_rn(1.0, scale)
    tl.store(places, number.to(tl.float8e4nv), mask=is_inside)
    tl.store(scales + tl.program_id(0), scale)


FP8_ROW_KERNELS: dict[OpKind, Kernel] = {
    OpKind.RMS_NORM_FP8: rms_norm_fp8,
    OpKind.SWIGLU_FP8: swiglu_fp8,
    OpKind.GEGLU_FP8: geglu_fp8,
    OpKind.QUANTISE_FP8: quantise_fp8,
}
