"""Two operations side by side on two lanes, and one on a part of the device: what each gets, and what both take.

Both work for a whole window and end together (`windows.py`). What an operation takes alone on the whole device is
measured here too, at the same sizes. Collectives are left out, as they need a second GPU. What is measured of a
mechanism follows from its description (`plan/mechanisms.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch

from nanoflow.device.detect import count_sms
from nanoflow.executor.lanes import lane_kernels
from nanoflow.executor.streams import LaneStream, beside_pair, partition_pair, plain_stream
from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.operation import Operation, OpKind
from nanoflow.kernels.dispatch import Kernels, are_capturable, kernels_for
from nanoflow.plan.mechanisms import KernelNeed, Measured, Mechanism, Opening, ShareOrigin
from nanoflow.profile.table import PairPoint, Point
from nanoflow.profiler.alone import Prepared, per_call, prepare_attention, prepare_row, rows_workspace
from nanoflow.profiler.site import Site
from nanoflow.profiler.sustained import SPANS, Span, Sustained, sustained
from nanoflow.profiler.windows import balanced_counts, balanced_window, captured_on, run_window
from nanoflow.profiler.work import ATTENTIONS, Task, decode_task, prefill_task

_PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "experts_in", "experts_out")
_FIRST_TOKENS = 1024
# Products alone on a part of the device, where waves differ from size to size, and on all of it beside another, where
# those of few tokens have too few tiles.
_PRODUCT_TOKENS = (256, 512, _FIRST_TOKENS)
# Beside another also those of the halves of large batches.
_LARGE_TOKENS = (2048, 4096)
_DECODE_REQUESTS, _DECODE_CONTEXT = 340, 1280
# SMs of a second lane whose share can be asked for, multiples of `SM_GROUP`.
SECOND_SMS = (16, 24, 32, 40, 48, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTask:
    """Two operations on two lanes; `second_sms` are the SMs of the second lane, None where both have all SMs."""

    first: Task
    second: Task
    mechanism: Mechanism
    second_sms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTask:
    """An operation alone on so many SMs, those of the first lane of a pair or of the second."""

    task: Task
    mechanism: Mechanism
    num_sms: int
    is_first: bool = False


def pair_tasks(site: Site, max_tokens: int, num_sms: int) -> list[PairTask]:
    """Products and prefill attention beside decode attention; nothing without an NVIDIA GPU."""
    if site.device.type != "cuda":
        return []
    num_tokens = min(_FIRST_TOKENS, max_tokens)
    attentions = {op.kind: _attention(op, max_tokens) for op in site.graph.layer if op.kind in ATTENTIONS}
    second = attentions[OpKind.DECODE_ATTENTION]
    products = [op for op in site.graph.layer if op.name in _PRODUCTS and _can_be_captured(site, op)]
    firsts = [Task(operation=op.key, num_tokens=num_tokens) for op in products]
    firsts.append(attentions[OpKind.PREFILL_ATTENTION])
    return [
        PairTask(first=each, second=second, mechanism=mechanism, second_sms=second_sms)
        for first in firsts
        for mechanism in Mechanism
        if mechanism.traits.measured is Measured.PAIRS and _has_kernels(site, first, mechanism.traits.kernels)
        for each in _sizes(first, max_tokens, mechanism)
        for second_sms in _second_sms(num_sms, mechanism)
    ]


def _can_be_captured(site: Site, op: Operation) -> bool:
    """Whether the work of a lane can be a CUDA graph; the reference kernels of experts cannot."""
    if not isinstance(op.dims, ExpertDims):
        return True
    return are_capturable(kernels_for(site.device, site.dtype, site.graph.layer_operations), (op,))


def _has_kernels(site: Site, first: Task, need: KernelNeed) -> bool:
    """Whether the pair has kernels as the lanes need them; only products of some models lack them."""
    is_attention = bool(first.num_requests)
    return need is KernelNeed.ANY or (need is KernelNeed.FOR_SMS and is_attention) or _can_cut_products(site)


def _sizes(first: Task, max_tokens: int, mechanism: Mechanism) -> list[Task]:
    """The first operation at every size that pairs have; at its own size first, whose tensors are there already."""
    if not mechanism.traits.is_by_size:
        return [first]
    return [*reversed(_in_sizes(first)), *_larger(first, max_tokens)]


def _second_sms(num_sms: int, mechanism: Mechanism) -> list[int | None]:
    """SMs of the second lane, one number for each share that can be asked for; None where there is no choice."""
    if mechanism.traits.share_origin is not ShareOrigin.ASKED_FOR:
        return [None]
    return [count for count in SECOND_SMS if count < num_sms]


def part_tasks(site: Site, max_tokens: int, num_sms: int) -> list[PartTask]:
    """Where operations keep their share: both sides of every pair alone on theirs, products at smaller sizes too."""
    found = []
    for pair in pair_tasks(site, max_tokens, num_sms):
        if pair.second_sms is None or not pair.mechanism.traits.keeps_share:
            continue
        for first in _in_sizes(pair.first):
            first_sms = num_sms - pair.second_sms
            found.append(PartTask(task=first, mechanism=pair.mechanism, num_sms=first_sms, is_first=True))
        # Prefill attention may also run on the second lane, one after the other with decode attention.
        seconds = (pair.second, pair.first) if pair.first.num_requests else (pair.second,)
        found += [PartTask(task=second, mechanism=pair.mechanism, num_sms=pair.second_sms) for second in seconds]
    # Those of one operation and size one after the other: they share their tensors.
    order = list(dict.fromkeys(part.task for part in found))
    return sorted(dict.fromkeys(found), key=lambda part: order.index(part.task))


def _in_sizes(task: Task) -> list[Task]:
    """A product of fewer tokens, and of its own; attention has one size."""
    smaller = [count for count in _PRODUCT_TOKENS if count < task.num_tokens and not task.num_requests]
    return [*(replace(task, num_tokens=count) for count in smaller), task]


def _larger(task: Task, max_tokens: int) -> list[Task]:
    """A product of the halves of larger batches within the budget; attention has one size."""
    if task.num_requests:
        return []
    return [replace(task, num_tokens=count) for count in _LARGE_TOKENS if count <= largest_half(max_tokens)]


def largest_half(max_tokens: int) -> int:
    """Tokens of the largest nano-batch worth a pair: half of the token budget; of a small one all of it."""
    return max(max_tokens // 2, min(max_tokens, _FIRST_TOKENS))


@torch.inference_mode()
def measure_pairs(site: Site, wanted: Collection[PairTask], span: Span | None = None) -> Iterator[PairPoint]:
    """The point of each pair, as soon as it is known; pairs of the same operations share their tensors."""
    span = span or SPANS["cuda"]
    prepared: dict[Task, tuple[Prepared, Sustained]] = {}
    for pair in wanted:
        # Tensors of one pair at a time: keys of many requests are gigabytes.
        prepared = {task: known for task, known in prepared.items() if task in (pair.first, pair.second)}
        for task in (pair.first, pair.second):
            if task not in prepared:
                work = _prepare(site, task)
                prepared[task] = work, per_call(sustained(work.work(), site.device, span), work.num_calls)
        yield _pair_point(site, pair, prepared[pair.first], prepared[pair.second], span)


@torch.inference_mode()
def measure_parts(site: Site, wanted: Collection[PartTask], span: Span | None = None) -> Iterator[Point]:
    """The point of each operation on a part of the device, as soon as it is known."""
    span = span or SPANS["cuda"]
    task, prepared = None, None
    for part in wanted:
        if prepared is None or task != part.task:
            prepared = None
            task, prepared = part.task, _prepare(site, part.task)
        yield _part_point(site, part, prepared, span)


def _pair_point(
    site: Site, pair: PairTask, first: tuple[Prepared, Sustained], second: tuple[Prepared, Sustained], span: Span
) -> PairPoint:
    sides = (first, second)
    first_lane, second_lane = _lanes(site.device, pair.mechanism, pair.second_sms)
    with closing(first_lane), closing(second_lane), ExitStack() as graphs:
        runs = [
            graphs.enter_context(captured_on(lane, work.work(_kernels(site, work, lane)), site.device))
            for lane, (work, _) in zip((first_lane, second_lane), sides, strict=True)
        ]
        alone_s = [known.time_s * work.num_calls for work, known in sides]
        counts, window = balanced_window(runs, alone_s, site.device, span)
        share = first_lane.share
    # Of the whole window: what is left of imbalance counts against the pair.
    performances = [time_s * count / max(window.lanes_s) for time_s, count in zip(alone_s, counts, strict=True)]
    alone_j = [
        None if known.energy_j is None else known.energy_j * work.num_calls * count
        for (work, known), count in zip(sides, counts, strict=True)
    ]
    known_j = [energy_j for energy_j in alone_j if energy_j is not None]
    is_known = window.energy_j is not None and len(known_j) == len(alone_j)
    return PairPoint(
        first=pair.first.operation,
        second=pair.second.operation,
        first_tokens=pair.first.num_tokens,
        second_tokens=pair.second.num_tokens,
        second_context=pair.second.context,
        mechanism=pair.mechanism,
        share=_share(pair, performances[0], share),
        first_performance=performances[0],
        second_performance=performances[1],
        energy_ratio=window.energy_j / sum(known_j) if is_known and window.energy_j is not None else None,
        power_w=None if window.energy_j is None else window.energy_j / max(window.lanes_s),
    )


def _part_point(site: Site, part: PartTask, prepared: Prepared, span: Span) -> Point:
    second_sms = count_sms(site.device) - part.num_sms if part.is_first else part.num_sms
    lanes = _lanes(site.device, part.mechanism, second_sms)
    lane = lanes[0] if part.is_first else lanes[1]
    with closing(lanes[0]), closing(lanes[1]):
        with captured_on(lane, prepared.work(_kernels(site, prepared, lane)), site.device) as run:
            once = run_window((run,), (1,), site.device)
            counts = balanced_counts((1,), once.lanes_s, span.settle_s)
            settled = run_window((run,), counts, site.device)
            (count,) = balanced_counts(counts, settled.lanes_s, span.measure_s)
            window = run_window((run,), (count,), site.device)
        num_calls, share = count * prepared.num_calls, lane.share
    return Point(
        operation=part.task.operation,
        num_tokens=part.task.num_tokens,
        context=part.task.context,
        mechanism=part.mechanism,
        share=share,
        time_s=window.lanes_s[0] / num_calls,
        energy_j=None if window.energy_j is None else window.energy_j / num_calls,
    )


def _share(pair: PairTask, first_performance: float, sm_share: float) -> float:
    """The first operation's share: its lane's part of the SMs, half of the device, or what it kept of its speed."""
    found: dict[ShareOrigin, float] = {
        ShareOrigin.ASKED_FOR: sm_share,
        ShareOrigin.HALF: 0.5,
        ShareOrigin.RESULT: min(max(round(first_performance, 2), 0.01), 0.99),
    }
    return found[pair.mechanism.traits.share_origin]


def _lanes(device: torch.device, mechanism: Mechanism, second_sms: int | None) -> tuple[LaneStream, LaneStream]:
    first_share = 1.0 - (second_sms or 0) / count_sms(device)
    openers: dict[Opening, Callable[[], tuple[LaneStream, LaneStream]]] = {
        Opening.OWN_STREAM: lambda: (plain_stream(device), plain_stream(device)),
        Opening.OWN_SMS: lambda: partition_pair(device, first_share),
        Opening.SHARED_SMS: lambda: beside_pair(device),
    }
    return openers[mechanism.traits.opening]()


def _prepare(site: Site, task: Task) -> Prepared:
    if task.num_requests:
        return prepare_attention(site, task)
    return prepare_row(site, rows_workspace(site, task.num_tokens), task.operation, task.num_tokens)


def _attention(op: Operation, max_tokens: int) -> Task:
    """The attention of the pairs."""
    if op.kind is OpKind.DECODE_ATTENTION:
        return decode_task(op, min(_DECODE_REQUESTS, max_tokens), _DECODE_CONTEXT)
    num_tokens = min(_FIRST_TOKENS, max_tokens)
    return prefill_task(op, num_tokens, 0, num_tokens)


def _kernels(site: Site, prepared: Prepared, lane: LaneStream) -> Kernels | None:
    """The kernels of an operation as its lane runs them; None: those that it has anyway."""
    need = lane.mechanism.traits.kernels
    if need is KernelNeed.ANY or (need is KernelNeed.FOR_SMS and not _can_cut_products(site)):
        return None
    return lane_kernels(need, site.device, prepared.workspace.model.kernels, lane.num_sms)


def _can_cut_products(site: Site) -> bool:
    """Whether there are products for a part of the device; a model has them if its graph is fused."""
    return OpKind.LINEAR_SWIGLU in kernels_for(site.device, site.dtype, site.graph.layer_operations)
