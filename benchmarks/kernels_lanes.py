"""cuBLAS's products beside decode attention on two lanes: what both keep of their speed alone, with energy.

Three kinds of products, each beside the same attention. `bf16`: those of a layer. `fp8`: the same with e4m3 operands
and a scale a tensor, which take about half the time and energy, so that attention is as long as they are; the engine
has none yet. `head`: the language-model head on as many rows as there are decodes, which an iteration could leave to
the first layers of the next one, for the nano-batch that does not wait for its tokens. These products fill every
multiprocessor they may, so the lanes are plain streams and disjoint multiprocessors. On a Hopper card or a later one,
from the root of the repository; TOKENS:REQUESTS:KEYS as in `kernels_inside.py`:

    python -m benchmarks.kernels_lanes --cases 1024:340:1280 2048:340:1280 --json kernels_lanes.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.document import write_document
from benchmarks.kernels_inside import parse_case
from nanoflow.device.lanes import LaneStream, partition_pair, plain_stream
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import LinearDims, Operation, OpKind
from nanoflow.kernels.kept import kernels_on
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.plan import Mechanism
from nanoflow.profiler.alone import Prepared, prepare_attention
from nanoflow.profiler.pairs import balanced_window, captured_on
from nanoflow.profiler.site import Site, gemms
from nanoflow.profiler.sustained import Span, Sustained, Work, sustained
from nanoflow.profiler.work import decode_task

# Weights that are gone through in turn: several times any cache.
_MIN_WEIGHT_BYTES = 512 << 20
_SECOND_SMS = (24, 32, 48, 64)
# Operations and type of their operands.
_KINDS: dict[str, Callable[[OpGraph], tuple[tuple[Operation, ...], torch.dtype]]] = {
    "bf16": lambda graph: (graph.layer, torch.bfloat16),
    "fp8": lambda graph: (graph.layer, torch.float8_e4m3fn),
    "head": lambda graph: (graph.epilogue, torch.bfloat16),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line each, write a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", metavar="PRESET", help="whose layer (default: llama-3-8b)")
    parser.add_argument(
        "--cases", nargs="+", type=parse_case, default=[(1024, 340, 1280)], metavar="TOKENS:REQUESTS:KEYS"
    )
    parser.add_argument(
        "--products", nargs="+", choices=_KINDS, default=list(_KINDS), help="which kinds (default: all)"
    )
    parser.add_argument("--settle", type=float, default=0.4, help="seconds before each window (default: 0.4)")
    parser.add_argument("--window", type=float, default=1.0, help="seconds of each window (default: 1)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (9, 0):
        parser.error("this needs a Hopper card or a later one")
    graph = fuse_swiglu(build_graph(preset_config(args.model), None))
    site = Site(graph=graph, device=device, dtype=torch.bfloat16, page_size=16)
    span, rows = Span(settle_s=args.settle, measure_s=args.window), []
    for case in args.cases:
        for row in measure(site, args.products, case, span):
            rows.append(row)
            print(" ".join(f"{key} {_text(value)}" for key, value in row.items()), flush=True)
    if args.json is not None:
        write_document(
            args.json,
            "kernels_lanes",
            model=args.model,
            rows=rows,
        )
    return 0


@torch.inference_mode()
def measure(site: Site, kinds: Sequence[str], case: tuple[int, int, int], span: Span) -> Iterator[dict[str, Any]]:
    """Every kind of products, on every pair of lanes, beside the same attention."""
    num_tokens, num_requests, num_keys = case
    op = next(op for op in site.graph.layer if op.kind is OpKind.DECODE_ATTENTION)
    attention = prepare_attention(site, decode_task(op, num_requests, num_keys))
    attend = sustained(attention.work(), site.device, span)
    for kind in kinds:
        work, num_layers = products(site, kind, num_requests if kind == "head" else num_tokens)
        multiply = sustained(work, site.device, span)
        for lanes in _lanes(site.device):
            with closing(lanes[0]), closing(lanes[1]):
                yield {
                    "products": kind,
                    "tokens": num_tokens,
                    "requests": num_requests,
                    "keys": num_keys,
                    "products_us": multiply.time_s / num_layers * 1e6,
                    "attention_us": attend.time_s / attention.num_calls * 1e6,
                    **_beside(site, lanes, (work, multiply), (attention, attend), span),
                }


def products(site: Site, kind: str, num_tokens: int) -> tuple[Work, int]:
    """The products of as many layers as it takes to leave every cache, on random operands; and how many those are."""
    operations, dtype = _KINDS[kind](site.graph)
    dims = [op.dims for op in gemms(operations) if isinstance(op.dims, LinearDims)]
    num_bytes = sum(each.in_features * each.out_features for each in dims) * dtype.itemsize
    num_layers = -(-_MIN_WEIGHT_BYTES // num_bytes)
    x = {each.in_features: _random(num_tokens, each.in_features, dtype, site.device) for each in dims}
    weights = [
        [_random(each.out_features, each.in_features, dtype, site.device) for each in dims] for _ in range(num_layers)
    ]
    one = torch.ones((), device=site.device)

    def work() -> None:
        for layer in weights:
            for weight in layer:
                operand = x[weight.shape[1]]
                if dtype is torch.bfloat16:
                    torch.mm(operand, weight.t())
                else:
                    torch._scaled_mm(operand, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return work, num_layers


def _random(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn((num_rows, num_columns), device=device).to(dtype)


def _lanes(device: torch.device) -> Iterator[tuple[LaneStream, LaneStream]]:
    yield plain_stream(device), plain_stream(device)
    total = torch.cuda.get_device_properties(device).multi_processor_count
    for count in _SECOND_SMS:
        yield partition_pair(device, 1.0 - count / total)


def _beside(
    site: Site,
    lanes: tuple[LaneStream, LaneStream],
    first: tuple[Work, Sustained],
    second: tuple[Prepared, Sustained],
    span: Span,
) -> dict[str, Any]:
    """What both keep of their speed alone while both work, and the energy of that as a part of both alone."""
    prepared, attend = second
    is_part = lanes[1].mechanism is Mechanism.PARTITION
    kernels = kernels_on(prepared.workspace.model.kernels, lanes[1].num_sms) if is_part else None
    runs = [
        captured_on(lane, work, site.device)
        for lane, work in zip(lanes, (first[0], prepared.work(kernels)), strict=True)
    ]
    alone = (first[1], attend)
    counts, window = balanced_window(runs, [cost.time_s for cost in alone], site.device, span)
    kept = [cost.time_s * count / max(window.lanes_s) for cost, count in zip(alone, counts, strict=True)]
    alone_j = [cost.energy_j * count for cost, count in zip(alone, counts, strict=True) if cost.energy_j is not None]
    is_known = window.energy_j is not None and len(alone_j) == len(alone)
    return {
        "lanes": f"{lanes[0].mechanism.value} {lanes[0].num_sms}+{lanes[1].num_sms}",
        "products_keep": kept[0],
        "attention_keeps": kept[1],
        "gain": sum(kept),
        "energy": window.energy_j / sum(alone_j) if is_known and window.energy_j is not None else None,
    }


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
