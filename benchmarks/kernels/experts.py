"""Kernels of experts on this GPU, at the sizes of Mixtral-8x7B and Qwen3-30B-A3B, with balanced and skewed routing.

Each row is one operation of one layer: its time, and what it reaches of the roof, which is the longer of two times: of
its FLOPs at the rate of a large product of torch's in the same numbers, and of its bytes at the rate of a copy, both
measured first. Bytes are those of the experts that the routing touches. Both products are there in FP8 too, and what
quantises the rows of the second one; a table at the end has their sums beside those of 16 bits. With `--sweep` other
tilings are measured where the routing is balanced; the row of one that does not run, or is wrong, says why. A point is
a CUDA graph, replayed for 0.2 s.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.document import write_document
from benchmarks.kernels.attention import elapsed_s
from benchmarks.kernels.expert_works import MODELS, Form, Work, num_different, works_of
from benchmarks.kernels.expert_works_fp8 import fp8_works, quantised
from benchmarks.kernels.gemm import MAX_ERROR, check, describe
from nanoflow.cli.options import CommandParser
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.compiling import compiling
from nanoflow.kernels.expert_tiles import WHOLE_CARD
from nanoflow.kernels.gemm_tiles import GemmTiles, for_fp8
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.triton_attention import card_of

WARM_UP_S, WINDOW_S = 0.05, 0.2
ROOF_SIZE, ROOF_BYTES = 8192, 2 << 30
SKEW = 1.0
PLAIN_SUM, FP8_SUM = ("experts_in", "experts_out"), ("experts_in_fp8", "quantise", "experts_out_fp8")
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


# Tensor cores that sum fast keep fewer bits; a wrong scale or tile is far beyond it.
MAX_FP8_ERROR = 2e-2
ROUTINGS = {"balanced": 0.0, "skewed": SKEW}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """Rates that this card reaches: a large product of numbers of 16 bits and of FP8, and bytes moved by a copy."""

    flops_per_s: float
    fp8_flops_per_s: float
    bytes_per_s: float

    def least_s(self, flops: float, num_bytes: float, form: Form = Form.PLAIN) -> float:
        """No kernel with products in this form is faster."""
        flops_per_s = self.flops_per_s if form is Form.PLAIN else self.fp8_flops_per_s
        return max(flops / flops_per_s, num_bytes / self.bytes_per_s)


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
    rates = f"{roof.flops_per_s / 1e12:.0f} TFLOP/s, {roof.fp8_flops_per_s / 1e12:.0f} in FP8"
    print(f"roof: {rates}, {roof.bytes_per_s / 1e9:.0f} GB/s")
    print(f"{'model':<15}{'operation':<16}{'tokens':>7} {'routing':<10}{'touched':>8}  {'kernel':<38}", end="")
    print(f"{'us':>9}{'TFLOP/s':>9}{'GB/s':>8}{'of roof':>9}")
    points = [point for name in args.models for point in measure_model(name, args, roof)]
    print(f"{time.monotonic() - start_s:.0f} s in all")
    print_sums(points)
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
    tokens = [256, 1024, 2048]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="sizes of the dense batch")
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=False, help="other tilings too")
    parser.add_argument("--blocks", action="store_true", help="weights in FP8 with a scale for each block of 128 x 128")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1:
        parser.error("--tokens must be at least 1")
    return args


def measure_roof() -> Roof:
    """Rates of square products and of a copy."""
    left, right = (torch.randn((ROOF_SIZE, ROOF_SIZE), device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    source = torch.empty(ROOF_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product_s = replayed(lambda: torch.mm(left, right, out=product))
    copy_s = replayed(lambda: target.copy_(source))
    first, second = (each.to(torch.float8_e4m3fn) for each in (left, right))
    scales = torch.ones((ROOF_SIZE, 1), device="cuda")

    def multiply() -> None:
        torch._scaled_mm(
            first, second.t(), scales, scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True, out=product
        )

    flops = 2 * ROOF_SIZE**3
    return Roof(
        flops_per_s=flops / product_s,
        fp8_flops_per_s=flops / replayed(multiply),
        bytes_per_s=2 * ROOF_BYTES / copy_s,
    )


def measure_model(name: str, args: argparse.Namespace, roof: Roof) -> Iterator[Point]:
    """All points of a model."""
    model, device = MODELS[name], torch.device("cuda", torch.cuda.current_device())
    num_programs = card_of(device).num_sms
    weights = model.weights(device)
    in_fp8 = [quantised(weight, has_blocks=args.blocks) for weight in weights[:2]]

    def all_works(num_tokens: int, skew: float) -> tuple[int, dict[str, Work]]:
        works = works_of(model, num_tokens, skew, weights)
        num_touched = num_different(works["expert_order"].launch.reads[0])
        return num_touched, {**works, **fp8_works(works, num_touched, in_fp8)}

    if args.sweep:
        compile_all(all_works(max(args.tokens), 0.0)[1].values(), num_programs)
    for num_tokens in args.tokens:
        for routing, skew in ROUTINGS.items():
            num_touched, works = all_works(num_tokens, skew)
            blank = Point(model=name, operation="", num_tokens=num_tokens, routing=routing, num_touched=num_touched)
            for operation, work in works.items():
                is_swept = args.sweep and skew == 0.0 and work.with_tiles is not None
                rows = num_tokens * model.per_token / model.num_experts
                tilings = candidates_for(rows, work.form) if is_swept else ()
                yield from measured(replace(blank, operation=operation), work, (None, *tilings), num_programs, roof)


def compile_all(works: Iterable[Work], num_programs: int) -> None:
    """Compile the kernels of every tiling, as many at once as there are cores."""
    device = torch.cuda.current_device()
    with compiling(lambda: torch.cuda.set_device(device)) as compile_only, compile_only():
        for work in works:
            if (with_tiles := work.with_tiles) is None:
                continue
            for tiles in tilings_of(work.form):
                # An error is told where the tiling is measured.
                with suppress(Exception):
                    with_tiles(work.launch, tiles, num_programs)


def tilings_of(form: Form) -> list[GemmTiles]:
    """All tilings for such numbers."""
    if form is Form.PLAIN:
        return list(SWEEP)
    return list(dict.fromkeys(for_fp8(tiles, is_blocked=form is Form.FP8_BLOCKS) for tiles in SWEEP))


def candidates_for(rows_per_expert: float, form: Form = Form.PLAIN) -> list[GemmTiles]:
    """Tilings that may suit an expert with so many rows: about as high, or from 64 rows on any that is large."""
    low, high = (64, 256) if rows_per_expert > 64 else (rows_per_expert / 2, max(4 * rows_per_expert, 32))
    return [tiles for tiles in tilings_of(form) if low <= tiles.block_m <= high]


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
        # Of experts that are as probable as each other the router may choose others.
        wanted = None if blank.operation == "router" else expected
        most = MAX_ERROR if work.form is Form.PLAIN else MAX_FP8_ERROR
        least_s = roof.least_s(work.flops, work.num_bytes, work.form)
        rates = rates_of(run, work.launch, wanted, most, work.flops, work.num_bytes, least_s)
        point = replace(point, **rates)
        print_row(point)
        yield point


def rates_of(
    run: Kernel,
    launch: Launch,
    expected: Sequence[Tensor] | None,
    max_error: float,
    flops: float,
    num_bytes: float,
    least_s: float,
) -> dict[str, Any]:
    """Fields of a point: what a kernel reaches, if its results are near those expected (None: any); else `error`."""
    try:
        if expected is not None:
            check(results_of(run, launch), expected, max_error)
        time_s = replayed(functools.partial(run, launch))
    # Any error of a compiler or a driver is shown in the row.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {reason[0]}"}
    return {
        "time_us": time_s * 1e6,
        "tflop_per_s": flops / time_s / 1e12,
        "gb_per_s": num_bytes / time_s / 1e9,
        "of_roof": least_s / time_s,
    }


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
    print(f"{point.model:<15}{point.operation:<16}{point.num_tokens:>7} {point.routing:<10}", end="")
    print(f"{point.num_touched:>8}  {tiling:<38}", end="")
    if point.error is not None:
        print(f"  {point.error[:90]}", flush=True)
        return
    print(f"{point.time_us:>9.1f}{point.tflop_per_s:>9.1f}{point.gb_per_s:>8.0f}{point.of_roof:>9.2f}", flush=True)


def print_sums(points: Iterable[Point]) -> None:
    """Both products with the tilings that a model would run with: 16 bits, and FP8 with its pass over rows."""
    print(f"{'model':<15}{'tokens':>7} {'routing':<10}{'16 bits: us':>12}{'TFLOP/s':>9}", end="")
    print(f"{'FP8: us':>10}{'TFLOP/s':>9}{'times as fast':>15}")
    for place, sums in sums_of(points).items():
        model, num_tokens, routing = place
        plain, fp8 = sums
        print(f"{model:<15}{num_tokens:>7} {routing:<10}{plain.time_us:>12.1f}{plain.tflop_per_s:>9.0f}", end="")
        print(f"{fp8.time_us:>10.1f}{fp8.tflop_per_s:>9.0f}{plain.time_us / fp8.time_us:>15.2f}", flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """Some operations, one after the other."""

    time_us: float
    tflop_per_s: float


def sums_of(points: Iterable[Point]) -> dict[tuple[str, int, str], tuple[Sum, Sum]]:
    """Both products in 16 bits and in FP8, by model, tokens and routing; nothing where one of them failed."""
    times: dict[tuple[str, int, str], dict[str, tuple[float, float]]] = {}
    for point in points:
        if point.tiles is None and point.time_us is not None and point.tflop_per_s is not None:
            of_place = times.setdefault((point.model, point.num_tokens, point.routing), {})
            of_place[point.operation] = (point.time_us, point.time_us * point.tflop_per_s)
    return {
        place: (_sum([found[name] for name in PLAIN_SUM]), _sum([found[name] for name in FP8_SUM]))
        for place, found in times.items()
        if {*PLAIN_SUM, *FP8_SUM} <= found.keys()
    }


def _sum(parts: Sequence[tuple[float, float]]) -> Sum:
    time_us = sum(time for time, _ in parts)
    return Sum(time_us=time_us, tflop_per_s=sum(work for _, work in parts) / time_us)


if __name__ == "__main__":
    sys.exit(main())
