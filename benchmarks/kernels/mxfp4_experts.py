"""Products of experts of gpt-oss-20b and -120b on this GPU: weights in MXFP4 and in bfloat16, balanced routing.

Each row is one product of one layer, with biases and the clamped activation: its time, and what it reaches of the roof,
as `experts.py` measures it. Bytes are those of the experts that the routing touches, so a roof in MXFP4 is lower where
reading bounds. Other tilings of MXFP4 are measured too, unless `--no-sweep` leaves them out; the row of one that does
not run, or whose result differs from that of the same numbers in bfloat16, says why.
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
from benchmarks.kernels.expert_works import Model, launch_of
from benchmarks.kernels.experts import Roof, measure_roof, rates_of, results_of
from benchmarks.kernels.gemm import MAX_ERROR
from nanoflow.cli.options import CommandParser
from nanoflow.graph.experts import ClampedSwiglu, ExpertDims, OrderDims
from nanoflow.graph.layers import PackedMxfp4
from nanoflow.graph.operation import MXFP4_PRODUCTS, BatchShape, OpKind
from nanoflow.kernels import reference_experts, triton_experts
from nanoflow.kernels import triton_experts_mxfp4 as packed
from nanoflow.kernels.compiling import compiling
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.mxfp4_tiles import WHOLE_CARD, Mxfp4Tiles
from nanoflow.kernels.reference_mxfp4 import MXFP4_KERNELS
from nanoflow.kernels.triton_attention import card_of
from nanoflow.models.mxfp4 import draw_mxfp4, numbers_of

DTYPE = torch.bfloat16
MODELS = {
    "gpt-oss-20b": Model(num_experts=32, per_token=4, width=2880, inner=2880),
    "gpt-oss-120b": Model(num_experts=128, per_token=4, width=2880, inner=2880),
}
CLAMPED = ClampedSwiglu(alpha=1.702, limit=7.0)
# Those that a model chooses from, and such as differ in one or two respects.
_HIGH = replace(WHOLE_CARD[3], is_flat=False)
SWEEP = (
    *WHOLE_CARD,
    *(replace(tiles, is_flat=not tiles.is_flat) for tiles in WHOLE_CARD),
    replace(WHOLE_CARD[0], num_stages=4, programs_per_sm=4),
    replace(WHOLE_CARD[0], block_k=256, num_stages=4, programs_per_sm=2),
    replace(WHOLE_CARD[1], block_k=256, num_stages=3, programs_per_sm=2),
    replace(WHOLE_CARD[0], block_k=64, num_stages=7),
    replace(WHOLE_CARD[0], num_stages=7, programs_per_sm=2),
    replace(WHOLE_CARD[1], num_warps=8, programs_per_sm=2),
    replace(WHOLE_CARD[2], num_warps=8),
    replace(WHOLE_CARD[2], block_k=64, programs_per_sm=3),
    replace(_HIGH, num_warps=8),
    replace(_HIGH, num_warps=8, block_k=128, programs_per_sm=1),
    replace(_HIGH, block_n=256, num_warps=8, programs_per_sm=1),
    replace(_HIGH, block_m=256, num_warps=8, programs_per_sm=1),
    replace(_HIGH, block_m=256, num_warps=8, programs_per_sm=1, is_flat=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row; `error` says why it has no time. `tiles` is None for the tiling that a model would run with."""

    model: str
    operation: str
    num_tokens: int
    tiles: Mxfp4Tiles | None = None
    time_us: float | None = None
    tflop_per_s: float | None = None
    gb_per_s: float | None = None
    of_roof: float | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.kernels.mxfp4_experts needs an NVIDIA GPU", file=sys.stderr)
        return 1
    start_s = time.monotonic()
    roof = measure_roof()
    print(f"roof: {roof.flops_per_s / 1e12:.0f} TFLOP/s, {roof.bytes_per_s / 1e9:.0f} GB/s")
    print(
        f"{'model':<14}{'operation':<18}{'tokens':>7}  {'tiling':<44}{'us':>9}{'TFLOP/s':>9}{'GB/s':>7}{'of roof':>9}"
    )
    points = [point for name in args.models for point in measure_model(name, args, roof)]
    print(f"{time.monotonic() - start_s:.0f} s in all")
    if args.json is not None:
        write_document(
            args.json,
            "kernels_mxfp4_experts",
            roof=dataclasses.asdict(roof),
            points=[dataclasses.asdict(point) for point in points],
        )
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.kernels.mxfp4_experts", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="whose sizes")
    tokens = [16, 64, 256, 1024, 2048]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="sizes of the dense batch")
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=True, help="other tilings too")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1:
        parser.error("--tokens must be at least 1")
    return args


def measure_model(name: str, args: argparse.Namespace, roof: Roof) -> Iterator[Point]:
    """All points of a model."""
    model, device = MODELS[name], torch.device("cuda", torch.cuda.current_device())
    num_sms, weights = card_of(device).num_sms, weights_of(model, device)
    if args.sweep:
        compile_all(launches_of(model, max(args.tokens), weights).values(), num_sms)
    for num_tokens in args.tokens:
        rows = num_tokens * model.per_token / model.num_experts
        for operation, launch in launches_of(model, num_tokens, weights).items():
            blank = Point(model=name, operation=operation, num_tokens=num_tokens)
            is_swept = args.sweep and launch.op.kind in MXFP4_PRODUCTS
            yield from measured(blank, launch, (None, *(candidates_for(rows) if is_swept else ())), num_sms, roof)


def weights_of(model: Model, device: torch.device) -> dict[OpKind, tuple[Tensor, ...]]:
    """Words and scales with biases, and the same numbers in bfloat16 with biases, of both products."""
    found: dict[OpKind, tuple[Tensor, ...]] = {}
    shapes = ((2 * model.inner, model.width), (model.width, model.inner))
    for kinds, shape in zip(_KINDS, shapes, strict=True):
        form, whole = PackedMxfp4(is_gated=kinds is _KINDS[0]), (model.num_experts, *shape)
        words = torch.empty(form.words_shape(whole), dtype=torch.int32, device=device)
        scales = torch.empty(form.scales_shape(whole), dtype=torch.uint8, device=device)
        draw_mxfp4(words, scales, torch.Generator(device).manual_seed(0))
        numbers = torch.empty(whole, dtype=DTYPE, device=device)
        for expert in range(model.num_experts):
            numbers[expert] = numbers_of(words[expert], scales[expert], is_gated=form.is_gated)
        bias = torch.randn(whole[:2], device=device).to(DTYPE)
        found |= {kinds[0]: (words, scales, bias), kinds[1]: (numbers, bias)}
    return found


def launches_of(model: Model, num_tokens: int, weights: dict[OpKind, tuple[Tensor, ...]]) -> dict[str, Launch]:
    """Both products in both forms, on random tokens with one routing."""
    routing, device = model.routing(0.0), next(iter(weights.values()))[0].device
    ids = torch.rand((num_tokens, model.num_experts), device=device).topk(model.per_token).indices.int()
    rows = torch.empty((num_tokens, model.per_token), dtype=torch.int32, device=device)
    ends = torch.empty((num_tokens, model.num_experts), dtype=torch.int32, device=device)
    reference_experts.expert_order(launch_of(OpKind.EXPERT_ORDER, OrderDims(routing=routing), (ids,), (rows, ends)))
    x, activation, out = (
        torch.randn((num_tokens, width), device=device).to(DTYPE)
        for width in (model.width, model.per_token * model.inner, model.per_token * model.width)
    )
    first = ExpertDims(
        in_features=model.width,
        out_features=2 * model.inner,
        routing=routing,
        is_gated=True,
        has_bias=True,
        clamped=CLAMPED,
    )
    second = replace(first, in_features=model.inner, out_features=model.width, is_gated=False, clamped=None)
    sides = ((first, x, torch.empty_like(activation)), (second, activation, out))
    return {
        kind: launch_of(kind, dims, (read, rows, ends), (written,), weights[kind])
        for kinds, (dims, read, written) in zip(_KINDS, sides, strict=True)
        for kind in kinds
    }


def compile_all(launches: Iterable[Launch], num_sms: int) -> None:
    """Compile the kernels of every tiling, as many at once as there are cores."""
    device = torch.cuda.current_device()
    with compiling(lambda: torch.cuda.set_device(device)) as compile_only, compile_only():
        for launch, tiles in itertools.product(launches, SWEEP):
            # An error is told where the tiling is measured.
            with suppress(Exception):
                if launch.op.kind in MXFP4_PRODUCTS:
                    _RUN[launch.op.kind](launch, tiles, num_sms)


def candidates_for(rows_per_expert: float) -> list[Mxfp4Tiles]:
    """Tilings that may suit an expert with so many rows: about as high."""
    low, high = min(rows_per_expert / 2, 128), max(4 * rows_per_expert, 32)
    return [tiles for tiles in SWEEP if low <= tiles.block_m <= high]


def measured(
    blank: Point, launch: Launch, tilings: Sequence[Mxfp4Tiles | None], num_sms: int, roof: Roof
) -> Iterator[Point]:
    """A point for each tiling, whose results are compared with the reference's; prints them."""
    kind, shape = launch.op.kind, BatchShape(num_tokens=blank.num_tokens)
    flops, num_bytes = launch.op.flops(shape), launch.op.memory_bytes(shape, DTYPE.itemsize)
    expected = results_of(_REFERENCES[kind], launch)
    for tiles in tilings:
        point = replace(blank, tiles=tiles)
        run: Kernel = _KERNELS[kind]
        if tiles is not None:
            run = functools.partial(_RUN[kind], tiles=tiles, num_programs=num_sms * tiles.programs_per_sm)
        least_s = roof.least_s(flops, num_bytes)
        point = replace(point, **rates_of(run, launch, expected, MAX_ERROR, flops, num_bytes, least_s))
        print_row(point)
        yield point


def print_row(point: Point) -> None:
    """One line of the table."""
    tiling = "as chosen" if point.tiles is None else described(point.tiles)
    print(f"{point.model:<14}{point.operation:<18}{point.num_tokens:>7}  {tiling:<44}", end="")
    if point.error is not None:
        print(f"  {point.error[:90]}", flush=True)
        return
    print(f"{point.time_us:>9.1f}{point.tflop_per_s:>9.1f}{point.gb_per_s:>7.0f}{point.of_roof:>9.2f}", flush=True)


def described(tiles: Mxfp4Tiles) -> str:
    """A tiling in a few words."""
    size = f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
    flat = ", flat" if tiles.is_flat else ""
    return f"{size}, {tiles.num_warps} warps, {tiles.num_stages} steps, {tiles.programs_per_sm} an SM{flat}"


# Of each product the form in MXFP4, and that in bfloat16.
_KINDS = ((OpKind.EXPERTS_IN_MXFP4, OpKind.EXPERTS_IN), (OpKind.EXPERTS_OUT_MXFP4, OpKind.EXPERTS_OUT))
_KERNELS: dict[OpKind, Kernel] = {
    **packed.TRITON_MXFP4_KERNELS,
    OpKind.EXPERTS_IN: triton_experts.experts_in,
    OpKind.EXPERTS_OUT: triton_experts.experts_out,
}
_REFERENCES: dict[OpKind, Kernel] = {
    **MXFP4_KERNELS,
    OpKind.EXPERTS_IN: reference_experts.experts_in,
    OpKind.EXPERTS_OUT: reference_experts.experts_out,
}
_RUN: dict[OpKind, Callable[..., None]] = {
    OpKind.EXPERTS_IN_MXFP4: packed.run_experts_in,
    OpKind.EXPERTS_OUT_MXFP4: packed.run_experts_out,
}


if __name__ == "__main__":
    sys.exit(main())
