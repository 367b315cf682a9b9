"""Grouped products of a mixture of experts in Triton, for cards with a tensor memory accelerator (TMA), 16-bit dtypes.

Each is one persistent launch for all experts: a given number of programs share the tiles of all of them. A program
finds its tiles from where the experts' rows end, which it reads on the device. So the host knows nothing of the
routing, a CUDA graph serves any routing of its number of tokens, and weights of an expert without rows are not read.
Weights are loaded by TMA; an expert's rows begin anywhere, so rows of a tile that are another expert's are computed
from whatever is there, and not written. Row-wise operations of experts are in `triton_experts_rows.py`, sizes of tiles
in `expert_tiles.py`, biases and activations in `triton_expert_sums.py`. The references are the functions of these names
in `reference_experts.py`, with the same rounding.

Shape legend: T tokens, E experts, K experts of a token, H width of the model, I width of an expert; T x K rows, sorted
by expert.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.kernels.expert_tiles import WHOLE_CARD, ExpertTiles, choose_expert_tiles
from nanoflow.kernels.gemm_tiles import GemmTiles
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.triton_attention import card_of
from nanoflow.kernels.triton_expert_sums import activated, alpha_and_limit, bias_of, clamped_of
from nanoflow.kernels.triton_gemm import _halves, _place, check_operands


def experts_in(launch: Launch) -> None:
    """activation [T, K x I], seen as [T x K, I] in the experts' order: silu(gate) * up of x [T, H] of each row's token.

    The weight is [E, 2 I, H], a bias [E, 2 I]; each expert has gate rows, then up rows. The activation may be clamped.

    Raises:
        ValueError: See `run_experts_in`.
    """
    experts_in_on(launch, WHOLE_CARD, card_of(launch.reads[0].device).num_sms)


def experts_out(launch: Launch) -> None:
    """out [T, K x H], seen as [T x K, H] in the tokens' order: activation of each row @ weight [E, H, I]^T.

    A bias is [E, H].

    Raises:
        ValueError: See `run_experts_out`.
    """
    experts_out_on(launch, WHOLE_CARD, card_of(launch.reads[0].device).num_sms)


def experts_in_on(launch: Launch, candidates: tuple[ExpertTiles, ...], num_programs: int) -> None:
    """`experts_in` on so many multiprocessors, with tiles from these candidates."""
    run_experts_in(launch, _chosen(launch, candidates).first, num_programs)


def experts_out_on(launch: Launch, candidates: tuple[ExpertTiles, ...], num_programs: int) -> None:
    """`experts_out` on so many multiprocessors, with tiles from these candidates."""
    run_experts_out(launch, _chosen(launch, candidates).second, num_programs)


def _chosen(launch: Launch, candidates: tuple[ExpertTiles, ...]) -> ExpertTiles:
    """By the rows that an expert has on average."""
    limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
    return choose_expert_tiles(candidates, launch.reads[1].numel() / len(launch.weights[0]), limit_bytes)


def run_experts_in(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """`experts_in` with given tiles and number of programs.

    Raises:
        ValueError: The dtype does not have 16 bits, or rows are not aligned to 16 bytes (H and I must be multiples of
        8).
    """
    (x, rows, ends), (activation,), (weight, *biases) = launch.reads, launch.writes, launch.weights
    num_experts, doubled, num_features = weight.shape
    out = activation.view(rows.numel(), -1)
    matrices = _checked(x, weight, out).view(2 * num_experts, doubled // 2, num_features)
    half = tiles.block_n // 2
    _experts_in[(num_programs,)](
        # One TMA box loads the same rows of an expert's gate and up, which are then adjacent in shared memory.
        *(x, TensorDescriptor.from_tensor(matrices, [2, half, tiles.block_k]), biases[0] if biases else None),
        *(out, rows, ends),
        *(rows.shape[1], doubled // 2, num_features),
        *(num_experts, triton.next_power_of_2(num_experts)),
        *(tiles.block_m, half, tiles.block_k, tiles.group_m, tiles.store_n // 2, tiles.is_flat),
        num_features % tiles.block_k == 0,
        *alpha_and_limit(clamped_of(launch)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )


def run_experts_out(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    """`experts_out` with given tiles and number of programs.

    Raises:
        ValueError: As `run_experts_in`.
    """
    (activation, rows, ends), (by_token,), (weight, *biases) = launch.reads, launch.writes, launch.weights
    num_experts, num_columns, num_features = weight.shape
    x, out = activation.view(rows.numel(), -1), by_token.view(rows.numel(), -1)
    matrices = _checked(x, weight, out).view(num_experts * num_columns, num_features)
    _experts_out[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(matrices, [tiles.block_n, tiles.block_k]),
        *(biases[0] if biases else None, out, rows, ends),
        *(num_columns, num_features),
        *(num_experts, triton.next_power_of_2(num_experts)),
        *(tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m, tiles.store_n, tiles.is_flat),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )


def _checked(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """The weight, if TMA can load it and rows are aligned."""
    check_operands(x, weight.flatten(0, 1), out)
    return weight


@triton.jit
def _experts_in(
    x: tl.tensor,
    weight: tl.tensor_descriptor,
    bias: tl.tensor | None,
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
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    """BLOCK_N counts columns of the output; weight is [2 E, I, H], gate and up of each expert in turn."""
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    tile_ends = _tile_ends(ends, tiles_n, NUM_EXPERTS, EXPERTS, BLOCK_M)
    features = tl.arange(0, BLOCK_K)
    num_tiles = tl.max(tile_ends)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_FLAT):
        expert, first, stop, column = _found(tile, num_tiles, tile_ends, ends, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        places = first + tl.arange(0, BLOCK_M)
        is_own = places < stop
        token = tl.load(rows + places, mask=is_own, other=0) // rows_per_token
        source = x + token.to(tl.int64)[:, None] * num_features + features[None, :]
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for feature in range(0, num_features, BLOCK_K):
            if HAS_WHOLE_STEPS:
                cells = tl.load(source + feature)
            else:
                cells = tl.load(source + feature, mask=(feature + features < num_features)[None, :], other=0.0)
            factors = weight.load([2 * expert, column, feature]).reshape(2 * BLOCK_N, BLOCK_K)
            acc = tl.dot(cells, factors.T, acc)
        gate, up = _halves(acc, BLOCK_M, BLOCK_N)
        of_expert = 2 * expert * num_columns
        _write_activated(
            out, bias, of_expert, places, is_own, column, num_columns, gate, up, BLOCK_M, BLOCK_N, STORE_N, ALPHA, LIMIT
        )


@triton.jit
def _experts_out(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    bias: tl.tensor | None,
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
) -> None:
    """Weight is [E x H, I]. Columns of a tile that are the next expert's are not written."""
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    tile_ends = _tile_ends(ends, tiles_n, NUM_EXPERTS, EXPERTS, BLOCK_M)
    num_tiles = tl.max(tile_ends)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_FLAT):
        expert, first, stop, column = _found(tile, num_tiles, tile_ends, ends, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for feature in range(0, num_features, BLOCK_K):
            factors = weight.load([expert * num_columns + column, feature])
            acc = tl.dot(x.load([first, feature]), factors.T, acc)
        places = first + tl.arange(0, BLOCK_M)
        is_own = places < stop
        row = tl.load(rows + places, mask=is_own, other=0)
        if bias is not None:
            acc += bias_of(bias, expert * num_columns, column + tl.arange(0, BLOCK_N), num_columns)[None, :]
        _write_rows(out, row, is_own, column, num_columns, acc, BLOCK_M, BLOCK_N, STORE_N)


@triton.jit
def _tile_ends(
    ends: tl.tensor, tiles_n: tl.tensor, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr
) -> tl.tensor:
    """Number of tiles of each expert and of those before it, [EXPERTS]; beyond NUM_EXPERTS there are no more."""
    expert = tl.minimum(tl.arange(0, EXPERTS), NUM_EXPERTS)
    stop = tl.load(ends + tl.minimum(expert, NUM_EXPERTS - 1))
    start = tl.where(expert > 0, tl.load(ends + tl.maximum(expert - 1, 0)), 0)
    return tl.cumsum(tl.cdiv(stop - start, BLOCK_M) * tiles_n, 0)


@triton.jit
def _found(
    tile: tl.tensor,
    num_tiles: tl.tensor,
    tile_ends: tl.tensor,
    ends: tl.tensor,
    tiles_n: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The expert of a tile, its first row, the end of the expert's rows, and its first column.

    Loads for later steps are begun in advance, also behind the last tile; then this is the last tile again.
    """
    tile = tl.minimum(tile, num_tiles - 1)
    is_before = tile_ends <= tile
    expert = tl.sum(is_before.to(tl.int32))
    num_before = tl.max(tl.where(is_before, tile_ends, 0))
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    tile_m, tile_n = _place(tile - num_before, tl.cdiv(stop - start, BLOCK_M), tiles_n, GROUP_M)
    return expert, start + tile_m * BLOCK_M, stop, tile_n * BLOCK_N


@triton.jit
def _write_activated(
    out: tl.tensor,
    bias: tl.tensor | None,
    of_expert: tl.tensor,
    row: tl.tensor,
    is_own: tl.tensor,
    column: tl.tensor,
    num_columns: int,
    gate: tl.tensor,
    up: tl.tensor,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    STORE_N: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    """Write the activation, as `_write_rows` does. Biases of the expert's gates begin at `of_expert`, then up's."""
    if WIDTH > STORE_N:
        HALF: tl.constexpr = WIDTH // 2
        gate, other_gate = _halves(gate, BLOCK_M, HALF)
        up, other_up = _halves(up, BLOCK_M, HALF)
        _write_activated(
            out, bias, of_expert, row, is_own, column, num_columns, gate, up, BLOCK_M, HALF, STORE_N, ALPHA, LIMIT
        )
        column += HALF
        gate, up = other_gate, other_up
        _write_activated(
            out, bias, of_expert, row, is_own, column, num_columns, gate, up, BLOCK_M, HALF, STORE_N, ALPHA, LIMIT
        )
    else:
        if bias is not None:
            columns = column + tl.arange(0, WIDTH)
            gate += bias_of(bias, of_expert, columns, num_columns)[None, :]
            up += bias_of(bias, of_expert + num_columns, columns, num_columns)[None, :]
        cells = activated(gate, up, out.dtype.element_ty, ALPHA, LIMIT)
        _write_rows(out, row, is_own, column, num_columns, cells, BLOCK_M, WIDTH, STORE_N)


@triton.jit
def _write_rows(
    out: tl.tensor,
    row: tl.tensor,
    is_own: tl.tensor,
    column: tl.tensor,
    num_columns: int,
    cells: tl.tensor,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    STORE_N: tl.constexpr,
) -> None:
    """Write the rows that are the expert's own, each to its place. Halves until a part is at most STORE_N wide."""
    if WIDTH > STORE_N:
        left, right = _halves(cells, BLOCK_M, WIDTH // 2)
        _write_rows(out, row, is_own, column, num_columns, left, BLOCK_M, WIDTH // 2, STORE_N)
        _write_rows(out, row, is_own, column + WIDTH // 2, num_columns, right, BLOCK_M, WIDTH // 2, STORE_N)
    else:
        columns = column + tl.arange(0, WIDTH)
        target = out + row.to(tl.int64)[:, None] * num_columns + columns[None, :]
        mask = is_own[:, None] & (columns < num_columns)[None, :]
        tl.store(target, cells.to(out.dtype.element_ty), mask=mask)
