"""Products of a Llama-3-8B layer on this GPU: ours against cuBLAS, and gate_up with SwiGLU in one kernel or in two.

A point is a CUDA graph that runs in turn on copies of weights and activations which together are several times larger
than the L2 cache. It is replayed for at least a second, so that the clock settles where the card's power limit allows.
Energy is from the card's counter over the same time. `--sweep` adds other tile sizes; the row of one that does not run
says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.document import write_document
from benchmarks.kernels.attention import elapsed_s
from benchmarks.kernels.elementwise import index_tensors
from nanoflow.cli.options import CommandParser
from nanoflow.device.energy import energy_of
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import LinearDims, Operation, OpKind, Resource
from nanoflow.kernels import reference
from nanoflow.kernels.gemm_tiles import GEMM_TILES, PART_TILES, GemmTiles, choose_gemm_tiles
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.triton_attention import card_of
from nanoflow.kernels.triton_gemm import linear_then_swiglu, run_linear, run_linear_swiglu

# [out features, in features]
SHAPES = {"qkv_proj": (6144, 4096), "o_proj": (4096, 4096), "gate_up": (28672, 4096), "down_proj": (4096, 14336)}
FUSED = "gate_up+swiglu"
LAYER = "four products"
MIN_DATA_BYTES = 256 << 20
WARM_UP_S, WINDOW_S = 0.2, 1.0
# Far above rounding errors, far below the error of a wrong tile.
MAX_ERROR = 1e-2
LARGE = GEMM_TILES[0]
SWEEP = (
    replace(LARGE, store_n=128),
    replace(LARGE, num_stages=4, store_n=128),
    replace(LARGE, is_flat=False),
    replace(LARGE, group_m=4),
    replace(LARGE, group_m=8),
    GEMM_TILES[1],
    replace(GEMM_TILES[1], num_warps=4),
    *PART_TILES[:2],
    replace(LARGE, block_m=64, num_warps=4, num_stages=4),
)
# The fused product writes half as many columns, so a fourth stage fits without storing its tile in parts.
FUSED_SWEEP = (replace(LARGE, num_stages=4), *SWEEP[1:])
Work = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to compute a product: its name in the table, its tile sizes if it has any, and its launch."""

    name: str
    tiles: GemmTiles | None
    kernel: Kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row: time and energy of one pass over the operation, or `error` if it did not run."""

    operation: str
    num_tokens: int
    kernel: str
    tiles: GemmTiles | None
    time_us: float | None = None
    energy_mj: float | None = None
    tflop_per_s: float | None = None
    speed_of_cublas: float | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.kernels.gemm needs an NVIDIA GPU", file=sys.stderr)
        return 1
    print(f"{'operation':<15}{'tokens':>7}  {'kernel':<38}{'us':>8}{'mJ':>8}{'TFLOP/s':>9}{'of cuBLAS':>11}")
    points: list[Point] = []
    for num_tokens in args.tokens:
        for operation in SHAPES:
            points += measure_all(operation, num_tokens, (cublas(), ours(None)))
        points += measure_all(FUSED, num_tokens, (in_two_kernels(), fused(None)))
        if args.sweep and num_tokens == args.tokens[0]:
            points += measure_all(LAYER, num_tokens, (cublas(), *(ours(tiles) for tiles in (LARGE, *SWEEP))))
            points += measure_all(FUSED, num_tokens, (in_two_kernels(), *map(fused, (LARGE, *FUSED_SWEEP))))
    if args.json is not None:
        write_document(
            args.json,
            "kernels_gemm",
            shape="Llama-3-8B, bfloat16",
            window_s=WINDOW_S,
            points=[dataclasses.asdict(point) for point in points],
        )
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.kernels.gemm", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="sizes of the dense batch")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--sweep", action="store_true", help="also measure other cuts, at the first of --tokens")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1:
        parser.error("--tokens must be at least 1")
    return args


def cublas() -> Candidate:
    return Candidate(name="cuBLAS", tiles=None, kernel=reference.linear)


def ours(tiles: GemmTiles | None) -> Candidate:
    """`linear` with one program an SM, with its own tile sizes or given ones."""

    def kernel(launch: Launch) -> None:
        num_programs = card_of(launch.reads[0].device).num_sms
        run_linear(launch, tiles or own_tiles(launch), num_programs)

    return Candidate(name="ours" if tiles is None else describe(tiles), tiles=tiles, kernel=kernel)


def own_tiles(launch: Launch) -> GemmTiles:
    card = card_of(launch.reads[0].device)
    shape = (len(launch.reads[0]), len(launch.weights[0]))
    return choose_gemm_tiles(GEMM_TILES, *shape, card.num_sms, card.shared_memory_bytes)


def in_two_kernels() -> Candidate:
    return Candidate(name="cuBLAS, then swiglu", tiles=None, kernel=linear_then_swiglu)


def fused(tiles: GemmTiles | None) -> Candidate:
    """`linear_swiglu` in one kernel for any number of tokens, with its own tile sizes or given ones."""

    def kernel(launch: Launch) -> None:
        run_linear_swiglu(launch, tiles or own_tiles(launch), card_of(launch.reads[0].device).num_sms)

    return Candidate(name="ours" if tiles is None else describe(tiles), tiles=tiles, kernel=kernel)


def describe(tiles: GemmTiles) -> str:
    shape = f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k} w{tiles.num_warps} s{tiles.num_stages}"
    is_in_pieces = tiles.store_n < tiles.block_n
    extras = (f" g{tiles.group_m}", " in pieces" if is_in_pieces else "", "" if tiles.is_flat else " not flat")
    return shape + "".join(extras)


def measure_all(operation: str, num_tokens: int, candidates: Sequence[Candidate]) -> list[Point]:
    """Measure candidates on the same launches and print their rows; all are compared with the first."""
    passes = passes_of(operation, num_tokens)
    points: list[Point] = []
    expected: list[Tensor] = []
    for candidate in candidates:
        point = Point(operation=operation, num_tokens=num_tokens, kernel=candidate.name, tiles=candidate.tiles)
        try:
            outputs = outputs_of(candidate.kernel, passes[0])
            expected = expected or outputs
            check(outputs, expected)
            time_s, energy_j = sustained(candidate.kernel, passes)
            cublas_us = points[0].time_us if points else time_s * 1e6
            point = measured(point, passes[0], time_s, energy_j, cublas_us)
        # Any error of a compiler or a driver is shown in the row.
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            point = replace(point, error=f"{type(error).__name__}: {reason[0]}")
        points.append(point)
        print_row(point)
    return points


def passes_of(operation: str, num_tokens: int) -> list[list[Launch]]:
    """Launches of an operation on copies of its data that together fill several L2 caches."""
    names = list(SHAPES) if operation == LAYER else ["gate_up" if operation == FUSED else operation]
    num_bytes = sum(2 * num_columns * num_features for num_columns, num_features in map(SHAPES.__getitem__, names))
    num_copies = max(2, -(-MIN_DATA_BYTES // num_bytes))
    is_gated = operation == FUSED
    return [[launch_of(SHAPES[name], num_tokens, is_gated) for name in names] for _ in range(num_copies)]


def launch_of(shape: tuple[int, int], num_tokens: int, is_gated: bool) -> Launch:
    """A launch on random numbers, which take more power than zeros, scaled so that results are about 1."""
    num_columns, num_features = shape
    x = torch.randn((num_tokens, num_features), dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(num_features**-0.5)
    op = Operation(
        name="linear",
        kind=OpKind.LINEAR,
        resource=Resource.COMPUTE,
        reads=("x",),
        writes=("out",),
        dims=LinearDims(in_features=num_features, out_features=num_columns),
    )
    return Launch(
        op=op,
        layer=0,
        tokens=TokenRange(start=0, stop=num_tokens),
        reads=(x,),
        writes=(x.new_empty((num_tokens, num_columns // (2 if is_gated else 1))),),
        weights=(weight,),
        inputs=index_tensors(1),
        cache=None,
    )


def outputs_of(kernel: Kernel, launches: Sequence[Launch]) -> list[Tensor]:
    """Outputs of a kernel, in tensors that were filled with NaN."""
    for launch in launches:
        launch.writes[0].fill_(torch.nan)
        kernel(launch)
    return [launch.writes[0].clone() for launch in launches]


def check(outputs: Sequence[Tensor], expected: Sequence[Tensor], max_error: float = MAX_ERROR) -> None:
    """Compare outputs, as a kernel that is fast and wrong does not count.

    Raises:
        ValueError: The outputs differ by more than rounding.
    """
    for output, wanted in zip(outputs, expected, strict=True):
        error = float((output.float() - wanted.float()).norm() / wanted.float().norm())
        # Written this way so that NaN is an error.
        if not error < max_error:
            raise ValueError(f"wrong result, off by {error:.1%}")


def sustained(kernel: Kernel, passes: Sequence[Sequence[Launch]]) -> tuple[float, float | None]:
    """Seconds and joules of one pass, measured for `WINDOW_S` after a warm-up."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for launches in passes:
            for launch in launches:
                kernel(launch)
    once_s = elapsed_s(graph, 3)
    once_s = elapsed_s(graph, max(1, int(WARM_UP_S / once_s)))
    num_replays = max(3, int(WINDOW_S / once_s) + 1)
    with energy_of("cuda") as energy:
        time_s = elapsed_s(graph, num_replays)
        used_j = energy.used_so_far_j()
    return time_s / len(passes), None if used_j is None else used_j / num_replays / len(passes)


def measured(
    point: Point, launches: Sequence[Launch], time_s: float, energy_j: float | None, cublas_us: float | None
) -> Point:
    """The point with its numbers filled in."""
    flops = sum(2 * len(launch.reads[0]) * launch.weights[0].numel() for launch in launches)
    return replace(
        point,
        time_us=time_s * 1e6,
        energy_mj=None if energy_j is None else energy_j * 1e3,
        tflop_per_s=flops / time_s / 1e12,
        speed_of_cublas=None if cublas_us is None else cublas_us / (time_s * 1e6),
    )


def print_row(point: Point) -> None:
    print(f"{point.operation:<15}{point.num_tokens:>7}  {point.kernel:<38}", end="")
    if point.error is not None:
        print(f"  {point.error[:90]}", flush=True)
        return
    cells = ((point.time_us, 8, 1), (point.energy_mj, 8, 1), (point.tflop_per_s, 9, 0), (point.speed_of_cublas, 11, 3))
    print(*(f"{'-' if x is None else f'{x:.{digits}f}':>{width}}" for x, width, digits in cells), sep="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
