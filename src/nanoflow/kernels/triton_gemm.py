"""Products with weights in Triton for cards with a tensor memory accelerator (TMA: Hopper and later), 16-bit dtypes.

Each is a persistent kernel: a given number of programs share the tiles, so a product can be restricted to a part of the
card. TMA clips at the edges of tensors, so any number of tokens works. `linear_swiglu` is `linear` and `swiglu` in one
kernel, which saves the memory traffic of [T, 2 I] between them; with few tokens two kernels run instead. The references
are the functions of these names in `reference.py`, with the same rounding.

Shape legend: T tokens, K features in, N features out, I width of the activation (the weight has 2 I rows).
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.kernels import triton_elementwise
from nanoflow.kernels.gemm_tiles import GEMM_TILES, GemmTiles, choose_gemm_tiles, with_addend
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.triton_attention import card_of

# TMA needs addresses and row lengths that are multiples of this.
_ALIGNMENT_BYTES = 16
_ITEM_BYTES = 2
# With fewer tokens most memory traffic is the weight. Fusing saves little, and cuBLAS reads the weight faster.
_MIN_FUSED_TOKENS = 64


def has_tma(device: torch.device) -> bool:
    """Whether a device can run the kernels of this file: compute capability 9 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def run_linear(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T (+ bias [N]), with given tiles and number of programs.

    Raises:
        ValueError: The dtype does not have 16 bits, or rows are not aligned to 16 bytes (K and N must be multiples of
        8).
    """
    _run_linear(launch, tiles, num_programs, is_added=False)


def run_linear_add(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """hidden [T, N] += x [T, K] @ weight [N, K]^T (+ bias [N]) with given tiles, added in float32 and rounded once.

    Raises:
        ValueError: As `run_linear`.
    """
    _run_linear(launch, with_addend(tiles), num_programs, is_added=True)


def _run_linear(launch: Launch, tiles: GemmTiles, num_programs: int, is_added: bool) -> None:
    x, (out,), (weight, *biases) = launch.reads[0], launch.writes, launch.weights
    check_operands(x, weight, out)
    _linear[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(weight, [tiles.block_n, tiles.block_k]),
        biases[0] if biases else None,
        TensorDescriptor.from_tensor(out, [tiles.block_m, tiles.store_n]),
        *(*out.shape, x.shape[1]),
        *(tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m, tiles.store_n),
        *(tiles.is_flat, is_added),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )


def linear_swiglu(launch: Launch) -> None:
    """out [T, I] = silu(x @ gate^T) * (x @ up^T), of x [T, K] and weight [2 I, K]: gate rows, then up rows.

    Raises:
        ValueError: The tensors do not suit TMA (see `run_linear_swiglu`), and there are enough tokens for the fused
            kernel.
    """
    if len(launch.reads[0]) < _MIN_FUSED_TOKENS:
        linear_then_swiglu(launch)
    else:
        run_linear_swiglu(launch, *choose_cut(launch))


def linear_then_swiglu(launch: Launch) -> None:
    """`linear_swiglu` as two kernels (cuBLAS, then SwiGLU), for any dtype and alignment."""
    gate_up = torch.mm(launch.reads[0], launch.weights[0].t())
    triton_elementwise.swiglu(replace(launch, reads=(gate_up,), weights=()))


def run_linear_swiglu(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """`linear_swiglu` in one kernel, with given tiles and number of programs.

    Raises:
        ValueError: The dtype does not have 16 bits, or rows are not aligned to 16 bytes (K and I must be multiples of
        8).
    """
    (x,), (out,), (weight,) = launch.reads, launch.writes, launch.weights
    check_operands(x, weight, out)
    # One TMA box loads the same rows of gate and up, which are then adjacent in shared memory.
    parts = weight.view(2, -1, weight.shape[1])
    _linear_swiglu[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(parts, [2, tiles.block_n // 2, tiles.block_k]),
        TensorDescriptor.from_tensor(out, [tiles.block_m, tiles.store_n // 2]),
        *(*out.shape, x.shape[1]),
        *(tiles.block_m, tiles.block_n // 2, tiles.block_k, tiles.group_m, tiles.store_n // 2),
        tiles.is_flat,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )


def choose_cut(launch: Launch) -> tuple[GemmTiles, int]:
    """Tiles of a launch on the whole card, and the number of programs."""
    card = card_of(launch.reads[0].device)
    shape = (len(launch.reads[0]), len(launch.weights[0]))
    return choose_gemm_tiles(GEMM_TILES, *shape, card.num_sms, card.shared_memory_bytes), card.num_sms


def check_operands(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Raise ValueError for tensors that TMA cannot load."""
    for name, tensor in (("input", x), ("weight", weight), ("output", out)):
        if tensor.element_size() != _ITEM_BYTES:
            raise ValueError(f"{name} of type {tensor.dtype}; products in Triton take bfloat16 and float16")
        is_aligned = tensor.data_ptr() % _ALIGNMENT_BYTES == 0
        row_bytes = tensor.stride(0) * _ITEM_BYTES
        if tensor.stride(1) != 1 or row_bytes % _ALIGNMENT_BYTES or not is_aligned:
            raise ValueError(
                f"{name} {list(tensor.shape)} has rows every {row_bytes} bytes; TMA takes contiguous rows that begin "
                f"at multiples of {_ALIGNMENT_BYTES} bytes: use the reference kernel"
            )


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
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
) -> None:
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=IS_FLAT):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for feature in range(0, num_features, BLOCK_K):
            acc = tl.dot(x.load([row, feature]), weight.load([column, feature]).T, acc)
        _write(out, bias, row, column, num_columns, acc, BLOCK_M, BLOCK_N, STORE_N, IS_ADDED)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_swiglu(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
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
            rows = weight.load([0, column, feature]).reshape(2 * BLOCK_N, BLOCK_K)
            acc = tl.dot(x.load([row, feature]), rows.T, acc)
        activated = _activated(acc, out.dtype, BLOCK_M, BLOCK_N)
        _write(out, None, row, column, num_columns, activated, BLOCK_M, BLOCK_N, STORE_N, False)


@triton.jit
def _place(
    tile: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor, GROUP_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of a tile in an order that goes down the columns within groups of GROUP_M rows of tiles."""
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    place = tile % (GROUP_M * tiles_n)
    return first + place % height, place // height


@triton.jit
def _activated(acc: tl.tensor, dtype: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr) -> tl.tensor:
    """silu(left half) * right half, with the rounding of the separate operations."""
    gate, up = _halves(acc, BLOCK_M, HALF)
    exact = gate.to(dtype).to(tl.float32)
    activated = (exact / (1.0 + tl.exp(-exact))).to(dtype).to(tl.float32)
    return (activated * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _scaled(
    acc: tl.tensor,
    x_scales: tl.tensor | None,
    scales: tl.tensor | None,
    row: tl.tensor,
    column: tl.tensor,
    num_rows: int,
    num_columns: int,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Sums of FP8 times the scale of each row of x, and of each row of the weight; others have no scales."""
    if scales is not None:
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        acc *= tl.load(x_scales + rows, mask=rows < num_rows, other=0.0)[:, None]
        acc *= tl.load(scales + columns, mask=columns < num_columns, other=0.0)[None, :]
    return acc


@triton.jit
def _write(
    out: tl.tensor_descriptor,
    bias: tl.tensor | None,
    row: tl.tensor,
    column: tl.tensor,
    num_columns: int,
    cells: tl.tensor,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    STORE_N: tl.constexpr,
    IS_ADDED: tl.constexpr,
) -> None:
    """Add the bias, and the old values if IS_ADDED; round once. Halves recursively until a part can be stored."""
    if WIDTH > STORE_N:
        left, right = _halves(cells, BLOCK_M, WIDTH // 2)
        _write(out, bias, row, column, num_columns, left, BLOCK_M, WIDTH // 2, STORE_N, IS_ADDED)
        _write(out, bias, row, column + WIDTH // 2, num_columns, right, BLOCK_M, WIDTH // 2, STORE_N, IS_ADDED)
    else:
        if bias is not None:
            columns = column + tl.arange(0, WIDTH)
            cells += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
        if IS_ADDED:
            cells += out.load([row, column]).to(tl.float32)
        out.store([row, column], cells.to(out.dtype))


@triton.jit
def _halves(cells: tl.tensor, BLOCK_M: tl.constexpr, HALF: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Left and right columns of [BLOCK_M, 2 HALF]; a thread has both columns of a pair, so no data moves."""
    left, right = tl.split(tl.permute(tl.reshape(cells, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    return left, right
