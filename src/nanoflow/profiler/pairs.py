"""Two operations side by side on two lanes, and one on a part of the device: what each gets, and what both take.

Each operation is repeated back to back on its lane, as a CUDA graph captured there, for the whole window. The counts
are chosen so that both end together, in as many rounds as that takes: one that ends early leaves the device to the
other, and both would look faster than side by side. The first, shorter round settles power and clocks. What an
operation takes alone on the whole device is measured here too, at the same sizes. Collectives are left out: they need
a second GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

import torch

from nanoflow.device.detect import count_sms
from nanoflow.device.energy import energy_of
from nanoflow.executor.lanes import beside_kernels
from nanoflow.executor.streams import LaneStream, beside_pair, partition_pair, plain_stream
from nanoflow.graph.operation import Operation, OpKind
from nanoflow.kernels.dispatch import Kernels, kernels_for
from nanoflow.kernels.restricted import kernels_on
from nanoflow.plan.plan import Mechanism
from nanoflow.profile.table import PairPoint, Point
from nanoflow.profiler.alone import Prepared, per_call, prepare_attention, prepare_row, rows_workspace
from nanoflow.profiler.site import Site
from nanoflow.profiler.sustained import SPANS, Span, Sustained, Work, sustained
from nanoflow.profiler.work import ATTENTIONS, Task, decode_task, prefill_task

_PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_FIRST_TOKENS = 1024
# Products alone on a part of the device, where waves differ from size to size, and on all of it beside another, where
# those of few tokens have too few tiles.
_PRODUCT_TOKENS = (256, 512, _FIRST_TOKENS)
# Beside another also those of the halves of large batches.
_LARGE_TOKENS = (2048, 4096)
_DECODE_REQUESTS, _DECODE_CONTEXT = 340, 1280
# Lanes end together if the last one takes at most this part longer than the first; so many rounds are tried.
_BALANCED, _MAX_ROUNDS = 0.02, 4
# Of lanes on all SMs.
BESIDE_SHARE = 0.5
# SMs of the second lane, multiples of `SM_GROUP`.
SECOND_SMS = (16, 24, 32, 40, 48, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTask:
    """Two operations on two lanes; `second_sms` are the SMs of the second one's partition, None without partitions."""

    first: Task
    second: Task
    mechanism: Mechanism = Mechanism.STREAM
    second_sms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTask:
    """An operation alone on so many SMs, those of the first lane of a pair or of the second."""

    task: Task
    num_sms: int
    is_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRun:
    """Work captured on a lane.

    Attributes:
        stream: The lane's.
        replay: Queues the work once, on the current stream.
        work: What was captured; it keeps the tensors that the graph reads.
    """

    stream: torch.cuda.Stream
    replay: Callable[[], None]
    work: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What lanes did in a window.

    Attributes:
        lanes_s: From the start to the end of each lane's own work.
        energy_j: The device's, until the last lane ended; None if it has no counter.
    """

    lanes_s: tuple[float, ...]
    energy_j: float | None


def balanced_counts(counts: Sequence[int], lanes_s: Sequence[float], window_s: float) -> tuple[int, ...]:
    """How often each lane shall work to be done at about the same time, after `window_s`; at least once."""
    return tuple(max(1, math.ceil(window_s * count / lane_s)) for count, lane_s in zip(counts, lanes_s, strict=True))


def queue_order(counts: Sequence[int]) -> list[int]:
    """Lanes in the order in which their work is queued, so that all start and stay fed: by the part that is queued."""
    turns = [((turn + 0.5) / count, lane) for lane, count in enumerate(counts) for turn in range(count)]
    return [lane for _, lane in sorted(turns)]


def pair_tasks(site: Site, max_tokens: int, num_sms: int) -> list[PairTask]:
    """Products and prefill attention beside decode attention; nothing where partitions cannot be had."""
    if site.device.type != "cuda":
        return []
    num_tokens = min(_FIRST_TOKENS, max_tokens)
    attentions = {op.kind: _attention(op, max_tokens) for op in site.graph.layer if op.kind in ATTENTIONS}
    second = attentions[OpKind.DECODE_ATTENTION]
    firsts = [Task(operation=op.key, num_tokens=num_tokens) for op in site.graph.layer if op.name in _PRODUCTS]
    firsts.append(attentions[OpKind.PREFILL_ATTENTION])
    found = []
    for first in firsts:
        found.append(PairTask(first=first, second=second))
        if first.num_requests or _can_keep_products(site):
            found += [
                PairTask(first=first, second=second, mechanism=Mechanism.PARTITION, second_sms=count)
                for count in SECOND_SMS
                if count < num_sms
            ]
        if _can_keep_products(site):
            # That of the pairs before comes first: its tensors are there.
            sizes = [*reversed(_in_sizes(first)), *_larger(first, max_tokens)]
            found += [PairTask(first=each, second=second, mechanism=Mechanism.BESIDE) for each in sizes]
    return found


def part_tasks(site: Site, max_tokens: int, num_sms: int) -> list[PartTask]:
    """What the pairs on partitions do, each side alone there, products at other sizes too."""
    found = []
    for pair in pair_tasks(site, max_tokens, num_sms):
        if pair.second_sms is None:
            continue
        for first in _in_sizes(pair.first):
            found.append(PartTask(task=first, num_sms=num_sms - pair.second_sms, is_first=True))
        # Prefill attention may also run on the second lane, one after the other with decode attention.
        seconds = (pair.second, pair.first) if pair.first.num_requests else (pair.second,)
        found += [PartTask(task=second, num_sms=pair.second_sms) for second in seconds]
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


def run_window(runs: Sequence[LaneRun], counts: Sequence[int], device: torch.device) -> Window:
    """Run each lane's work so many times, all lanes at once; afterwards the device is idle."""
    torch.cuda.synchronize(device)
    with energy_of(device) as energy:
        gate = _event()
        gate.record(torch.cuda.current_stream(device))
        stops = [_event() for _ in runs]
        for run in runs:
            run.stream.wait_event(gate)
        for lane in queue_order(counts):
            with torch.cuda.stream(runs[lane].stream):
                runs[lane].replay()
        for run, stop in zip(runs, stops, strict=True):
            stop.record(run.stream)
        # Streams of another context: waiting for the device would not wait for them.
        for stop in stops:
            stop.synchronize()
        used_j = energy.used_so_far_j()
    return Window(lanes_s=tuple(gate.elapsed_time(stop) / 1e3 for stop in stops), energy_j=used_j)


def balanced_window(
    runs: Sequence[LaneRun], alone_s: Sequence[float], device: torch.device, span: Span
) -> tuple[tuple[int, ...], Window]:
    """How often each lane worked in a window at whose end all lanes end together, and the window."""
    counts = balanced_counts([1] * len(runs), [2 * time_s for time_s in alone_s], span.settle_s)
    window = run_window(runs, counts, device)
    for _ in range(_MAX_ROUNDS):
        counts = balanced_counts(counts, window.lanes_s, span.measure_s)
        window = run_window(runs, counts, device)
        if max(window.lanes_s) <= min(window.lanes_s) * (1.0 + _BALANCED):
            break
    return counts, window


@contextmanager
def captured_on(lane: LaneStream, work: Work, device: torch.device) -> Iterator[LaneRun]:
    """Work as a CUDA graph captured on a lane; the graph is gone at the end, before the SMs that it was captured on."""
    # What the host prepared for it is queued on the current stream and must be there before.
    torch.cuda.synchronize(device)
    with torch.cuda.stream(lane.stream):
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=lane.stream):
        work()
    try:
        yield LaneRun(stream=lane.stream, replay=graph.replay, work=work)
    finally:
        lane.stream.synchronize()
        graph.reset()


def _pair_point(
    site: Site, pair: PairTask, first: tuple[Prepared, Sustained], second: tuple[Prepared, Sustained], span: Span
) -> PairPoint:
    sides = (first, second)
    first_lane, second_lane = _lanes(site.device, pair)
    with closing(first_lane), closing(second_lane), ExitStack() as graphs:
        runs = [
            graphs.enter_context(captured_on(lane, work.work(_kept(site, work, lane)), site.device))
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
    total = count_sms(site.device)
    lanes = partition_pair(site.device, part.num_sms / total if part.is_first else 1.0 - part.num_sms / total)
    lane = lanes[0] if part.is_first else lanes[1]
    with closing(lanes[0]), closing(lanes[1]):
        with captured_on(lane, prepared.work(_kept(site, prepared, lane)), site.device) as run:
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
        mechanism=Mechanism.PARTITION,
        share=share,
        time_s=window.lanes_s[0] / num_calls,
        energy_j=None if window.energy_j is None else window.energy_j / num_calls,
    )


def _share(pair: PairTask, first_performance: float, sm_share: float) -> float:
    """The first one's: on plain streams what it got, beside another one half, for nobody can ask for more or less."""
    if pair.mechanism is Mechanism.PARTITION:
        return sm_share
    return BESIDE_SHARE if pair.mechanism is Mechanism.BESIDE else min(max(round(first_performance, 2), 0.01), 0.99)


def _lanes(device: torch.device, pair: PairTask) -> tuple[LaneStream, LaneStream]:
    if pair.mechanism is Mechanism.BESIDE:
        return beside_pair(device)
    if pair.second_sms is None:
        return plain_stream(device), plain_stream(device)
    return partition_pair(device, 1.0 - pair.second_sms / count_sms(device))


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


def _kept(site: Site, prepared: Prepared, lane: LaneStream) -> Kernels | None:
    """The kernels of an operation cut to its lane; None on a plain stream."""
    kernels = prepared.workspace.model.kernels
    if lane.mechanism is Mechanism.BESIDE:
        return beside_kernels(site.device, kernels, lane.num_sms)
    if lane.mechanism is Mechanism.PARTITION and _can_keep_products(site):
        return kernels_on(kernels, lane.num_sms)
    return None


def _can_keep_products(site: Site) -> bool:
    """Whether the kernels of `restricted.py` take the model: those of a fused graph do."""
    return OpKind.LINEAR_SWIGLU in kernels_for(site.device, site.dtype, site.graph.layer_operations)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
