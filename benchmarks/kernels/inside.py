"""Decode attention inside the products of a layer, against both one after the other; sustained, with energy.

The first line has the time of the engine's kernels for a layer's products and for the attention, in sum. Each further
line has the time with the attention inside the products (`kernels/hopper/carry.py`), for a number of k-steps of a
product to one block of 64 keys. Needs a Hopper card. TOKENS:REQUESTS:KEYS are the tokens of the products, and the
number of decodes and keys of each decode, one nano-batch beside the other. From the root of the repository:

    python -m benchmarks.kernels.inside --cases 1024:340:1280 512:500:1024 --steps 2 4 8 --json kernels_inside.json
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.hopper import can_carry
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.profiler.carry import CarryTask, measure_costs
from nanoflow.profiler.site import Site
from nanoflow.profiler.sustained import Span, Sustained
from nanoflow.profiler.work import decode_task


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each way, and write the record."""
    parser = CommandParser(prog="python -m benchmarks.kernels.inside", description=__doc__)
    parser.add_argument("--model", default="llama-3-8b", metavar="PRESET", help="whose layer (default: llama-3-8b)")
    parser.add_argument(
        "--cases", nargs="+", type=parse_case, default=[(1024, 340, 1280)], metavar="TOKENS:REQUESTS:KEYS"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[4], help="k-steps to a block of keys (default: 4)")
    parser.add_argument("--settle", type=float, default=0.4, help="seconds before each window (default: 0.4)")
    parser.add_argument("--window", type=float, default=1.0, help="seconds of each window (default: 1)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    device = torch.device("cuda", 0)
    site = Site(
        graph=fuse_swiglu(build_graph(preset_config(args.model), None)),
        device=device,
        dtype=torch.bfloat16,
        page_size=16,
    )
    if not torch.cuda.is_available() or not all(
        can_carry(device, site.dtype, kind.attention) for kind in site.graph.kinds
    ):
        parser.error("this needs a Hopper card, and heads of 64 or 128 without a window")
    attention = next(op for op in site.graph.layer if op.kind is OpKind.DECODE_ATTENTION)
    rows = []
    for num_tokens, num_requests, num_keys in args.cases:
        for steps in args.steps:
            task = CarryTask(
                num_tokens=num_tokens, steps=steps, attention=decode_task(attention, num_requests, num_keys)
            )
            costs = measure_costs(site, task, Span(settle_s=args.settle, measure_s=args.window))
            assert costs.attention is not None
            apart_s = costs.products.time_s + costs.attention.time_s
            row = {
                "tokens": num_tokens,
                "requests": num_requests,
                "keys": num_keys,
                "steps": steps,
                **{field.name: _cost(getattr(costs, field.name)) for field in dataclasses.fields(costs)},
                "gain": apart_s / costs.together.time_s,
            }
            rows.append(row)
            print(
                f"{num_tokens} tokens, {num_requests} x {num_keys} keys, {steps} steps: "
                + ", ".join(f"{field.name} {_text(getattr(costs, field.name))}" for field in dataclasses.fields(costs))
                + f": {row['gain']:.3f}x",
                flush=True,
            )
    if args.json is not None:
        write_document(args.json, "kernels_inside", model=args.model, rows=rows)
    return 0


def parse_case(text: str) -> tuple[int, int, int]:
    """Numbers of TOKENS:REQUESTS:KEYS."""
    try:
        num_tokens, num_requests, num_keys = (int(part) for part in text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKENS:REQUESTS:KEYS") from error
    return num_tokens, num_requests, num_keys


def _cost(cost: Sustained) -> dict[str, float | None]:
    return {"time_us": cost.time_s * 1e6, "energy_mj": None if cost.energy_j is None else cost.energy_j * 1e3}


def _text(cost: Sustained) -> str:
    energy = "" if cost.energy_j is None else f" {cost.energy_j * 1e3:.0f} mJ"
    return f"{cost.time_s * 1e6:.1f} us{energy}"


if __name__ == "__main__":
    sys.exit(main())
