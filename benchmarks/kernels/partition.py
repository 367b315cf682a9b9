"""Products of a Llama-3-8B layer on a part of a GPU, alone and beside decode attention on the rest.

Every tile size of `gemm_tiles.PART_TILES` runs, with its best split of the last wave, on the SMs that attention does
not have. P of a product is its time alone on the whole GPU, by cuBLAS, / its time beside attention; for gate_up the
former is that of our kernel with SwiGLU. P of attention is its time alone on the whole GPU / its time beside products.
Overlap pays where both sum to more than 1. A star marks what `kernels/restricted.py` chooses. Needs an NVIDIA GPU with
a tensor memory accelerator. From the root of the repository:

    python -m benchmarks.kernels.partition --second-sms 24 32 40 --json part.json
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.executor.streams import LaneStream, partition_pair
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import triton_gemm, triton_split_k
from nanoflow.kernels.gemm_tiles import PART_TILES, GemmTiles, choose_gemm_tiles
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.restricted import kernels_on
from nanoflow.kernels.triton_split_k import choose_split_cut
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.profiler.alone import Prepared, prepare_attention, prepare_row, rows_workspace
from nanoflow.profiler.site import Site
from nanoflow.profiler.sustained import Span, sustained
from nanoflow.profiler.windows import LaneRun, balanced_window, captured_on
from nanoflow.profiler.work import decode_task

PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
NUM_DECODES, CONTEXT = 340, 1280
_AMPLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One tile size on one part of the GPU; times of a call in microseconds.

    Attributes:
        operation, num_tokens, num_sms: The product, its tokens, and the SMs of its part.
        tiles, num_splits: Tile sizes and the split of the last wave.
        is_chosen: Whether the engine would choose them.
        whole_us: Time on the whole GPU.
        alone_us, beside_us, attention_us: Time on the part alone; beside attention; and of the attention then.
        product_p, attention_p: P of both (top of this file).
        power_w: Mean power while both run; None without an energy counter.
    """

    operation: str
    num_tokens: int
    num_sms: int
    tiles: str
    num_splits: int
    is_chosen: bool
    whole_us: float
    alone_us: float
    beside_us: float
    attention_us: float
    product_p: float
    attention_p: float
    power_w: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """An operation that is ready to run, and the time of a call on the whole GPU."""

    prepared: Prepared
    whole_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a row for each tile size, and write the record."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.kernels.partition needs an NVIDIA GPU", file=sys.stderr)
        return 1
    span = Span(settle_s=args.settle, measure_s=args.window)
    points = []
    for point in measure(args.operations, args.tokens, args.second_sms, span):
        print(row(point), flush=True)
        points.append(point)
    if args.json is not None:
        write_document(
            args.json,
            "kernels_part",
            shape=f"Llama-3-8B, bfloat16, beside {NUM_DECODES} decodes x {CONTEXT} keys",
            window_s=args.window,
            points=[dataclasses.asdict(point) for point in points],
        )
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.kernels.partition", description=__doc__)
    parser.add_argument("--operations", nargs="+", choices=PRODUCTS, default=PRODUCTS, help="products")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="sizes of the nano-batch")
    parser.add_argument("--second-sms", type=int, nargs="+", default=[24, 32, 40], help="SMs of the attention")
    parser.add_argument("--settle", type=float, default=0.2, help="seconds before a window")
    parser.add_argument("--window", type=float, default=0.5, help="seconds of a window")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    if min(*args.tokens, *args.second_sms, args.window) <= 0:
        parser.error("--tokens, --second-sms and --window must be positive")
    return args


@torch.inference_mode()
def measure(operations: Sequence[str], sizes: Sequence[int], second_sms: Sequence[int], span: Span) -> Iterator[Point]:
    """Measure every tile size of every product on every part."""
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).multi_processor_count
    graph = fuse_swiglu(build_graph(preset_config("llama-3-8b"), None))
    site = Site(graph=graph, device=device, dtype=torch.bfloat16, page_size=16)
    decode = next(op for op in graph.layer if op.kind is OpKind.DECODE_ATTENTION)
    attention = _side(prepare_attention(site, decode_task(decode, NUM_DECODES, CONTEXT)), span)
    for num_tokens in sizes:
        for name in operations:
            product = _side(prepare_row(site, rows_workspace(site, num_tokens), name, num_tokens), span)
            for count in second_sms:
                first, second = partition_pair(device, 1.0 - count / total)
                with closing(first), closing(second):
                    yield from _on_part(product, attention, first, second, span)


def _side(prepared: Prepared, span: Span) -> Side:
    measured = sustained(prepared.work(), prepared.device, span)
    return Side(prepared=prepared, whole_s=measured.time_s / prepared.num_calls)


def _on_part(product: Side, attention: Side, first: LaneStream, second: LaneStream, span: Span) -> Iterator[Point]:
    attend = attention.prepared.work(kernels_on(attention.prepared.workspace.model.kernels, second.num_sms))
    device = product.prepared.device
    workspace = triton_split_k.make_workspace(PART_TILES, first.num_sms, device)
    batch = product.prepared.batch.num_tokens
    chosen = _cut(PART_TILES, product.prepared, batch, first.num_sms)
    with captured_on(second, attend, device) as beside:
        for tiles in PART_TILES:
            cut = _cut([tiles], product.prepared, batch, first.num_sms)
            kernel = _kernel(product.prepared.op.kind, cut, first.num_sms, workspace)
            kernels = {**product.prepared.workspace.model.kernels, product.prepared.op.kind: kernel}
            with captured_on(first, product.prepared.work(kernels), device) as run:
                alone_s, _ = _times([run], [product], span)
                (beside_s, attention_s), power_w = _times([run, beside], [product, attention], span)
            yield Point(
                operation=product.prepared.op.name,
                num_tokens=batch,
                num_sms=first.num_sms,
                tiles=f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k} s{tiles.num_stages}",
                num_splits=cut[1],
                is_chosen=cut == chosen,
                whole_us=product.whole_s * 1e6,
                alone_us=alone_s[0] * 1e6,
                beside_us=beside_s * 1e6,
                attention_us=attention_s * 1e6,
                product_p=product.whole_s / beside_s,
                attention_p=attention.whole_s / attention_s,
                power_w=power_w,
            )


def _cut(candidates: Sequence[GemmTiles], prepared: Prepared, num_tokens: int, num_sms: int) -> tuple[GemmTiles, int]:
    """The split that `restricted.py` chooses; the product with SwiGLU is never split."""
    weight = prepared.workspace.model.weights.layers[0][prepared.op.weights[0]]
    shape = (num_tokens, *weight.shape)
    if prepared.op.kind is OpKind.LINEAR_SWIGLU:
        return choose_gemm_tiles(candidates, shape[0], shape[1], num_sms, _AMPLE_BYTES), 1
    return choose_split_cut(candidates, (shape[0], shape[1], shape[2]), num_sms, _AMPLE_BYTES)


def _kernel(kind: OpKind, cut: tuple[GemmTiles, int], num_sms: int, workspace: triton_split_k.SplitWorkspace) -> Kernel:
    """The product with given tile sizes."""
    tiles, num_splits = cut
    whole: dict[OpKind, Callable[[Launch, GemmTiles, int], None]] = {
        OpKind.LINEAR: triton_gemm.run_linear,
        OpKind.LINEAR_ADD: triton_gemm.run_linear_add,
        OpKind.LINEAR_SWIGLU: triton_gemm.run_linear_swiglu,
    }
    split = {
        OpKind.LINEAR: triton_split_k.run_linear_split_k,
        OpKind.LINEAR_ADD: triton_split_k.run_linear_add_split_k,
    }
    if num_splits == 1:
        return lambda launch: whole[kind](launch, tiles, num_sms)
    return lambda launch: split[kind](launch, tiles, num_sms, workspace, num_splits)


def _times(runs: Sequence[LaneRun], sides: Sequence[Side], span: Span) -> tuple[list[float], float | None]:
    """Seconds of a call on each lane, in a window at whose end both lanes end together, and the mean power."""
    alone_s = [side.whole_s * side.prepared.num_calls for side in sides]
    counts, window = balanced_window(runs, alone_s, sides[0].prepared.device, span)
    total_s = max(window.lanes_s)
    calls_s = [total_s / count / side.prepared.num_calls for count, side in zip(counts, sides, strict=True)]
    return calls_s, None if window.energy_j is None else window.energy_j / total_s


def row(point: Point) -> str:
    """A line of the table."""
    cut = f"{'*' if point.is_chosen else ' '}{point.tiles}" + (f" / {point.num_splits}" if point.num_splits > 1 else "")
    power = "" if point.power_w is None else f", {point.power_w:.0f} W"
    return (
        f"{point.operation:<13}{point.num_tokens:>6} on {point.num_sms} SMs {cut:<22} whole {point.whole_us:7.1f} us, "
        f"alone {point.alone_us:7.1f}, beside {point.beside_us:7.1f} with attention {point.attention_us:7.1f}: "
        f"P {point.product_p:.3f} + {point.attention_p:.3f} = {point.product_p + point.attention_p:.3f}{power}"
    )


if __name__ == "__main__":
    sys.exit(main())
