"""Products of a Llama-3-8B layer by fewer programs than the GPU has SMs: whole tiles against a split last round.

Each program takes an SM, as on a partition, but SMs without one are idle here and leave their power and bandwidth to
the others. cuBLAS takes the whole device, so it stands in the first row of a size only. `+add` is LINEAR_ADD: with
whole tiles a product and a sum in a kernel each, otherwise one kernel; the last column is that without a split. A point
is measured as in `kernels_gemm.py`. A star marks what `kernels/kept.py` chooses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels_gemm import SHAPES, WINDOW_S, check, describe, passes_of, sustained
from nanoflow.bench.machine import detect_machine, detect_software
from nanoflow.kernels import reference
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.triton_attention import card_of
from nanoflow.kernels.triton_gemm import GEMM_TILES, GemmTiles, choose_gemm_tiles, run_linear
from nanoflow.kernels.triton_split_k import (
    SplitWorkspace,
    choose_split_cut,
    make_workspace,
    run_linear_add_split_k,
    run_linear_split_k,
)

ADDED = "+add"
OPERATIONS = (*SHAPES, *(name + ADDED for name in ("o_proj", "down_proj")))
SPLIT_TILES = GEMM_TILES[:2]
COLUMNS = ("cuBLAS", "whole", *(f"{t.block_m}x{t.block_n} split" for t in SPLIT_TILES), "one kernel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to compute: its column, its cut if it has one, and what it does with each launch."""

    column: str
    tiles: GemmTiles | None
    num_splits: int
    kernel: Kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One cell; times and energies of one product; `error` instead of them if it did not run."""

    operation: str
    num_tokens: int
    num_programs: int
    column: str
    tiles: GemmTiles | None
    num_splits: int
    is_chosen: bool
    time_us: float | None = None
    energy_mj: float | None = None
    tflop_per_s: float | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the document."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("kernels_split_k needs an NVIDIA GPU", file=sys.stderr)
        return 1
    header = "".join(f"{f'{column}, us':>20}" for column in COLUMNS)
    print(f"{'operation':<15}{'tokens':>7}{'programs':>9}{header}")
    points: list[Point] = []
    for num_tokens in args.tokens:
        for operation in args.operations:
            points += measure_all(operation, num_tokens, args.programs)
    if args.json is not None:
        args.json.write_text(json.dumps(document(points), indent=2) + "\n", encoding="utf-8")
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="products")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048], help="sizes of the dense batch")
    parser.add_argument("--programs", type=int, nargs="+", default=[132, 116, 100, 84, 68], help="SMs to be used")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1 or min(args.programs) < 1:
        parser.error("--tokens and --programs must be at least 1")
    return args


def measure_all(operation: str, num_tokens: int, programs: Sequence[int]) -> list[Point]:
    """Measure all candidates of a size on the same launches, and print a row for each number of programs."""
    is_added = operation.endswith(ADDED)
    passes = passes_of(operation.removesuffix(ADDED), num_tokens)
    if is_added:
        passes = [[added(launch) for launch in launches] for launches in passes]
    exact: Kernel = reference.linear_add if is_added else reference.linear
    expected = outputs_of(exact, passes[0], is_added=is_added)
    points: list[Point] = []
    for row, num_programs in enumerate(programs):
        found = candidates(passes[0][0], num_programs, is_added=is_added)
        if row == 0:
            found.insert(0, Candidate(column="cuBLAS", tiles=None, num_splits=1, kernel=exact))
        chosen = choose(passes[0][0], num_programs)
        measured = []
        for candidate in found:
            is_one_kernel = not is_added or candidate.num_splits > 1 or candidate.column == COLUMNS[-1]
            point = Point(
                operation=operation,
                num_tokens=num_tokens,
                num_programs=num_programs,
                column=candidate.column,
                tiles=candidate.tiles,
                num_splits=candidate.num_splits,
                is_chosen=is_one_kernel and (candidate.tiles, candidate.num_splits) == chosen,
            )
            measured.append(measure(point, candidate.kernel, passes, expected, is_added=is_added))
        print_row(measured)
        points += measured
    return points


def added(launch: Launch) -> Launch:
    """The product as LINEAR_ADD."""
    return replace(launch, reads=(*launch.reads, *launch.writes))


def candidates(launch: Launch, num_programs: int, *, is_added: bool) -> list[Candidate]:
    """Whole tiles as `choose_gemm_tiles` takes them, and both large sizes with the best split of the last round."""
    shape = (len(launch.reads[0]), len(launch.weights[0]))
    limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
    tiles = choose_gemm_tiles(GEMM_TILES, *shape, num_programs, limit_bytes)
    workspace = make_workspace(GEMM_TILES, num_programs, launch.reads[0].device)
    kernel = whole_then_add(tiles, num_programs) if is_added else whole(tiles, num_programs)
    found = [Candidate(column="whole", tiles=tiles, num_splits=1, kernel=kernel)]
    for column, size in zip(COLUMNS[2:], SPLIT_TILES, strict=False):
        _, num_splits = choose_split_cut([size], (*shape, launch.reads[0].shape[1]), num_programs, limit_bytes)
        if num_splits > 1:
            kernel = split(size, num_programs, workspace, num_splits, is_added=is_added)
            found.append(Candidate(column=column, tiles=size, num_splits=num_splits, kernel=kernel))
    if is_added:
        kernel = split(tiles, num_programs, workspace, 1, is_added=True)
        found.append(Candidate(column=COLUMNS[-1], tiles=tiles, num_splits=1, kernel=kernel))
    return found


def choose(launch: Launch, num_programs: int) -> tuple[GemmTiles, int]:
    limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
    num_columns, num_features = launch.weights[0].shape
    shape = (len(launch.reads[0]), num_columns, num_features)
    return choose_split_cut(GEMM_TILES, shape, num_programs, limit_bytes)


def whole(tiles: GemmTiles, num_programs: int) -> Kernel:
    return lambda launch: run_linear(launch, tiles, num_programs)


def whole_then_add(tiles: GemmTiles, num_programs: int) -> Kernel:
    def kernel(launch: Launch) -> None:
        (x, _), (hidden,) = launch.reads, launch.writes
        product = torch.empty_like(hidden)
        run_linear(replace(launch, reads=(x,), writes=(product,)), tiles, num_programs)
        hidden.add_(product)

    return kernel


def split(tiles: GemmTiles, num_programs: int, workspace: SplitWorkspace, num_splits: int, *, is_added: bool) -> Kernel:
    run = run_linear_add_split_k if is_added else run_linear_split_k
    return lambda launch: run(launch, tiles, num_programs, workspace, num_splits)


def outputs_of(kernel: Kernel, launches: Sequence[Launch], *, is_added: bool) -> list[Tensor]:
    """What a kernel writes, into outputs that held NaN, or adds to ones."""
    for launch in launches:
        launch.writes[0].fill_(1.0 if is_added else torch.nan)
        kernel(launch)
    return [launch.writes[0].clone() for launch in launches]


def measure(
    point: Point, kernel: Kernel, passes: Sequence[Sequence[Launch]], expected: Sequence[Tensor], *, is_added: bool
) -> Point:
    """The point with its numbers, or with the error, filled in."""
    try:
        check(outputs_of(kernel, passes[0], is_added=is_added), expected)
        time_s, energy_j = sustained(kernel, passes)
    # Whatever a compiler or a driver raises belongs into the row.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return replace(point, error=f"{type(error).__name__}: {reason[0]}")
    flops = sum(2 * len(launch.reads[0]) * launch.weights[0].numel() for launch in passes[0])
    return replace(
        point,
        time_us=time_s * 1e6,
        energy_mj=None if energy_j is None else energy_j * 1e3,
        tflop_per_s=flops / time_s / 1e12,
    )


def print_row(points: Sequence[Point]) -> None:
    first = points[0]
    print(f"{first.operation:<15}{first.num_tokens:>7}{first.num_programs:>9}", end="")
    by_column = {point.column: point for point in points}
    for column in COLUMNS:
        point = by_column.get(column)
        if point is None:
            cell = ""
        elif point.time_us is None:
            cell = "failed"
        else:
            cell = f"{'*' if point.is_chosen else ''}{point.time_us:.1f}"
        print(f"{cell:>20}", end="")
    print(flush=True)
    for point in points:
        if point.error is not None:
            cut = "" if point.tiles is None else f" {describe(point.tiles)}"
            print(f"    {point.column}{cut}: {point.error[:100]}", flush=True)


def document(points: Sequence[Point]) -> dict[str, object]:
    """The result as JSON."""
    return {
        "benchmark": "kernels_split_k",
        "shape": "Llama-3-8B, bfloat16",
        "window_s": WINDOW_S,
        "machine": dataclasses.asdict(detect_machine()),
        "software": dataclasses.asdict(detect_software()),
        "points": [dataclasses.asdict(point) for point in points],
    }


if __name__ == "__main__":
    sys.exit(main())
