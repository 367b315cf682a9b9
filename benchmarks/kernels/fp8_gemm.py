"""Products of a Llama-3-8B layer in FP8 on this GPU, beside the same products in bfloat16.

qkv_proj and gate_up_proj are products alone. o_proj and down_proj are added to the residual stream, as the model does;
torch's product in FP8 cannot add, so an addition follows it. gate_up+swiglu is one kernel in bfloat16; in FP8 it is a
product and a SwiGLU that quantises, or a product that ends in SwiGLU and what quantises its rows. What quantises the
rows of the other products is not in their times.

A point is a CUDA graph that runs in turn on copies of weights and activations which together are several times larger
than the L2 cache. It is replayed for half a second at least, after a warm-up. Energy is from the card's counter.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.document import write_document
from benchmarks.kernels.attention import elapsed_s
from benchmarks.kernels.gemm import MIN_DATA_BYTES, SHAPES, launch_of
from nanoflow.cli.options import CommandParser
from nanoflow.device.energy import energy_of
from nanoflow.graph.layers import FP8_BLOCK, Fp8
from nanoflow.kernels import reference, triton_fp8, triton_fp8_rows, triton_gemm
from nanoflow.kernels.gemm_tiles import FP8_TILES, GEMM_TILES, GemmTiles
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.triton_attention import card_of
from nanoflow.kernels.triton_fp8_split import choose_split, run_split_fp8
from nanoflow.kernels.triton_split_k import make_workspace
from nanoflow.models.fp8 import E4M3, quantise_rows

DEVICE = torch.device("cuda", 0)
TOKENS = (64, 256, 1024, 2048, 4096)
ADDED = ("o_proj", "down_proj")
FUSED = "gate_up+swiglu"
LARGE, SMALLER, *_ = FP8_TILES[GEMM_TILES, False]
SWEEP = {
    "4 stages, store in halves": replace(LARGE, num_stages=4, store_n=128),
    "store in halves": replace(LARGE, store_n=128),
    "tiles one by one": replace(LARGE, is_flat=False),
    "groups of 8": replace(LARGE, group_m=8),
    "128 columns": SMALLER,
}
WARM_UP_S, WINDOW_S = 0.1, 0.5
# Three bits of mantissa in both factors; far below the error of a wrong scale or tile.
MAX_ERROR = 0.06


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to compute an operation.

    Attributes:
        name: In the table.
        prepare: Makes its launch of the one in bfloat16.
        kernel: What is timed.
        checked: The same with a result in bfloat16, if `kernel` has none.
    """

    name: str
    prepare: Callable[[Launch], Launch]
    kernel: Kernel
    checked: Kernel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row: time and energy of one pass over the operation, or `error` if it did not run."""

    operation: str
    num_tokens: int
    kernel: str
    time_us: float | None = None
    energy_mj: float | None = None
    tflop_per_s: float | None = None
    speed_of_16_bits: float | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.kernels.fp8_gemm needs an NVIDIA GPU", file=sys.stderr)
        return 1
    print(f"{'operation':<16}{'tokens':>7}  {'kernel':<28}{'us':>8}{'mJ':>8}{'TFLOP/s':>9}{'of 16 bits':>12}")
    points: list[Point] = []
    for num_tokens in args.tokens:
        for operation in (*SHAPES, FUSED):
            candidates = candidates_of(operation, has_blocks=args.blocks)
            points += measure_all(operation, num_tokens, (*candidates, *(sweep_of(operation) if args.sweep else ())))
    if args.json is not None:
        rows = [dataclasses.asdict(point) for point in points]
        write_document(args.json, "kernels_fp8_gemm", shape="Llama-3-8B", window_s=WINDOW_S, points=rows)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.kernels.fp8_gemm", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="sizes of the dense batch")
    parser.add_argument("--blocks", action="store_true", help="also measure weights with a scale for each block")
    parser.add_argument("--sweep", action="store_true", help="also measure other tile sizes")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1:
        parser.error("--tokens must be at least 1")
    return args


def candidates_of(operation: str, *, has_blocks: bool) -> tuple[Candidate, ...]:
    """The ways to compute an operation; the first is in 16 bits."""
    if operation == FUSED:
        return (
            Candidate(name="bfloat16, one kernel", prepare=as_it_is, kernel=triton_gemm.linear_swiglu),
            Candidate(
                name="FP8, two kernels", prepare=in_fp8, kernel=fp8_then_swiglu, checked=fp8_then_swiglu_in_both_types
            ),
            Candidate(name="FP8, SwiGLU inside, rows", prepare=in_fp8, kernel=fp8_swiglu_then_rows),
            Candidate(name="FP8, SwiGLU inside alone", prepare=in_fp8, kernel=fp8_swiglu),
        )
    is_added = operation in ADDED
    plain = Candidate(
        name="bfloat16, cuBLAS", prepare=as_it_is, kernel=reference.linear_add if is_added else reference.linear
    )
    run = triton_fp8.run_linear_add_fp8 if is_added else triton_fp8.run_linear_fp8

    def ours(launch: Launch) -> None:
        run(launch, *triton_fp8.choose_cut(launch))

    workspace = functools.cache(lambda: make_workspace(GEMM_TILES, card_of(DEVICE).num_sms, DEVICE))

    def split(launch: Launch) -> None:
        num_programs = card_of(launch.reads[0].device).num_sms
        tiles, num_splits = choose_split(launch, GEMM_TILES, num_programs)
        if num_splits == 1:
            run(launch, tiles, num_programs)
        else:
            run_split_fp8(launch, tiles, num_programs, workspace(), num_splits, is_added=is_added)

    torchs = scaled_then_add if is_added else triton_fp8.run_scaled_mm
    found = (
        plain,
        Candidate(name="FP8, torch and add" if is_added else "FP8, torch", prepare=in_fp8, kernel=torchs),
        Candidate(name="FP8, ours", prepare=in_fp8, kernel=ours),
        Candidate(name="FP8, ours, split if better", prepare=in_fp8, kernel=split),
    )
    blocks = Candidate(name="FP8 in blocks, ours", prepare=in_blocks, kernel=ours)
    return (*found, blocks) if has_blocks else found


def sweep_of(operation: str) -> Iterator[Candidate]:
    """Our kernels with other tiles, whatever the number of tokens."""
    run: Callable[[Launch, GemmTiles, int], None] = triton_fp8.run_linear_fp8
    if operation in ADDED:
        run = triton_fp8.run_linear_add_fp8
    elif operation == FUSED:
        run = triton_fp8.run_linear_swiglu_fp8
    for name, tiles in SWEEP.items():

        def kernel(launch: Launch, tiles: GemmTiles = tiles) -> None:
            run(launch, tiles, card_of(DEVICE).num_sms)

        yield Candidate(name=f"FP8, {name}", prepare=in_fp8, kernel=kernel)


def as_it_is(launch: Launch) -> Launch:
    """The launch in bfloat16."""
    return launch


def in_fp8(launch: Launch) -> Launch:
    """The same product with rows and weights quantised."""
    x, x_scales = quantise_rows(launch.reads[0])
    weight, scales = quantise_rows(launch.weights[0])
    return replace(launch, reads=(x, x_scales, *launch.reads[1:]), weights=(weight, scales[:, 0].contiguous()))


def in_blocks(launch: Launch) -> Launch:
    """The same product with a scale for each block of the weight; blocks share one here."""
    quantised = in_fp8(launch)
    weight = launch.weights[0]
    scale = float(weight.abs().max()) / 448.0
    shape = Fp8(block=FP8_BLOCK).scales_shape(tuple(weight.shape))
    scales = torch.full(shape, scale, device=weight.device)
    return replace(quantised, weights=((weight.float() / scale).to(E4M3), scales))


def scaled_then_add(launch: Launch) -> None:
    """torch's product, then the addition."""
    x, x_scales, hidden = launch.reads
    product = torch.empty_like(hidden)
    triton_fp8.run_scaled_mm(replace(launch, reads=(x, x_scales), writes=(product,)))
    hidden.add_(product)


def fp8_then_swiglu(launch: Launch) -> None:
    """The product that the engine uses, then SwiGLU, whose rows it writes in FP8."""
    _fp8_then_swiglu(launch, ())


def fp8_then_swiglu_in_both_types(launch: Launch) -> None:
    """The same, with rows in bfloat16 as well."""
    _fp8_then_swiglu(launch, launch.writes)


def fp8_swiglu(launch: Launch) -> None:
    """The product that ends in SwiGLU, with rows in bfloat16."""
    triton_fp8.run_linear_swiglu_fp8(launch, *triton_fp8.choose_cut(launch))


def fp8_swiglu_then_rows(launch: Launch) -> None:
    """The same, then its rows in FP8."""
    fp8_swiglu(launch)
    (out,) = launch.writes
    numbers, scales = out.new_empty(out.shape, dtype=E4M3), out.new_empty((len(out), 1), dtype=torch.float32)
    triton_fp8_rows.quantise_fp8(replace(launch, reads=(out,), writes=(numbers, scales), weights=()))


def _fp8_then_swiglu(launch: Launch, kept: tuple[Tensor, ...]) -> None:
    (out,), weight = launch.writes, launch.weights[0]
    gate_up = out.new_empty((len(out), len(weight)))
    triton_fp8.linear_fp8(replace(launch, writes=(gate_up,)))
    numbers, scales = out.new_empty(out.shape, dtype=E4M3), out.new_empty((len(out), 1), dtype=torch.float32)
    triton_fp8_rows.swiglu_fp8(replace(launch, reads=(gate_up,), writes=(numbers, scales, *kept), weights=()))


def measure_all(operation: str, num_tokens: int, candidates: Sequence[Candidate]) -> list[Point]:
    """Measure candidates on the same numbers and print their rows; all are compared with the first."""
    launches = launches_of(operation, num_tokens)
    points: list[Point] = []
    expected: Tensor | None = None
    for candidate in candidates:
        point = Point(operation=operation, num_tokens=num_tokens, kernel=candidate.name)
        try:
            prepared = [candidate.prepare(launch) for launch in launches]
            output = output_of(candidate.checked or candidate.kernel, prepared[0])
            expected = output if expected is None else expected
            check(output, expected)
            time_s, energy_j = sustained(candidate.kernel, prepared)
            first_us = points[0].time_us if points else time_s * 1e6
            point = measured(point, launches[0], time_s, energy_j, first_us)
        # Any error of a compiler or a driver is shown in the row.
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            point = replace(point, error=f"{type(error).__name__}: {reason[0]}")
        points.append(point)
        print_row(point)
    return points


def launches_of(operation: str, num_tokens: int) -> list[Launch]:
    """Launches of an operation in bfloat16 on copies of its data; in FP8 these still fill several L2 caches."""
    shape = SHAPES["gate_up" if operation == FUSED else operation]
    num_copies = max(2, -(-MIN_DATA_BYTES // (shape[0] * shape[1])))
    launches = [launch_of(shape, num_tokens, operation == FUSED) for _ in range(num_copies)]
    if operation not in ADDED:
        return launches
    return [replace(launch, reads=(*launch.reads, launch.writes[0])) for launch in launches]


def output_of(kernel: Kernel, launch: Launch) -> Tensor:
    """What a kernel writes into a tensor of zeros."""
    launch.writes[0].zero_()
    kernel(launch)
    return launch.writes[0].clone()


def check(output: Tensor, expected: Tensor) -> None:
    """Compare outputs, as a kernel that is fast and wrong does not count.

    Raises:
        ValueError: The outputs differ by more than rounding to FP8.
    """
    error = float((output.float() - expected.float()).norm() / expected.float().norm())
    # Written this way so that NaN is an error.
    if not error < MAX_ERROR:
        raise ValueError(f"wrong result, off by {error:.1%}")


def sustained(kernel: Kernel, launches: Sequence[Launch]) -> tuple[float, float | None]:
    """Seconds and joules of one launch, measured for `WINDOW_S` after a warm-up."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for launch in launches:
            kernel(launch)
    once_s = elapsed_s(graph, 3)
    once_s = elapsed_s(graph, max(1, int(WARM_UP_S / once_s)))
    num_replays = max(3, int(WINDOW_S / once_s) + 1)
    with energy_of("cuda") as energy:
        time_s = elapsed_s(graph, num_replays)
        used_j = energy.used_so_far_j()
    return time_s / len(launches), None if used_j is None else used_j / num_replays / len(launches)


def measured(point: Point, launch: Launch, time_s: float, energy_j: float | None, first_us: float | None) -> Point:
    """The point with its numbers filled in."""
    flops = 2 * len(launch.reads[0]) * launch.weights[0].numel()
    return replace(
        point,
        time_us=time_s * 1e6,
        energy_mj=None if energy_j is None else energy_j * 1e3,
        tflop_per_s=flops / time_s / 1e12,
        speed_of_16_bits=None if first_us is None else first_us / (time_s * 1e6),
    )


def print_row(point: Point) -> None:
    print(f"{point.operation:<16}{point.num_tokens:>7}  {point.kernel:<28}", end="")
    if point.error is not None:
        print(f"  {point.error[:90]}", flush=True)
        return
    times = ((point.time_us, 8, 1), (point.energy_mj, 8, 1), (point.tflop_per_s, 9, 0))
    cells = (*times, (point.speed_of_16_bits, 12, 3))
    print(*(f"{'-' if x is None else f'{x:.{digits}f}':>{width}}" for x, width, digits in cells), sep="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
