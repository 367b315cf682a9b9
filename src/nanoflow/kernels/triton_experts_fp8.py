"""Grouped products of a mixture of experts in FP8 (e4m3) in Triton, for Hopper and later.

One persistent launch for all experts, which finds its tiles on the device, as in `triton_experts.py`. Rows are
quantised by whom the graph says: those of `experts_in_fp8` by the norm, once for all experts of a token; those of
`experts_out_fp8` by a pass over them, each with a scale of its own. Sums are in float32, as in `triton_fp8.py`: with
scales of rows the tensor cores sum fast, and scales are multiplied at the end; with scales of blocks each step of 128
features is scaled and added in full. The references are in `reference_experts_fp8.py`.

Shape legend: T tokens, E experts, K experts of a token, H width of the model, I width of an expert; T x K rows, sorted
by expert.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.graph.layers import FP8_BLOCK
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.expert_tiles import FP8_EXPERT_TILES, WHOLE_CARD, ExpertTiles, choose_expert_tiles
from nanoflow.kernels.gemm_tiles import GemmTiles
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.triton_attention import card_of
from nanoflow.kernels.triton_experts import _found, _tile_ends, _write_rows
from nanoflow.kernels.triton_fp8 import check_operands
from nanoflow.kernels.triton_gemm import _activated, _halves


def experts_in_fp8(launch: Launch) -> None:
    """activation [T, K x I], seen as [T x K, I] in the experts' order: silu(gate) * up of the row of each one's token.

    Rows are x e4m3 [T, H] times its scales [T, 1]. The weight is e4m3 [E, 2 I, H], each expert's gate rows before its
    up rows, times scales: one for each row [E, 2 I], or one for each block of 128 x 128.

    Raises:
        ValueError: See `run_experts_in_fp8`.
    """
    experts_in_fp8_on(launch, WHOLE_CARD, card_of(launch.reads[0].device).num_sms)


def experts_out_fp8(launch: Launch) -> None:
    """out [T, K x H], seen as [T x K, H] in the tokens' order: each row's activation @ its expert's weight^T.

    The activation is e4m3 [T, K x I], seen as [T x K, I] in the experts' order, times scales [T, K] in that order; the
    weight is e4m3 [E, H, I] times scales, as in `experts_in_fp8`.

    Raises:
        ValueError: See `run_experts_out_fp8`.
    """
    experts_out_fp8_on(launch, WHOLE_CARD, card_of(launch.reads[0].device).num_sms)


def experts_in_fp8_on(launch: Launch, candidates: tuple[ExpertTiles, ...], num_programs: int) -> None:
    """`experts_in_fp8` on so many multiprocessors, with tiles made of these candidates of 16 bits."""
    run_experts_in_fp8(launch, choose_cut(launch, candidates).first, num_programs)


def experts_out_fp8_on(launch: Launch, candidates: tuple[ExpertTiles, ...], num_programs: int) -> None:
    """`experts_out_fp8` on so many multiprocessors, with tiles made of these candidates of 16 bits."""
    run_experts_out_fp8(launch, choose_cut(launch, candidates).second, num_programs)


def choose_cut(launch: Launch, candidates: tuple[ExpertTiles, ...] = WHOLE_CARD) -> ExpertTiles:
    """Tiles by the rows that an expert has on average."""
    limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
    weight, scales = launch.weights
    fitting, anywhere = FP8_EXPERT_TILES[candidates, _is_blocked(scales)]
    return choose_expert_tiles(fitting, launch.reads[2].numel() / len(weight), limit_bytes, anywhere)


def run_experts_in_fp8(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """`experts_in_fp8` with given tiles and number of programs.

    Raises:
        ValueError: A type is another one, rows are not aligned to 16 bytes (H must be a multiple of 16, I of 8), or
        tiles do not fit blocks with a scale.
    """
    (x, x_scales, rows, ends), (activation,), (weight, scales) = launch.reads, launch.writes, launch.weights
    num_experts, doubled, num_features = weight.shape
    out, half = activation.view(rows.numel(), -1), tiles.block_n // 2
    _check(x, weight, scales, out, tiles, half)
    _experts_in_fp8[(num_programs,)](
        x,
        # One TMA box loads the same rows of an expert's gate and up, which are then adjacent in shared memory.
        TensorDescriptor.from_tensor(
            weight.view(2 * num_experts, doubled // 2, num_features), [2, half, tiles.block_k]
        ),
        *(x_scales, scales, out, rows, ends),
        *(rows.shape[1], doubled // 2, num_features),
        *(num_experts, triton.next_power_of_2(num_experts)),
        *(tiles.block_m, half, tiles.block_k, tiles.group_m, tiles.store_n // 2, tiles.is_flat),
        *(num_features % tiles.block_k == 0, _is_blocked(scales)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )


def run_experts_out_fp8(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """`experts_out_fp8` with given tiles and number of programs.

    Raises:
        ValueError: As `run_experts_in_fp8`; I must be a multiple of 16, H of 8.
    """
    (activation, x_scales, rows, ends), (by_token,), (weight, scales) = launch.reads, launch.writes, launch.weights
    num_experts, num_columns, num_features = weight.shape
    x, out = activation.view(rows.numel(), -1), by_token.view(rows.numel(), -1)
    _check(x, weight, scales, out, tiles, tiles.block_n)
    _experts_out_fp8[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(weight.view(-1, num_features), [tiles.block_n, tiles.block_k]),
        *(x_scales, scales, out, rows, ends),
        *(num_columns, num_features),
        *(num_experts, triton.next_power_of_2(num_experts)),
        *(tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m, tiles.store_n, tiles.is_flat),
        _is_blocked(scales),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )


def _is_blocked(scales: Tensor) -> bool:
    """Whether blocks have a scale each, [E, blocks of rows, blocks of columns], and not rows, [E, rows]."""
    return scales.dim() > 2


def _check(x: Tensor, weight: Tensor, scales: Tensor, out: Tensor, tiles: GemmTiles, width: int) -> None:
    """Refuse what TMA cannot load, and tiles whose columns, `width` of a matrix, have scales of several blocks."""
    check_operands(x, weight.flatten(0, 1), out)
    height, depth = FP8_BLOCK
    if _is_blocked(scales) and (height % width or tiles.block_k != depth or out.shape[1] % height):
        raise ValueError(
            f"tiles of {width} x {tiles.block_k} of a matrix with {out.shape[1]} rows do not fit blocks of "
            f"{FP8_BLOCK} with a scale"
        )


@triton.jit(do_not_specialize_on_alignment=["x_scales", "rows", "ends"])
def _experts_in_fp8(
    x: tl.tensor,
    weight: tl.tensor_descriptor,
    x_scales: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    ends: tl.tensor,
    rows_per_token: int,
    num_columns: int,
    num_features: int,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_N: tl.constexpr,
    IS_FLAT: tl.constexpr,
    HAS_WHOLE_STEPS: tl.constexpr,
    IS_BLOCKED: tl.constexpr,
) -> None:
    """BLOCK_N counts columns of the output; weight is [2 E, I, H], gate and up of each expert in turn."""
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    num_steps = tl.cdiv(num_features, BLOCK_K)
    tile_ends = _tile_ends(ends, tiles_n, NUM_EXPERTS, EXPERTS, BLOCK_M)
    features = tl.arange(0, BLOCK_K)
    # Gates, then ups: whose matrix each column of the sums belongs to, and which column of the output.
    both = tl.arange(0, 2 * BLOCK_N)
    is_up = both // BLOCK_N
    num_tiles = tl.max(tile_ends)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_FLAT):
        expert, first, stop, column = _found(tile, num_tiles, tile_ends, ends, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        places = first + tl.arange(0, BLOCK_M)
        is_own = places < stop
        token = tl.load(rows + places, mask=is_own, other=0) // rows_per_token
        source = x + token.to(tl.int64)[:, None] * num_features + features[None, :]
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for step in range(num_steps):
            feature = step * BLOCK_K
            if HAS_WHOLE_STEPS:
                cells = tl.load(source + feature)
            else:
                cells = tl.load(source + feature, mask=(feature + features < num_features)[None, :], other=0.0)
            factors = weight.load([2 * expert, column, feature]).reshape(2 * BLOCK_N, BLOCK_K)
            if IS_BLOCKED:
                blocks = num_columns // 128
                place = (2 * expert * blocks + column // 128) * num_steps + step
                gate, up = tl.load(scales + place), tl.load(scales + place + blocks * num_steps)
                acc += tl.dot(cells, factors.T) * tl.where(is_up == 0, gate, up)[None, :]
            else:
                acc = tl.dot(cells, factors.T, acc)
        acc *= tl.load(x_scales + token)[:, None]
        if not IS_BLOCKED:
            own = column + both % BLOCK_N
            of_columns = scales + (2 * expert + is_up) * num_columns + own
            acc *= tl.load(of_columns, mask=own < num_columns, other=0.0)[None, :]
        activated = _activated(acc, out.dtype.element_ty, BLOCK_M, BLOCK_N)
        _write_rows(out, places, is_own, column, num_columns, activated, BLOCK_M, BLOCK_N, STORE_N)


@triton.jit(do_not_specialize_on_alignment=["x_scales", "rows", "ends"])
def _experts_out_fp8(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    x_scales: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    ends: tl.tensor,
    num_columns: int,
    num_features: int,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_N: tl.constexpr,
    IS_FLAT: tl.constexpr,
    IS_BLOCKED: tl.constexpr,
) -> None:
    """Weight is [E x H, I]. Columns of a tile that are the next expert's are not written."""
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    num_steps = tl.cdiv(num_features, BLOCK_K)
    tile_ends = _tile_ends(ends, tiles_n, NUM_EXPERTS, EXPERTS, BLOCK_M)
    num_tiles = tl.max(tile_ends)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_FLAT):
        expert, first, stop, column = _found(tile, num_tiles, tile_ends, ends, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(num_steps):
            feature = step * BLOCK_K
            factors = weight.load([expert * num_columns + column, feature])
            if IS_BLOCKED:
                scale = tl.load(scales + (expert * (num_columns // 128) + column // 128) * num_steps + step)
                acc += tl.dot(x.load([first, feature]), factors.T) * scale
            else:
                acc = tl.dot(x.load([first, feature]), factors.T, acc)
        places = first + tl.arange(0, BLOCK_M)
        is_own = places < stop
        row = tl.load(rows + places, mask=is_own, other=0)
        acc *= tl.load(x_scales + places, mask=is_own, other=0.0)[:, None]
        if IS_BLOCKED:
            _write_rows(out, row, is_own, column, num_columns, acc, BLOCK_M, BLOCK_N, STORE_N)
        else:
            of_expert = scales + expert * num_columns
            _write_scaled(out, of_expert, row, is_own, column, num_columns, acc, BLOCK_M, BLOCK_N, STORE_N)


@triton.jit
def _write_scaled(
    out: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    is_own: tl.tensor,
    column: tl.tensor,
    num_columns: int,
    cells: tl.tensor,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    STORE_N: tl.constexpr,
) -> None:
    """As `_write_rows`, times a scale for each column: of a part at a time, as scales of all take many registers."""
    if WIDTH > STORE_N:
        left, right = _halves(cells, BLOCK_M, WIDTH // 2)
        _write_scaled(out, scales, row, is_own, column, num_columns, left, BLOCK_M, WIDTH // 2, STORE_N)
        _write_scaled(out, scales, row, is_own, column + WIDTH // 2, num_columns, right, BLOCK_M, WIDTH // 2, STORE_N)
    else:
        columns = column + tl.arange(0, WIDTH)
        scaled = cells * tl.load(scales + columns, mask=columns < num_columns, other=0.0)[None, :]
        _write_rows(out, row, is_own, column, num_columns, scaled, BLOCK_M, WIDTH, STORE_N)


EXPERT_FP8_PRODUCT_KERNELS: dict[OpKind, Kernel] = {
    OpKind.EXPERTS_IN_FP8: experts_in_fp8,
    OpKind.EXPERTS_OUT_FP8: experts_out_fp8,
}
