"""What every picture of a timeline shows: its headline, its nano-batches, the use of each resource, and a time axis.

`drawing_svg.py` and `drawing_text.py` put that on paper and on a terminal. A timeline without a period has no times:
the places of its spans then count tokens (`order_timeline`), in units of `TOKEN_S`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import Access, depends
from nanoflow.graph.operation import Resource
from nanoflow.plan.plan import NanoOperation, PipelinePlan
from nanoflow.timeline.timeline import Span, Timeline

# How wide a token is in a timeline that has only an order; so an axis in microseconds counts tokens.
TOKEN_S = 1e-6

_NO_FASTER = "no faster"

NanoBatch = tuple[int, int]


def order_timeline(plan: PipelinePlan, graph: OpGraph | None = None, num_layers: int = 3) -> Timeline:
    """A plan as a timeline, without a profile.

    Where the plan says what search predicted, that is drawn. Otherwise only the order is: a nano-operation is as wide
    as its tokens and starts when its lane is free, what it waits for has ended and, if the graph is known, what it
    depends on too.

    Args:
        plan: Valid for the graph.
        graph: Says what bounds each operation; None leaves that open.
        num_layers: How many layers to draw.
    """
    resources = {} if graph is None else {op.name: op.resource for op in graph.layer}
    if plan.predicted_makespan_s is not None and all(_prediction(nano) for nano in plan.nano_operations):
        spans = _predicted_spans(plan, resources, num_layers)
        name = f"{plan.name}, as predicted when it was searched"
        return Timeline(name=name, spans=spans, period_s=plan.predicted_makespan_s)
    spans = _ordered_spans(plan, graph, resources, num_layers)
    return Timeline(name=f"{plan.name}, order only: as wide as its tokens", spans=spans)


def _prediction(nano: NanoOperation) -> tuple[float, float] | None:
    if nano.predicted_start_s is None or nano.predicted_end_s is None:
        return None
    return nano.predicted_start_s, nano.predicted_end_s


def _predicted_spans(plan: PipelinePlan, resources: Mapping[str, Resource], num_layers: int) -> tuple[Span, ...]:
    """Each layer a makespan after the one before, later stages that many makespans later."""
    makespan_s = plan.predicted_makespan_s or 0.0
    spans = []
    for layer, nano in plan.issue_order(num_layers):
        start_s, stop_s = _prediction(nano) or (0.0, 0.0)
        shift_s = (layer + nano.stage) * makespan_s
        if stop_s > start_s:
            spans.append(span_of(plan, nano, layer, start_s + shift_s, stop_s + shift_s, resources))
    return tuple(sorted(spans, key=lambda span: span.start_s))


def _ordered_spans(
    plan: PipelinePlan, graph: OpGraph | None, resources: Mapping[str, Resource], num_layers: int
) -> tuple[Span, ...]:
    ops = {} if graph is None else {op.name: op for op in graph.layer}
    places = {id(nano): place for place, nano in enumerate(plan.nano_operations)}
    lane_free_s: dict[str, float] = defaultdict(float)
    ended_s: dict[tuple[int, int], float] = {}
    before: list[tuple[Access, float]] = []
    spans = []
    for layer, nano in plan.issue_order(num_layers):
        period, place = layer + nano.stage, places[id(nano)]
        # What stands after it in the plan is waited for in the period before.
        waits_s = [ended_s.get((period - (wait > place), wait), 0.0) for wait in nano.waits]
        start_s = max(lane_free_s[nano.lane], *waits_s, 0.0)
        if graph is not None:
            access = Access(op=ops[nano.operation], tokens=nano.tokens, layer=layer)
            start_s = max([start_s, *(stop_s for first, stop_s in before if depends(graph, first, access))])
        stop_s = start_s + nano.tokens.num_tokens * TOKEN_S
        if graph is not None:
            before.append((access, stop_s))
        lane_free_s[nano.lane] = ended_s[period, place] = stop_s
        spans.append(span_of(plan, nano, layer, start_s, stop_s, resources))
    return tuple(sorted(spans, key=lambda span: span.start_s))


def span_of(
    plan: PipelinePlan,
    nano: NanoOperation,
    layer: int,
    start_s: float,
    stop_s: float,
    resources: Mapping[str, Resource],
) -> Span:
    """A nano-operation of a plan at a time; `resources` says what bounds the operations, as far as known."""
    return Span(
        operation=nano.operation,
        layer=layer,
        start_token=nano.start,
        stop_token=nano.stop,
        lane=nano.lane,
        resource=resources.get(nano.operation),
        share=next(lane.share for lane in plan.lanes if lane.name == nano.lane),
        start_s=start_s,
        stop_s=stop_s,
    )


def check(timelines: Sequence[Timeline]) -> None:
    """`ValueError` if there is nothing to draw."""
    if not timelines or not all(any(span.stop_s > span.start_s for span in line.spans) for line in timelines):
        raise ValueError("nothing to draw: a timeline needs a nano-operation that takes time")


def headline(timeline: Timeline, sequential_s: float | None) -> str:
    """One line: the name, and a layer's makespan against that of its operations one after the other."""
    if timeline.period_s is None:
        return timeline.name
    line = f"{timeline.name}: {timeline.period_s * 1e6:,.1f} us a layer"
    if sequential_s is None:
        return line
    words = faster_or_slower(sequential_s / timeline.period_s)
    than = "as fast as" if words == _NO_FASTER else f"{words} than"
    return f"{line}, {than} one after the other ({sequential_s * 1e6:,.1f} us)"


def faster_or_slower(gain: float) -> str:
    """A ratio of speeds in words: 1.1 is 10.0 % faster, 0.9 is 10.0 % slower."""
    percent = abs(gain - 1.0) * 100
    if round(percent, 1) == 0:
        return _NO_FASTER
    return f"{percent:.1f} % {'faster' if gain > 1 else 'slower'}"


def nano_batches(timelines: Sequence[Timeline]) -> dict[NanoBatch, int]:
    """Every token range in the pictures, numbered in order of its tokens."""
    found = {nano_batch(span) for timeline in timelines for span in timeline.spans}
    return {tokens: number for number, tokens in enumerate(sorted(found))}


def nano_batch(span: Span) -> NanoBatch:
    """Its tokens."""
    return span.start_token, span.stop_token


def resources_used(timelines: Sequence[Timeline]) -> list[Resource]:
    """Those to draw a curve of: compute and memory wherever anything is known, the network where it is used."""
    found = {span.resource for timeline in timelines for span in timeline.spans} - {None}
    always = {Resource.COMPUTE, Resource.MEMORY} if found else set()
    return [resource for resource in Resource if resource in found | always]


def use_steps(timeline: Timeline, resource: Resource) -> list[tuple[float, float]]:
    """Sum of the shares that run of operations bound by a resource: (time, what holds from then on), from 0 on."""
    changes: dict[float, float] = defaultdict(float, {0.0: 0.0})
    for span in timeline.spans:
        if span.resource is resource:
            changes[span.start_s] += span.share
            changes[span.stop_s] -= span.share
    steps, level = [], 0.0
    for time_s in sorted(changes):
        # Sums of shares that have all ended leave rounding errors.
        level = max(round(level + changes[time_s], 9), 0.0)
        steps.append((time_s, level))
    return steps


def full_s(timeline: Timeline, timelines: Sequence[Timeline]) -> float:
    """Length of the axis: that of the longest timeline, counted in time like this one, or in tokens."""
    is_timed = timeline.period_s is not None
    return max(other.duration_s for other in timelines if (other.period_s is not None) == is_timed)


def unit(timeline: Timeline) -> str:
    """What the axis counts."""
    return "tokens" if timeline.period_s is None else "us"


def ticks_us(length_s: float, most: int) -> list[float]:
    """At most so many round places, two or more, on an axis from 0 to `length_s`, in microseconds."""
    length_us = length_s * 1e6
    least = length_us / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    return [round(number * step, 9) for number in range(math.floor(length_us / step * (1 + 1e-9)) + 1)]


def label(operation: str, room: int) -> str:
    """The operation's name in so many characters: whole, else its abbreviation, else nothing; never cut."""
    return next((name for name in (operation, abbreviation(operation)) if len(name) <= room), "")


def abbreviation(operation: str) -> str:
    """The first letters of the name's parts; of a name of one part the first three."""
    parts = [part for part in operation.split("_") if part]
    return "".join(part[0] for part in parts) if len(parts) > 1 else operation[:3]


def abbreviations(labels: Mapping[str, str]) -> dict[str, str]:
    """What a legend explains: of labels drawn, each with its operation, those that are not the name; in order."""
    return {short: name for short, name in sorted(labels.items()) if short and short != name}


def shares(timelines: Sequence[Timeline]) -> dict[str, float]:
    """The part of the device that each lane is given, where that is not all of it."""
    return {span.lane: span.share for line in timelines for span in line.spans if 0 < span.share < 1}


SHARE_LEGEND = "R: part of the device that a lane is given"
USE_LEGEND = "sum of the parts of the device that are in use by operations which it bounds"
