"""Products of rows and weights in FP8 (e4m3) on cards with a tensor memory accelerator (Hopper and later).

On the whole card rows and weights that have a scale each are multiplied by `torch._scaled_mm`, where it can: it takes
bfloat16 results and adds nothing. Everything else is a persistent Triton kernel, as in `triton_gemm.py`: products that
add to the residual stream or end in SwiGLU, weights with a scale for each block of 128 x 128, and products on a part of
the card.

Sums are in float32. With scales of rows the tensor cores keep fewer bits of a sum in between (fast accumulation, in
both kernels), and scales are multiplied once, at the end. With scales of blocks each step of 128 features is a sum of
its own, which is scaled and added to one in full float32. The references are in `reference_fp8.py`.

Shape legend: T tokens, K features in, N features out, I width of an activation (the weight has 2 I rows).
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.graph.layers import FP8_BLOCK
from nanoflow.kernels.gemm_tiles import FP8_TILES, GEMM_TILES, GemmTiles, choose_gemm_tiles, with_addend
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.triton_attention import card_of
from nanoflow.kernels.triton_gemm import _activated, _place, _scaled, _write

_ALIGNMENT_BYTES = 16


def linear_fp8(launch: Launch) -> None:
    """out [T, N] = (x [T, K] * its scales [T, 1]) @ (weight [N, K] * its scales)^T (+ bias [N]).

    Raises:
        ValueError: Rows are not aligned to 16 bytes (K must be a multiple of 16, N of 8).
    """
    if can_scale(launch):
        run_scaled_mm(launch)
    else:
        run_linear_fp8(launch, *choose_cut(launch))


def linear_add_fp8(launch: Launch) -> None:
    """hidden [T, N] += the product of `linear_fp8`, added in float32 and rounded once.

    Raises:
        ValueError: As `linear_fp8`.
    """
    run_linear_add_fp8(launch, *choose_cut(launch))


def linear_swiglu_fp8(launch: Launch) -> None:
    """out [T, I] = silu(gate) * up of the product [T, 2 I] of `linear_fp8`, rounded in between, in the model's type.

    One kernel for any number of tokens: with few, reading the weight takes most of the time, and a launch more counts.

    Raises:
        ValueError: As `linear_fp8`, or the weight has scales of blocks.
    """
    run_linear_swiglu_fp8(launch, *choose_cut(launch))


def can_scale(launch: Launch) -> bool:
    """Whether `torch._scaled_mm` computes this product: scales of rows, a bfloat16 result, aligned scales."""
    scales, (out,) = launch.weights[1], launch.writes
    is_aligned = launch.reads[1].data_ptr() % _ALIGNMENT_BYTES == 0
    return scales.dim() == 1 and out.dtype == torch.bfloat16 and is_aligned


def run_scaled_mm(launch: Launch) -> None:
    """`linear_fp8` by torch's product with scales of rows, which CUDA graphs can capture."""
    (x, x_scales), (out,), (weight, scales, *bias) = launch.reads, launch.writes, launch.weights
    torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scales,
        scale_b=scales.view(1, -1),
        bias=bias[0] if bias else None,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out,
    )


def run_linear_fp8(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """`linear_fp8` in Triton, with given tiles and number of programs."""
    _run(launch, tiles, num_programs, is_added=False)


def run_linear_add_fp8(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """`linear_add_fp8` in Triton, with given tiles and number of programs."""
    _run(launch, with_addend(tiles), num_programs, is_added=True)


def run_linear_swiglu_fp8(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """`linear_swiglu_fp8` in one kernel in Triton, with given tiles and number of programs."""
    (x, x_scales), (out,), (weight, scales) = launch.reads, launch.writes, launch.weights
    check_operands(x, weight, out)
    if scales.dim() > 1:
        raise ValueError(f"scales {list(scales.shape)} of blocks of a weight; this kernel takes one for each row")
    # One TMA box loads the same rows of gate and up, which are then adjacent in shared memory.
    parts = weight.view(2, -1, weight.shape[1])
    _linear_swiglu_fp8[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(parts, [2, tiles.block_n // 2, tiles.block_k]),
        *(x_scales, scales),
        TensorDescriptor.from_tensor(out, [tiles.block_m, tiles.store_n // 2]),
        *(*out.shape, x.shape[1]),
        *(tiles.block_m, tiles.block_n // 2, tiles.block_k, tiles.group_m, tiles.store_n // 2),
        tiles.is_flat,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )


def choose_cut(
    launch: Launch, candidates: tuple[GemmTiles, ...] = GEMM_TILES, num_programs: int | None = None
) -> tuple[GemmTiles, int]:
    """Tiles of a launch and the number of programs: one for each SM of the card, unless another number is given."""
    card = card_of(launch.reads[0].device)
    weight, scales, *_ = launch.weights
    num_programs = num_programs or card.num_sms
    fitting = FP8_TILES[candidates, scales.dim() > 1]
    shape = (len(launch.reads[0]), len(weight))
    return choose_gemm_tiles(fitting, *shape, num_programs, card.shared_memory_bytes), num_programs


def check_operands(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Raise ValueError for tensors that TMA cannot load, or of other types."""
    for name, tensor in (("input", x), ("weight", weight)):
        if tensor.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} of type {tensor.dtype}; products in FP8 take float8_e4m3fn")
    for name, tensor in (("input", x), ("weight", weight), ("output", out)):
        row_bytes = tensor.stride(0) * tensor.element_size()
        if tensor.stride(1) != 1 or row_bytes % _ALIGNMENT_BYTES or tensor.data_ptr() % _ALIGNMENT_BYTES:
            raise ValueError(
                f"{name} {list(tensor.shape)} has rows every {row_bytes} bytes; TMA takes contiguous rows that begin "
                f"at multiples of {_ALIGNMENT_BYTES} bytes"
            )


def _run(launch: Launch, tiles: GemmTiles, num_programs: int, *, is_added: bool) -> None:
    x, x_scales, *_ = launch.reads
    (out,), (weight, scales, *biases) = launch.writes, launch.weights
    check_operands(x, weight, out)
    is_blocked = scales.dim() > 1
    if is_blocked and (tiles.block_n, tiles.block_k) != FP8_BLOCK:
        raise ValueError(f"tiles of {tiles.block_n} x {tiles.block_k} do not fit blocks of {FP8_BLOCK} with a scale")
    _linear_fp8[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(weight, [tiles.block_n, tiles.block_k]),
        *(x_scales, scales, biases[0] if biases else None),
        TensorDescriptor.from_tensor(out, [tiles.block_m, tiles.store_n]),
        *(*out.shape, x.shape[1]),
        *(tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m, tiles.store_n),
        *(tiles.is_flat, is_added, is_blocked),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["x_scales"])
def _linear_fp8(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    x_scales: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor | None,
    out: tl.tensor_descriptor,
    num_rows: int,
    num_columns: int,
    num_features: int,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_N: tl.constexpr,
    IS_FLAT: tl.constexpr,
    IS_ADDED: tl.constexpr,
    IS_BLOCKED: tl.constexpr,
) -> None:
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    num_steps = tl.cdiv(num_features, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=IS_FLAT):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(num_steps):
            feature = step * BLOCK_K
            if IS_BLOCKED:
                scale = tl.load(scales + tile_n * num_steps + step)
                acc += tl.dot(x.load([row, feature]), weight.load([column, feature]).T) * scale
            else:
                acc = tl.dot(x.load([row, feature]), weight.load([column, feature]).T, acc)
        if IS_BLOCKED:
            rows = row + tl.arange(0, BLOCK_M)
            acc *= tl.load(x_scales + rows, mask=rows < num_rows, other=0.0)[:, None]
        else:
            acc = _scaled(acc, x_scales, scales, row, column, num_rows, num_columns, BLOCK_M, BLOCK_N)
        _write(out, bias, row, column, num_columns, acc, BLOCK_M, BLOCK_N, STORE_N, IS_ADDED)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["x_scales"])
def _linear_swiglu_fp8(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    x_scales: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor_descriptor,
    num_rows: int,
    num_columns: int,
    num_features: int,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_N: tl.constexpr,
    IS_FLAT: tl.constexpr,
) -> None:
    """BLOCK_N counts columns of the output; weight is [2, I, K], whose gate and up rows are factors of one product."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=IS_FLAT):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for feature in range(0, num_features, BLOCK_K):
            factors = weight.load([0, column, feature]).reshape(2 * BLOCK_N, BLOCK_K)
            acc = tl.dot(x.load([row, feature]), factors.T, acc)
        rows, places = row + tl.arange(0, BLOCK_M), tl.arange(0, 2 * BLOCK_N)
        acc *= tl.load(x_scales + rows, mask=rows < num_rows, other=0.0)[:, None]
        # Scales of up rows come after those of all gates.
        columns = column + places % BLOCK_N
        of_columns = scales + places // BLOCK_N * num_columns + columns
        acc *= tl.load(of_columns, mask=columns < num_columns, other=0.0)[None, :]
        activated = _activated(acc, out.dtype, BLOCK_M, BLOCK_N)
        _write(out, None, row, column, num_columns, activated, BLOCK_M, BLOCK_N, STORE_N, False)
