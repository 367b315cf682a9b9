"""Kernels of experts on this GPU, at the sizes of Mixtral-8x7B and Qwen3-30B-A3B, with balanced and skewed routing.

Each row is one operation of one layer: its time, and what it reaches of the roof, which is the longer of two times: of
its FLOPs at the rate of a large cuBLAS product, and of its bytes at the rate of a copy, both measured first. Bytes are
those of the experts that the routing touches. Where the routing is balanced other tilings are measured too, unless
`--no-sweep` leaves them out; the row of one that does not run says why. A point is a CUDA graph, replayed for 0.2 s.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.document import write_document
from benchmarks.kernels.attention import elapsed_s
from benchmarks.kernels.expert_works import MODELS, Work, num_different, works_of
from benchmarks.kernels.gemm import check, describe
from nanoflow.cli.options import CommandParser
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.compiling import compiling
from nanoflow.kernels.expert_tiles import WHOLE_CARD
from nanoflow.kernels.gemm_tiles import GemmTiles
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.triton_attention import card_of

WARM_UP_S, WINDOW_S = 0.05, 0.2
ROOF_SIZE, ROOF_BYTES = 8192, 2 << 30
SKEW = 1.0
# Launches of a graph, so that what lies between replays does not count.
_REPEATS = 4
_LARGE = WHOLE_CARD[-1].first
SWEEP = (
    *(each.first for each in WHOLE_CARD),
    GemmTiles(block_m=16, block_n=128, block_k=128, store_n=128, num_warps=4, num_stages=5),
    GemmTiles(block_m=16, block_n=256, store_n=64, num_warps=8, num_stages=5),
    GemmTiles(block_m=32, block_n=128, block_k=128, store_n=64, num_warps=4, num_stages=4),
    GemmTiles(block_m=64, block_n=256, store_n=64, num_warps=4, num_stages=4),
    GemmTiles(block_m=128, block_n=128, store_n=64, num_warps=8, num_stages=5),
    replace(_LARGE, num_stages=3),
    replace(_LARGE, is_flat=False),
    replace(_LARGE, group_m=4),
    GemmTiles(block_m=256, block_n=128, store_n=64, num_warps=8, num_stages=3),
)


ROUTINGS = {"balanced": 0.0, "skewed": SKEW}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """Rates that this card reaches: a large product of 16-bit numbers, and bytes read and written by a copy."""

    flops_per_s: float
    bytes_per_s: float

    def least_s(self, flops: float, num_bytes: float) -> float:
        """No kernel is faster."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row; `error` says why it has no time. `tiles` is None for the tiling that a model would run with."""

    model: str
    operation: str
    num_tokens: int
    routing: str
    num_touched: int
    tiles: GemmTiles | None = None
    time_us: float | None = None
    tflop_per_s: float | None = None
    gb_per_s: float | None = None
    of_roof: float | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.kernels.experts needs an NVIDIA GPU", file=sys.stderr)
        return 1
    start_s = time.monotonic()
    roof = measure_roof()
    print(f"roof: {roof.flops_per_s / 1e12:.0f} TFLOP/s, {roof.bytes_per_s / 1e9:.0f} GB/s")
    print(f"{'model':<15}{'operation':<13}{'tokens':>7} {'routing':<10}{'touched':>8}  {'kernel':<38}", end="")
    print(f"{'us':>9}{'TFLOP/s':>9}{'GB/s':>8}{'of roof':>9}")
    points = [point for name in args.models for point in measure_model(name, args, roof)]
    print(f"{time.monotonic() - start_s:.0f} s in all")
    if args.json is not None:
        write_document(
            args.json,
            "kernels_experts",
            window_s=WINDOW_S,
            skew=SKEW,
            roof=dataclasses.asdict(roof),
            points=[dataclasses.asdict(point) for point in points],
        )
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.kernels.experts", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="whose sizes")
    tokens = [64, 256, 1024, 2048, 4096]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="sizes of the dense batch")
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=True, help="other tilings too")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1:
        parser.error("--tokens must be at least 1")
    return args


def measure_roof() -> Roof:
    """Rates of a square product and of a copy."""
    left, right = (torch.randn((ROOF_SIZE, ROOF_SIZE), device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    source = torch.empty(ROOF_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product_s = replayed(lambda: torch.mm(left, right, out=product))
    copy_s = replayed(lambda: target.copy_(source))
    return Roof(flops_per_s=2 * ROOF_SIZE**3 / product_s, bytes_per_s=2 * ROOF_BYTES / copy_s)


def measure_model(name: str, args: argparse.Namespace, roof: Roof) -> Iterator[Point]:
    """All points of a model."""
    model, device = MODELS[name], torch.device("cuda", torch.cuda.current_device())
    num_programs = card_of(device).num_sms
    weights = model.weights(device)
    if args.sweep:
        compile_all(works_of(model, max(args.tokens), 0.0, weights).values(), num_programs)
    for num_tokens in args.tokens:
        for routing, skew in ROUTINGS.items():
            works = works_of(model, num_tokens, skew, weights)
            blank = Point(
                model=name,
                operation="",
                num_tokens=num_tokens,
                routing=routing,
                num_touched=num_different(works["expert_order"].launch.reads[0]),
            )
            for operation, work in works.items():
                is_swept = args.sweep and skew == 0.0 and work.with_tiles is not None
                tilings = candidates_for(num_tokens * model.per_token / model.num_experts) if is_swept else ()
                yield from measured(replace(blank, operation=operation), work, (None, *tilings), num_programs, roof)


def compile_all(works: Iterable[Work], num_programs: int) -> None:
    """Compile the kernels of every tiling, as many at once as there are cores."""
    device = torch.cuda.current_device()
    with compiling(lambda: torch.cuda.set_device(device)) as compile_only, compile_only():
        for work, tiles in itertools.product(works, SWEEP):
            # An error is told where the tiling is measured.
            with suppress(Exception):
                if work.with_tiles is not None:
                    work.with_tiles(work.launch, tiles, num_programs)


def candidates_for(rows_per_expert: float) -> list[GemmTiles]:
    """Tilings that may suit an expert with so many rows: about as high, or from 64 rows on any that is large."""
    low, high = (64, 256) if rows_per_expert > 64 else (rows_per_expert / 2, max(4 * rows_per_expert, 32))
    return [tiles for tiles in SWEEP if low <= tiles.block_m <= high]


def measured(
    blank: Point, work: Work, tilings: Sequence[GemmTiles | None], num_programs: int, roof: Roof
) -> Iterator[Point]:
    """A point for each tiling, whose results are compared with the reference's; prints them."""
    expected = results_of(work.reference, work.launch)
    for tiles in tilings:
        point = replace(blank, tiles=tiles)

        run = work.kernel
        if tiles is not None and work.with_tiles is not None:
            run = functools.partial(work.with_tiles, tiles=tiles, num_programs=num_programs)
        try:
            # Of experts that are as probable as each other the router may choose others.
            if blank.operation != "router":
                check(results_of(run, work.launch), expected)
            time_s = replayed(functools.partial(run, work.launch))
            point = replace(
                point,
                time_us=time_s * 1e6,
                tflop_per_s=work.flops / time_s / 1e12,
                gb_per_s=work.num_bytes / time_s / 1e9,
                of_roof=roof.least_s(work.flops, work.num_bytes) / time_s,
            )
        # Any error of a compiler or a driver is shown in the row.
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            point = replace(point, error=f"{type(error).__name__}: {reason[0]}")
        print_row(point)
        yield point


def results_of(kernel: Kernel, launch: Launch) -> list[Tensor]:
    """What a kernel writes; what is added to stays what it was."""
    copies = {id(tensor): tensor.clone() for tensor in launch.writes}
    reads = tuple(copies.get(id(tensor), tensor) for tensor in launch.reads)
    own = replace(launch, reads=reads, writes=tuple(copies.values()))
    kernel(own)
    # Of the ends only the first row is written.
    return [
        tensor[:1] if launch.op.kind is OpKind.EXPERT_ORDER and place else tensor
        for place, tensor in enumerate(own.writes)
    ]


def replayed(work: Callable[[], object]) -> float:
    """Seconds of some work in a CUDA graph, replayed for `WINDOW_S` after a warm-up."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            work()
    once_s = elapsed_s(graph, max(1, int(WARM_UP_S / elapsed_s(graph, 2))))
    return elapsed_s(graph, max(2, int(WINDOW_S / once_s))) / _REPEATS


def print_row(point: Point) -> None:
    """One line of the table."""
    tiling = "as chosen" if point.tiles is None else describe(point.tiles)
    print(f"{point.model:<15}{point.operation:<13}{point.num_tokens:>7} {point.routing:<10}", end="")
    print(f"{point.num_touched:>8}  {tiling:<38}", end="")
    if point.error is not None:
        print(f"  {point.error[:90]}", flush=True)
        return
    print(f"{point.time_us:>9.1f}{point.tflop_per_s:>9.1f}{point.gb_per_s:>8.0f}{point.of_roof:>9.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
