"""Decode attention inside the products of a layer, against both one after the other; sustained, with energy.

A line has the time of the engine's kernels for a layer's products and for the attention, their sum, and the time with
the attention inside the products (`kernels/hopper/carry.py`), for a number of k-steps of a product to one block of 64
keys. A line without keys has products that could carry, with nothing to carry. With `--quantization fp8` products
multiply FP8, as the engine with that option does. Needs a Hopper card. TOKENS:REQUESTS:KEYS are the tokens of the
products, and the number of decodes and keys of each decode, one nano-batch beside the other. From the root of the
repository:

    python -m benchmarks.kernels.inside --quantization none fp8 --cases 512:170:1280 1024:340:1280 2048:680:1280 \\
        --steps 2 3 4 --json kernels_inside.json
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.hopper import can_carry
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.profile.carry import PRODUCTS
from nanoflow.profiler.carry import CarryCosts, CarryTask, measure_costs
from nanoflow.profiler.site import Site, gemms
from nanoflow.profiler.sustained import Span, Sustained
from nanoflow.profiler.work import decode_task


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line: times in us and energies in mJ of one layer.

    Attributes:
        quantization: Type of the products' factors: "none" (16 bits) or "fp8".
        products: "products" for all of a layer, or one of them.
        tokens: Of the products.
        requests, keys: Decodes, and keys of each; `keys` is 0 where the products have nothing to carry.
        steps: K-steps to a block of keys.
        gain: Time of both, one after the other, in times of both together.
    """

    quantization: str
    products: str
    tokens: int
    requests: int
    keys: int
    steps: int
    products_us: float
    attention_us: float
    together_us: float
    gain: float
    apart_mj: float | None
    together_mj: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each way, and write the record."""
    parser = CommandParser(prog="python -m benchmarks.kernels.inside", description=__doc__)
    parser.add_argument("--model", default="llama-3-8b", metavar="PRESET", help="whose layer (default: llama-3-8b)")
    parser.add_argument("--quantization", nargs="+", choices=["none", "fp8"], default=["none"], help="of products")
    parser.add_argument(
        "--cases", nargs="+", type=parse_case, default=[(1024, 340, 1280)], metavar="TOKENS:REQUESTS:KEYS"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[4], help="k-steps to a block of keys (default: 4)")
    parser.add_argument("--each", action="store_true", help="also each product with nothing to carry")
    parser.add_argument("--settle", type=float, default=0.4, help="seconds before each window (default: 0.4)")
    parser.add_argument("--window", type=float, default=1.0, help="seconds of each window (default: 1)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    sites = {name: site_of(args.model, is_fp8=name == "fp8") for name in args.quantization}
    if not torch.cuda.is_available() or not all(
        can_carry(site.device, site.dtype, kind.attention) for site in sites.values() for kind in site.graph.kinds
    ):
        parser.error("this needs a Hopper card, and heads of 64 or 128 without a window")
    span, rows = Span(settle_s=args.settle, measure_s=args.window), list[Row]()
    print(_line("products", "tokens", "requests", "keys", "steps", "alone us", "attention", "together", "gain", "mJ"))
    for name, site in sites.items():
        for task in tasks_of(site, args.cases, args.steps, has_each=args.each):
            rows.append(row_of(name, task, measure_costs(site, task, span)))
            print(shown(rows[-1]), flush=True)
    if args.json is not None:
        write_document(args.json, "kernels_inside", model=args.model, rows=[dataclasses.asdict(row) for row in rows])
    return 0


def parse_case(text: str) -> tuple[int, int, int]:
    """Numbers of TOKENS:REQUESTS:KEYS."""
    try:
        num_tokens, num_requests, num_keys = (int(part) for part in text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKENS:REQUESTS:KEYS") from error
    return num_tokens, num_requests, num_keys


def site_of(model: str, *, is_fp8: bool) -> Site:
    """A preset's graph as it is served on a Hopper card."""
    graph = build_graph(preset_config(model), None)
    return Site(
        graph=fuse_swiglu(in_fp8(graph) if is_fp8 else graph),
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        page_size=16,
    )


def tasks_of(
    site: Site, cases: Sequence[tuple[int, int, int]], steps: Sequence[int], *, has_each: bool
) -> Iterator[CarryTask]:
    """For each case, products with nothing to carry, and with the attention at each number of steps."""
    attention = next(op for op in site.graph.layer if op.kind is OpKind.DECODE_ATTENTION)
    names = (PRODUCTS, *(op.name for op in gemms(site.graph.layer) if has_each))
    for num_tokens, num_requests, num_keys in cases:
        keys = decode_task(attention, num_requests, num_keys)
        for name in names:
            yield CarryTask(num_tokens=num_tokens, steps=steps[-1], attention=keys, products=name, is_empty=True)
        for each in steps:
            yield CarryTask(num_tokens=num_tokens, steps=each, attention=keys)


def row_of(quantization: str, task: CarryTask, costs: CarryCosts) -> Row:
    """What was measured of a task."""
    alone = [cost for cost in (costs.products, costs.attention) if cost is not None]
    energies_j = [cost.energy_j for cost in alone if cost.energy_j is not None]
    return Row(
        quantization=quantization,
        products=task.products,
        tokens=task.num_tokens,
        requests=0 if task.is_empty else task.attention.num_requests,
        keys=0 if task.is_empty else round(task.context),
        steps=task.steps,
        products_us=costs.products.time_s * 1e6,
        attention_us=0.0 if costs.attention is None else costs.attention.time_s * 1e6,
        together_us=costs.together.time_s * 1e6,
        gain=sum(cost.time_s for cost in alone) / costs.together.time_s,
        apart_mj=sum(energies_j) * 1e3 if len(energies_j) == len(alone) else None,
        together_mj=_energy_mj(costs.together),
    )


def shown(row: Row) -> str:
    """The line of a row."""
    energies = [row.apart_mj, row.together_mj]
    text = " to ".join("-" if energy_mj is None else f"{energy_mj:.0f}" for energy_mj in energies)
    times = (row.products_us, row.attention_us, row.together_us)
    name = f"{row.products} {'' if row.quantization == 'none' else row.quantization}"
    return _line(
        name, row.tokens, row.requests, row.keys, row.steps, *(f"{time:.1f}" for time in times), f"{row.gain:.3f}", text
    )


def _energy_mj(cost: Sustained) -> float | None:
    return None if cost.energy_j is None else cost.energy_j * 1e3


def _line(*cells: object) -> str:
    widths = (-18, 7, 9, 6, 6, 10, 10, 10, 7, 12)
    pairs = zip(cells, widths, strict=True)
    return "".join(str(cell).ljust(-width) if width < 0 else str(cell).rjust(width) for cell, width in pairs)


if __name__ == "__main__":
    sys.exit(main())
