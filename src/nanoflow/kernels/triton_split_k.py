"""Products in Triton that keep any number of programs busy to the end, on cards with a tensor memory accelerator.

With whole tiles, programs idle in the last round unless their number divides the number of tiles. Here each tile of the
last round is split along its features among several programs. All but the last of these write partial sums to the
workspace, and the last one adds them up. All programs begin a round at the same feature, or at one of a few, so that
data loaded by one is in L2 for the others. In Stream-K (Osama et al., 2023, https://arxiv.org/abs/2301.03598) programs
begin at different features and load most of both factors from memory for each tile. That takes bandwidth which
attention beside the product needs. A program waits only for programs with smaller numbers, which wait for none, so
there is no deadlock, and the order of every sum is fixed.

The references are `reference.linear` and `reference.linear_add`; the latter adds in float32 and rounds once here.
Products in FP8 (`triton_fp8.py`) multiply the whole sum by its scales.

Shape legend: T tokens, K features in, N features out, P programs, C elements of the largest tile.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.kernels.gemm_tiles import GemmTiles, with_addend
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.triton_gemm import _ITEM_BYTES, _place, _scaled, _write, check_operands

# Splitting costs its programs about as much time as this many features of 16 bits (one H200, 100 SMs: 320 to 750).
_MOVED_SUM_FEATURES = 480


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitWorkspace:
    """Memory for partial sums; products that may run at the same time need one each.

    Attributes:
        sums: float32 [P, C].
        flags: int32 [P], 0 except while a sum waits to be read. So one workspace serves any number of launches and of
            replays of CUDA graphs.
    """

    sums: Tensor
    flags: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What a product reads and writes.

    Attributes:
        x: [T, K].
        weight: [N, K].
        out: [T, N].
        bias: [N] or None.
        x_scales, scales: float32 [T, 1] and [N], of rows of x and of the weight in FP8; None for 16 bits.
    """

    x: Tensor
    weight: Tensor
    out: Tensor
    bias: Tensor | None = None
    x_scales: Tensor | None = None
    scales: Tensor | None = None


def make_workspace(candidates: Sequence[GemmTiles], num_programs: int, device: torch.device) -> SplitWorkspace:
    """A workspace for `num_programs` programs and any of these tilings.

    Raises:
        RuntimeError: A CUDA graph is being captured; the flags would only be zeroed in its replays.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("no workspace can be made while a CUDA graph is captured: run the product once before")
    cells = max(tiles.block_m * tiles.block_n for tiles in candidates)
    return SplitWorkspace(
        sums=torch.empty((num_programs, cells), dtype=torch.float32, device=device),
        flags=torch.zeros(num_programs, dtype=torch.int32, device=device),
    )


def choose_split_cut(
    candidates: Sequence[GemmTiles], shape: tuple[int, int, int], num_programs: int, limit_bytes: int
) -> tuple[GemmTiles, int]:
    """The tiling with the least time of the busiest program, and how many programs share a tile of the last round.

    Ties go to fewer splits, then to the earlier candidate.

    Args:
        candidates: Tilings, fastest first; the last fits every device.
        shape: T, N and K.
        num_programs: Programs that share the work.
        limit_bytes: Shared memory available to a program.
    """

    def longest_time(tiles: GemmTiles, num_splits: int) -> float:
        rounds, rest = divmod(tiles.num_tiles(*shape[:2]), num_programs)
        features = (rounds * shape[2] + (shape[2] / num_splits if rest else 0)) * tiles.item_bytes / _ITEM_BYTES
        features += _MOVED_SUM_FEATURES * num_splits if num_splits > 1 else 0
        return features * tiles.block_m * tiles.block_n / tiles.relative_speed

    fitting = [tiles for tiles in candidates if tiles.shared_memory_bytes(is_gated=False) <= limit_bytes]
    cuts = [
        (tiles, num_splits)
        for tiles in fitting or candidates[-1:]
        for num_splits in range(1, max_splits(tiles.num_tiles(*shape[:2]), shape[2], num_programs, tiles) + 1)
    ]
    return min(cuts, key=lambda cut: (longest_time(*cut), cut[1]))


def max_splits(num_tiles: int, num_features: int, num_programs: int, tiles: GemmTiles) -> int:
    """Most programs that can share a tile of the last round, such that each has at least one step; 1 is no split."""
    rest = num_tiles % num_programs
    return max(min(num_programs // rest, triton.cdiv(num_features, tiles.block_k)), 1) if rest else 1


def run_linear_split_k(
    launch: Launch, tiles: GemmTiles, num_programs: int, workspace: SplitWorkspace, num_splits: int
) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T (+ bias [N]), with given tiles and number of programs.

    Raises:
        ValueError: The tensors do not suit TMA (see `triton_gemm.run_linear`), the workspace is too small, or the
            number of splits is not from 2 to `max_splits`.
    """
    _run(launch, tiles, num_programs, workspace, num_splits, is_added=False)


def run_linear_add_split_k(
    launch: Launch, tiles: GemmTiles, num_programs: int, workspace: SplitWorkspace, num_splits: int
) -> None:
    """hidden [T, N] += x [T, K] @ weight [N, K]^T (+ bias [N]), with given tiles and number of programs.

    Raises:
        ValueError: As `run_linear_split_k`.
    """
    _run(launch, with_addend(tiles), num_programs, workspace, num_splits, is_added=True)


def _run(
    launch: Launch, tiles: GemmTiles, num_programs: int, workspace: SplitWorkspace, num_splits: int, is_added: bool
) -> None:
    x, (out,), (weight, *biases) = launch.reads[0], launch.writes, launch.weights
    check_operands(x, weight, out)
    factors = Factors(x=x, weight=weight, out=out, bias=biases[0] if biases else None)
    run_split(factors, tiles, num_programs, workspace, num_splits, is_added=is_added)


def run_split(
    factors: Factors, tiles: GemmTiles, num_programs: int, workspace: SplitWorkspace, num_splits: int, *, is_added: bool
) -> None:
    """A product of tensors that suit TMA, added to the output if `is_added`; then writes are in smaller parts.

    Raises:
        ValueError: As `run_linear_split_k`.
    """
    x, weight, out = factors.x, factors.weight, factors.out
    slots, cells = workspace.sums.shape
    if slots < num_programs or cells < tiles.block_m * tiles.block_n:
        raise ValueError(
            f"a workspace of {slots} x {cells} cells is too small for {num_programs} programs with tiles of "
            f"{tiles.block_m} x {tiles.block_n}: make one for these"
        )
    most = max_splits(tiles.num_tiles(*out.shape), x.shape[1], num_programs, tiles)
    if not 2 <= num_splits <= most:
        raise ValueError(f"tiles of the last round can be split among 2 to {most} programs each, not {num_splits}")
    _linear_split_k[(num_programs,)](
        TensorDescriptor.from_tensor(x, [tiles.block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(weight, [tiles.block_n, tiles.block_k]),
        *(factors.bias, factors.x_scales, factors.scales),
        TensorDescriptor.from_tensor(out, [tiles.block_m, tiles.store_n]),
        *(workspace.sums, workspace.flags),
        *(*out.shape, x.shape[1], num_splits),
        *(tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m, tiles.store_n),
        *(tiles.num_warps * 32, is_added),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )


@triton.jit(do_not_specialize=["num_rows", "num_splits"], do_not_specialize_on_alignment=["x_scales"])
def _linear_split_k(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    bias: tl.tensor | None,
    x_scales: tl.tensor | None,
    scales: tl.tensor | None,
    out: tl.tensor_descriptor,
    sums: tl.tensor,
    flags: tl.tensor,
    num_rows: int,
    num_columns: int,
    num_features: int,
    num_splits: int,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_N: tl.constexpr,
    NUM_THREADS: tl.constexpr,
    IS_ADDED: tl.constexpr,
) -> None:
    """One loop over all steps of all tiles of a program, so that loads of the next tile begin before one is written."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    num_steps = tl.cdiv(num_features, BLOCK_K)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    num_rounds = tiles_m * tiles_n // num_programs
    rest = tiles_m * tiles_n - num_rounds * num_programs
    part, first, stop = _part(program, rest, num_steps, num_splits)

    turn, step, end, tile_m, tile_n = -1, -1, 0, 0, 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(num_rounds * num_steps + stop - first):
        step += 1
        if step == end:
            turn += 1
            is_last = turn == num_rounds
            tile = turn * num_programs + tl.where(is_last, program - part * rest, program)
            tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
            step = tl.where(is_last, first, 0)
            end = tl.where(is_last, stop, num_steps)
        row, column, feature = tile_m * BLOCK_M, tile_n * BLOCK_N, step * BLOCK_K
        acc = tl.dot(x.load([row, feature]), weight.load([column, feature]).T, acc)
        if step == end - 1:
            if end < num_steps:
                _leave(sums + program * (BLOCK_M * BLOCK_N), acc, BLOCK_M, BLOCK_N)
                # Each thread releases its own writes, because a barrier would keep the loop from loading ahead.
                tl.atomic_add(flags + program + tl.zeros([NUM_THREADS], tl.int32), 1, sem="release", scope="gpu")
            else:
                if turn == num_rounds:
                    for earlier in range(part):
                        other = program - (part - earlier) * rest
                        while tl.atomic_cas(flags + other, NUM_THREADS, 0, sem="acquire", scope="gpu") != NUM_THREADS:
                            pass
                        acc += _taken(sums + other * (BLOCK_M * BLOCK_N), BLOCK_M, BLOCK_N)
                acc = _scaled(acc, x_scales, scales, row, column, num_rows, num_columns, BLOCK_M, BLOCK_N)
                _write(out, bias, row, column, num_columns, acc, BLOCK_M, BLOCK_N, STORE_N, IS_ADDED)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def _part(
    program: tl.tensor, rest: tl.tensor, num_steps: tl.tensor, num_splits: int
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A program's part of a tile of the last round, of which there are `rest`: its number, first step, and end."""
    part = program // tl.maximum(rest, 1)
    has_part = program < rest * num_splits
    first = tl.where(has_part, part * num_steps // num_splits, 0)
    return part, first, tl.where(has_part, (part + 1) * num_steps // num_splits, 0)


@triton.jit
def _leave(places: tl.tensor, acc: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> None:
    """Write a partial sum for another program."""
    cells = tl.reshape(acc, (BLOCK_M // 16, 2, 8, BLOCK_N // 16, 2, 4, 2))
    cells = tl.reshape(tl.permute(cells, (3, 1, 0, 2, 5, 4, 6)), (BLOCK_N // 8, 8 * BLOCK_M))
    tl.store(places + _order(BLOCK_M, BLOCK_N), cells, cache_modifier=".cg")


@triton.jit
def _taken(places: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Read the partial sum of another program."""
    cells = tl.load(places + _order(BLOCK_M, BLOCK_N), cache_modifier=".cg")
    cells = tl.reshape(cells, (BLOCK_N // 16, 2, BLOCK_M // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(cells, (2, 1, 3, 0, 5, 4, 6)), (BLOCK_M, BLOCK_N))


@triton.jit
def _order(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Offsets of a tile's elements in the order in which threads hold them: 16 bytes per thread, no data movement."""
    return tl.arange(0, BLOCK_N // 8)[:, None] * (8 * BLOCK_M) + tl.arange(0, 8 * BLOCK_M)[None, :]
