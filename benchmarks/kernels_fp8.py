"""A layer's products in fp8 beside decode attention on two lanes: what both keep of their speed alone, with energy.

In fp8 products take about half the time and energy, so that attention is as long as they are. The engine has no such
products yet; these are cuBLAS's (e4m3, a scale a tensor), which fill every multiprocessor they may, so the lanes are
plain streams and disjoint multiprocessors. bf16 products of the same library stand beside them. From the root of the
repository, on a card with fp8 (Hopper or later); TOKENS:REQUESTS:KEYS as in `kernels_inside.py`:

    python -m benchmarks.kernels_fp8 --cases 1024:340:1280 2048:340:1280 --json kernels_fp8.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels_inside import parse_case
from nanoflow.bench.machine import detect_machine, detect_software
from nanoflow.device.lanes import LaneStream, partition_pair, plain_stream
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import LinearDims, OpKind
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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line each, write a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", metavar="PRESET", help="whose layer (default: llama-3-8b)")
    parser.add_argument(
        "--cases", nargs="+", type=parse_case, default=[(1024, 340, 1280)], metavar="TOKENS:REQUESTS:KEYS"
    )
    parser.add_argument("--settle", type=float, default=0.4, help="seconds before each window (default: 0.4)")
    parser.add_argument("--window", type=float, default=1.0, help="seconds of each window (default: 1)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (9, 0):
        parser.error("this needs a card with fp8 products: Hopper or later")
    graph = fuse_swiglu(build_graph(preset_config(args.model), None))
    site = Site(graph=graph, device=device, dtype=torch.bfloat16, page_size=16)
    span, rows = Span(settle_s=args.settle, measure_s=args.window), []
    for case in args.cases:
        for row in measure(site, case, span):
            rows.append(row)
            print(" ".join(f"{key} {_text(value)}" for key, value in row.items()), flush=True)
    if args.json is not None:
        document = {
            "benchmark": "kernels_fp8",
            "model": args.model,
            "machine": dataclasses.asdict(detect_machine()),
            "software": dataclasses.asdict(detect_software()),
            "rows": rows,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


@torch.inference_mode()
def measure(site: Site, case: tuple[int, int, int], span: Span) -> Iterator[dict[str, Any]]:
    """Both types of products, on every pair of lanes, beside the same attention."""
    num_tokens, num_requests, num_keys = case
    op = next(op for op in site.graph.layer if op.kind is OpKind.DECODE_ATTENTION)
    attention = prepare_attention(site, decode_task(op, num_requests, num_keys))
    attend = sustained(attention.work(), site.device, span)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):
        work, num_layers = products(site, num_tokens, dtype)
        multiply = sustained(work, site.device, span)
        for lanes in _lanes(site.device):
            with closing(lanes[0]), closing(lanes[1]):
                yield {
                    "type": str(dtype).removeprefix("torch."),
                    "tokens": num_tokens,
                    "requests": num_requests,
                    "keys": num_keys,
                    "products_us": multiply.time_s / num_layers * 1e6,
                    "attention_us": attend.time_s / attention.num_calls * 1e6,
                    **_beside(site, lanes, (work, multiply), (attention, attend), span),
                }


def products(site: Site, num_tokens: int, dtype: torch.dtype) -> tuple[Work, int]:
    """The products of as many layers as it takes to leave every cache, on random operands; and how many those are."""
    dims = [op.dims for op in gemms(site.graph.layer) if isinstance(op.dims, LinearDims)]
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
