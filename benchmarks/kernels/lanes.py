"""Two kinds of work on two lanes: the part of its speed alone that each keeps beside the other; sustained, with energy.

It measures kinds of work that are not in a profile, to find where overlap could pay beyond what the engine does. On the
first lane: `products` of a layer; the same in `fp8` (e4m3, one scale a tensor: half the time and energy, so that
attention is as long as they are); the language-model `head` on one row for each decode, which could run beside the
first layers of the next iteration; or `prefill` attention. On the second lane: decode `attention`, a `norm` of the same
number of tokens, or a `copy` of keys and values to the host. Products are cuBLAS's, which fill all SMs that they may
use. So the lanes are plain streams, and disjoint SMs; a copy needs no SMs. Needs a Hopper card or a later one.
TOKENS:REQUESTS:KEYS as in `inside.py`. From the root of the repository:

    python -m benchmarks.kernels.lanes --cases 1024:340:1280 2048:340:1280 --json kernels_lanes.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.document import write_document
from benchmarks.kernels.inside import parse_case
from nanoflow.cli.options import CommandParser
from nanoflow.executor.streams import LaneStream, partition_pair, plain_stream
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import LinearDims, Operation, OpKind
from nanoflow.kernels.restricted import kernels_on
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import KernelNeed
from nanoflow.profiler.alone import Prepared, prepare_attention, prepare_row, rows_workspace
from nanoflow.profiler.site import Site, gemms
from nanoflow.profiler.sustained import Span, Sustained, Work, sustained
from nanoflow.profiler.windows import balanced_window, captured_on
from nanoflow.profiler.work import decode_task, prefill_task

# Bytes of weights used in turn, several times any cache; and bytes of one copy.
_MIN_WEIGHT_BYTES, _COPY_BYTES = 512 << 20, 64 << 20
_SECOND_SMS = (24, 32, 48, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sizes: tokens of the first lane; number of decodes of the second, and keys of each decode."""

    num_tokens: int
    num_requests: int
    num_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Work for a lane.

    Attributes:
        work_on: Makes the work, restricted to the lane's SMs if it has SMs of its own.
        num_calls: Layers that a call of the work runs through.
        needs_sms: Whether it runs on SMs; a copy does not.
    """

    work_on: Callable[[LaneStream | None], Work]
    num_calls: int
    needs_sms: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each pair, and write the record."""
    parser = CommandParser(prog="python -m benchmarks.kernels.lanes", description=__doc__)
    parser.add_argument("--model", default="llama-3-8b", metavar="PRESET", help="whose layer (default: llama-3-8b)")
    parser.add_argument(
        "--cases", nargs="+", type=parse_case, default=[(1024, 340, 1280)], metavar="TOKENS:REQUESTS:KEYS"
    )
    parser.add_argument("--first", nargs="+", choices=FIRST, default=list(FIRST), help="default: all")
    parser.add_argument("--second", nargs="+", choices=SECOND, default=list(SECOND), help="default: all")
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
    for num_tokens, num_requests, num_keys in args.cases:
        case = Case(num_tokens=num_tokens, num_requests=num_requests, num_keys=num_keys)
        for first in args.first:
            for row in measure(site, first, args.second, case, span):
                rows.append({"tokens": num_tokens, "requests": num_requests, "keys": num_keys, **row})
                print(" ".join(f"{key} {_text(value)}" for key, value in rows[-1].items()), flush=True)
    if args.json is not None:
        write_document(args.json, "kernels_lanes", model=args.model, rows=rows)
    return 0


@torch.inference_mode()
def measure(site: Site, first: str, seconds: Sequence[str], case: Case, span: Span) -> Iterator[dict[str, Any]]:
    """Measure one kind of first work beside each kind of second work, on every pair of lanes."""
    one = FIRST[first](site, case)
    one_alone = sustained(one.work_on(None), site.device, span)
    for second in seconds:
        two = SECOND[second](site, case)
        two_alone = sustained(two.work_on(None), site.device, span)
        for lanes in _lanes(site.device, is_divided=two.needs_sms):
            with closing(lanes[0]), closing(lanes[1]):
                yield {
                    "first": first,
                    "second": second,
                    "first_us": one_alone.time_s / one.num_calls * 1e6,
                    "second_us": two_alone.time_s / two.num_calls * 1e6,
                    "lanes": f"{lanes[0].mechanism.value} {lanes[0].num_sms}+{lanes[1].num_sms}",
                    **_beside(site, lanes, (one, two), (one_alone, two_alone), span),
                }


def _beside(
    site: Site,
    lanes: tuple[LaneStream, LaneStream],
    sides: tuple[Side, Side],
    alone: tuple[Sustained, Sustained],
    span: Span,
) -> dict[str, Any]:
    """The part of its speed alone that each side keeps, and the energy of both / the sum of their energies alone."""
    with ExitStack() as graphs:
        runs = [
            graphs.enter_context(captured_on(lane, side.work_on(lane), site.device))
            for lane, side in zip(lanes, sides, strict=True)
        ]
        counts, window = balanced_window(runs, [cost.time_s for cost in alone], site.device, span)
    kept = [cost.time_s * count / max(window.lanes_s) for cost, count in zip(alone, counts, strict=True)]
    alone_j = [cost.energy_j * count for cost, count in zip(alone, counts, strict=True) if cost.energy_j is not None]
    is_known = window.energy_j is not None and len(alone_j) == len(alone)
    return {
        "first_keeps": kept[0],
        "second_keeps": kept[1],
        "gain": sum(kept),
        "energy": window.energy_j / sum(alone_j) if is_known and window.energy_j is not None else None,
    }


def _lanes(device: torch.device, *, is_divided: bool) -> Iterator[tuple[LaneStream, LaneStream]]:
    yield plain_stream(device), plain_stream(device)
    if not is_divided:
        return
    total = torch.cuda.get_device_properties(device).multi_processor_count
    for count in _SECOND_SMS:
        yield partition_pair(device, 1.0 - count / total)


def _prepared(prepared: Prepared) -> Side:
    """An operation with the engine's kernels."""

    def work_on(lane: LaneStream | None) -> Work:
        if lane is None or lane.mechanism.traits.kernels is not KernelNeed.FOR_SMS:
            return prepared.work()
        return prepared.work(kernels_on(prepared.workspace.model.kernels, lane.num_sms))

    return Side(work_on=work_on, num_calls=prepared.num_calls)


def _operation(site: Site, kind: OpKind) -> Operation:
    return next(op for op in site.graph.layer if op.kind is kind)


def _decode(site: Site, case: Case) -> Side:
    task = decode_task(_operation(site, OpKind.DECODE_ATTENTION), case.num_requests, case.num_keys)
    return _prepared(prepare_attention(site, task))


def _prefill(site: Site, case: Case) -> Side:
    task = prefill_task(_operation(site, OpKind.PREFILL_ATTENTION), case.num_tokens, 0, case.num_tokens)
    return _prepared(prepare_attention(site, task))


def _norm(site: Site, case: Case) -> Side:
    return _prepared(prepare_row(site, rows_workspace(site, case.num_tokens), "ffn_norm", case.num_tokens))


def _copy(site: Site, _case: Case) -> Side:
    """A copy to pinned memory, as keys and values leave for the host."""
    source = torch.randn(_COPY_BYTES // 4, device=site.device)
    target = torch.empty(source.shape, pin_memory=site.device.type == "cuda")

    def work() -> None:
        target.copy_(source, non_blocking=True)

    return Side(work_on=lambda _lane: work, num_calls=1, needs_sms=False)


def _products(site: Site, operations: Sequence[Operation], num_rows: int, dtype: torch.dtype) -> Side:
    """Products on random operands, in as many layers as exceed every cache."""
    dims = [op.dims for op in gemms(operations) if isinstance(op.dims, LinearDims)]
    num_bytes = sum(each.in_features * each.out_features for each in dims) * dtype.itemsize
    x = {each.in_features: _random(num_rows, each.in_features, dtype, site.device) for each in dims}
    weights = [
        [_random(each.out_features, each.in_features, dtype, site.device) for each in dims]
        for _ in range(-(-_MIN_WEIGHT_BYTES // num_bytes))
    ]
    one = torch.ones((), device=site.device)

    def work() -> None:
        for weight in (weight for layer in weights for weight in layer):
            operand = x[weight.shape[1]]
            if dtype is torch.bfloat16:
                torch.mm(operand, weight.t())
            else:
                torch._scaled_mm(operand, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return Side(work_on=lambda _lane: work, num_calls=len(weights))


def _random(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn((num_rows, num_columns), device=device).to(dtype)


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


FIRST: dict[str, Callable[[Site, Case], Side]] = {
    "products": lambda site, case: _products(site, site.graph.layer, case.num_tokens, torch.bfloat16),
    "fp8": lambda site, case: _products(site, site.graph.layer, case.num_tokens, torch.float8_e4m3fn),
    "head": lambda site, case: _products(site, site.graph.epilogue, case.num_requests, torch.bfloat16),
    "prefill": _prefill,
}
SECOND: dict[str, Callable[[Site, Case], Side]] = {"attention": _decode, "norm": _norm, "copy": _copy}


if __name__ == "__main__":
    sys.exit(main())
