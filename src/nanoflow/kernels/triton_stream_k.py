"""Products in Triton that keep any number of programs busy to the end, on cards with a tensor memory accelerator.

Whole tiles leave programs idle in the last round unless their number is a multiple of that of the programs. Here all
programs first share some tiles evenly, feature by feature, and then take whole ones (the hybrid of Stream-K, Osama et
al., 2023, https://arxiv.org/abs/2301.03598). Which features of which tile a program takes follows from its number; it
works from the last backwards: first on a tile that it does not end, whose sum so far it leaves in the workspace, and
last on the tile that others began, whose sums it takes over. So a program waits for programs of smaller numbers only,
and those leave their sums before they wait themselves: nothing can lock up, and the order of every sum is fixed.

Of `reference.linear` and `reference.linear_add` these are twins; the latter adds in float32 and rounds once.

Shape legend: T tokens, K features in, N features out, P programs, C cells of the largest tile.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.kernels.launch import Launch
from nanoflow.kernels.triton_gemm import GemmTiles, _check, _halves, _place, _store

# Whole tiles stay whole if their last round keeps this part of the programs busy.
_BUSY_ENOUGH = 0.9
# Writing or reading a sum takes a program about as long as so many more features of its tile (one H200, 84 to 116 SMs).
_MOVED_SUM_FEATURES = 768


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamKWorkspace:
    """Where programs leave sums for others; products that may run at the same time need one each.

    Attributes:
        sums: float32 [P, C].
        flags: int32 [P], 0 but while a sum waits to be taken over, so one workspace serves any number of calls and of
            replays of CUDA graphs.
    """

    sums: Tensor
    flags: Tensor


def make_workspace(candidates: Sequence[GemmTiles], num_programs: int, device: torch.device) -> StreamKWorkspace:
    """A workspace for so many programs and any of these cuts.

    Raises:
        RuntimeError: A CUDA graph is being captured; the flags would be 0 in its replays only.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("no workspace can be made while a CUDA graph is captured: run the product once before")
    cells = max(tiles.block_m * tiles.block_n for tiles in candidates)
    return StreamKWorkspace(
        sums=torch.empty((num_programs, cells), dtype=torch.float32, device=device),
        flags=torch.zeros(num_programs, dtype=torch.int32, device=device),
    )


def num_shared_tiles(num_tiles: int, num_programs: int) -> int:
    """Tiles that all programs share, so that the others make whole rounds.

    Those that are left of whole rounds, and with them a round: each program then has a whole tile's work or more, so a
    tile has two programs at most, and the first of them leaves its sum before the other begins. With fewer tiles than
    programs there is no such round, and none is shared.
    """
    rest = num_tiles % num_programs
    return rest + num_programs if rest and num_tiles > num_programs else 0


def choose_stream_k_cut(
    candidates: Sequence[GemmTiles], shape: tuple[int, int, int], num_programs: int, limit_bytes: int
) -> tuple[GemmTiles, bool]:
    """The cut by which the busiest program is done first, and whether programs share tiles.

    Ties go to whole tiles, then to the earlier candidate.

    Args:
        candidates: Cuts, fastest first; the last fits everywhere.
        shape: T, N and K.
        num_programs: Programs that share the work.
        limit_bytes: Shared memory of a program.
    """

    def longest_time(tiles: GemmTiles, is_shared: bool) -> float:
        num_tiles, num_features = _num_tiles(tiles, *shape[:2]), shape[2]
        features: float = triton.cdiv(num_tiles, num_programs) * num_features
        if is_shared:
            # One is left, one taken over.
            features = num_tiles / num_programs * num_features + 2 * _MOVED_SUM_FEATURES
        return features * tiles.block_m * tiles.block_n / tiles.relative_speed

    def can_share(tiles: GemmTiles) -> bool:
        rounds, rest = divmod(_num_tiles(tiles, *shape[:2]), num_programs)
        return rounds > 0 and 0 < rest < _BUSY_ENOUGH * num_programs

    fitting = [tiles for tiles in candidates if tiles.shared_memory_bytes(is_gated=False) <= limit_bytes]
    fitting = fitting or list(candidates[-1:])
    shared = [(tiles, True) for tiles in fitting if can_share(tiles)]
    return min([*((tiles, False) for tiles in fitting), *shared], key=lambda cut: longest_time(*cut))


def run_linear_stream_k(
    launch: Launch, tiles: GemmTiles, num_programs: int, workspace: StreamKWorkspace, *, is_shared: bool = True
) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T (+ bias [N]), cut in a given way, by so many programs.

    Raises:
        ValueError: Tensors that TMA does not take, see `triton_gemm.run_linear`, or a workspace that is too small.
    """
    _run(launch, tiles, num_programs, workspace, is_shared=is_shared, is_added=False)


def run_linear_add_stream_k(
    launch: Launch, tiles: GemmTiles, num_programs: int, workspace: StreamKWorkspace, *, is_shared: bool = True
) -> None:
    """hidden [T, N] += x [T, K] @ weight [N, K]^T (+ bias [N]), cut in a given way, by so many programs.

    Raises:
        ValueError: See `run_linear_stream_k`.
    """
    # In halves, as a sum and what it is added to do not fit into shared memory and registers as a whole.
    _run(launch, replace(tiles, num_stores=2), num_programs, workspace, is_shared=is_shared, is_added=True)


def _run(
    launch: Launch, tiles: GemmTiles, num_programs: int, workspace: StreamKWorkspace, is_shared: bool, is_added: bool
) -> None:
    x, (out,), (weight, *biases) = launch.reads[0], launch.writes, launch.weights
    _check(x, weight, out)
    slots, cells = workspace.sums.shape
    if slots < num_programs or cells < tiles.block_m * tiles.block_n:
        raise ValueError(
            f"a workspace of {slots} x {cells} cells is too small for {num_programs} programs with tiles of "
            f"{tiles.block_m} x {tiles.block_n}: make one for these"
        )
    num_shared = num_shared_tiles(_num_tiles(tiles, *out.shape), num_programs) if is_shared else 0
    _linear_stream_k[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(weight, [tiles.block_n, tiles.block_k]),
        biases[0] if biases else None,
        TensorDescriptor.from_tensor(out, [tiles.block_m, tiles.block_n // tiles.num_stores]),
        *(workspace.sums, workspace.flags),
        *(*out.shape, x.shape[1], num_shared),
        *(tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m, tiles.num_stores),
        *(tiles.num_warps * 32, is_added),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _num_tiles(tiles: GemmTiles, num_rows: int, num_columns: int) -> int:
    return int(triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_columns, tiles.block_n))


@triton.jit(do_not_specialize=["num_rows", "num_shared"])
def _linear_stream_k(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    bias: tl.tensor | None,
    out: tl.tensor_descriptor,
    sums: tl.tensor,
    flags: tl.tensor,
    num_rows: int,
    num_columns: int,
    num_features: int,
    num_shared: int,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_STORES: tl.constexpr,
    NUM_THREADS: tl.constexpr,
    IS_ADDED: tl.constexpr,
) -> None:
    """One loop over all steps of all tiles of a program, so that loads of the next tile begin before one is written."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    num_steps = tl.cdiv(num_features, BLOCK_K)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    # Of the steps of all shared tiles, in one row, those of this program.
    shared_steps = num_shared * num_steps
    first = program * shared_steps // num_programs
    stop = (program + 1) * shared_steps // num_programs
    num_parts = tl.where(first < stop, (stop - 1) // num_steps - first // num_steps + 1, 0)
    num_whole = tl.cdiv(tiles_m * tiles_n - num_shared - program, num_programs)

    turn, step, begin, end, tile, tile_m, tile_n = -1, -1, 0, 0, 0, 0, 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(stop - first + num_whole * num_steps):
        step += 1
        if step == end:
            turn += 1
            tile, begin, end = _turn(turn, num_parts, first, stop, num_steps, num_shared)
            tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
            step = begin
        row, column, feature = tile_m * BLOCK_M, tile_n * BLOCK_N, step * BLOCK_K
        acc = tl.dot(x.load([row, feature]), weight.load([column, feature]).T, acc)
        if step == end - 1:
            if end < num_steps:
                _leave(sums, flags, program, acc, BLOCK_M, BLOCK_N, NUM_THREADS)
            else:
                _finish(out, bias, row, column, num_columns, acc, BLOCK_M, BLOCK_N, NUM_STORES, IS_ADDED)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            # The last part was begun by the program before; to go on from its sum takes no more registers.
            if (turn == num_parts - 2) & (first % num_steps > 0):
                acc = _take_over(sums, flags, program - 1, BLOCK_M, BLOCK_N, NUM_THREADS)


@triton.jit
def _turn(
    turn: tl.tensor, num_parts: tl.tensor, first: tl.tensor, stop: tl.tensor, num_steps: tl.tensor, num_shared: int
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A tile of this program, and from which step to which: parts of shared tiles from the last on, then whole ones."""
    is_part = turn < num_parts
    whole = num_shared + (turn - num_parts) * tl.num_programs(0) + tl.program_id(0)
    tile = tl.where(is_part, (stop - 1) // num_steps - turn, whole)
    begin = tl.where(is_part, tl.maximum(first - tile * num_steps, 0), 0)
    end = tl.where(is_part, tl.minimum(stop - tile * num_steps, num_steps), num_steps)
    return tile, begin, end


@triton.jit
def _leave(
    sums: tl.tensor,
    flags: tl.tensor,
    program: tl.tensor,
    acc: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_THREADS: tl.constexpr,
) -> None:
    """Leave a sum to a later program; each thread releases what it wrote, as barriers keep loops from loading ahead."""
    places = sums + program * (BLOCK_M * BLOCK_N) + _order(BLOCK_M, BLOCK_N)
    cells = tl.reshape(acc, (BLOCK_M // 16, 2, 8, BLOCK_N // 16, 2, 4, 2))
    cells = tl.reshape(tl.permute(cells, (3, 1, 0, 2, 5, 4, 6)), (BLOCK_N // 8, 8 * BLOCK_M))
    tl.store(places, cells, cache_modifier=".cg")
    tl.atomic_add(flags + program + tl.zeros([NUM_THREADS], tl.int32), 1, sem="release", scope="gpu")


@triton.jit
def _take_over(
    sums: tl.tensor,
    flags: tl.tensor,
    program: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_THREADS: tl.constexpr,
) -> tl.tensor:
    """The sum that an earlier program leaves, once it is there."""
    while tl.atomic_cas(flags + program, NUM_THREADS, 0, sem="acquire", scope="gpu") != NUM_THREADS:
        pass
    cells = tl.load(sums + program * (BLOCK_M * BLOCK_N) + _order(BLOCK_M, BLOCK_N), cache_modifier=".cg")
    cells = tl.reshape(cells, (BLOCK_N // 16, 2, BLOCK_M // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(cells, (2, 1, 3, 0, 5, 4, 6)), (BLOCK_M, BLOCK_N))


@triton.jit
def _order(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Places of a tile's cells, as threads hold them after a product: 16 bytes a thread, and nothing moves between."""
    return tl.arange(0, BLOCK_N // 8)[:, None] * (8 * BLOCK_M) + tl.arange(0, 8 * BLOCK_M)[None, :]


@triton.jit
def _finish(
    out: tl.tensor_descriptor,
    bias: tl.tensor | None,
    row: tl.tensor,
    column: tl.tensor,
    num_columns: int,
    acc: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STORES: tl.constexpr,
    IS_ADDED: tl.constexpr,
) -> None:
    """Add the bias and, if asked for, what is there, half after half; round once."""
    if bias is not None:
        columns = column + tl.arange(0, BLOCK_N)
        acc += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    if IS_ADDED:
        left, right = _halves(acc, BLOCK_M, BLOCK_N // 2)
        out.store([row, column], (left + out.load([row, column]).to(tl.float32)).to(out.dtype))
        column += BLOCK_N // 2
        out.store([row, column], (right + out.load([row, column]).to(tl.float32)).to(out.dtype))
    else:
        _store(out, row, column, acc.to(out.dtype), BLOCK_M, BLOCK_N, NUM_STORES)
