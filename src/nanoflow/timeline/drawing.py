"""Contents of every picture of a timeline: headline, nano-batches, use of each resource, and time axis.

`drawing_svg.py` and `drawing_text.py` draw them. A timeline without a period has no times: positions then count tokens
(`order_timeline`), in units of `TOKEN_S`.
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

# Width of a token where only the order is known; so an axis in microseconds counts tokens.
TOKEN_S = 1e-6

_NO_FASTER = "no faster"

NanoBatch = tuple[int, int]


def order_timeline(plan: PipelinePlan, graph: OpGraph | None = None, num_layers: int = 3) -> Timeline:
    """A plan as a timeline, without a profile.

    If the plan has the times that search predicted, these are used. Otherwise a nano-operation is as wide as its number
    of tokens. It starts when its lane is free and everything it waits for has ended, including its data dependencies if
    the graph is known.

    Args:
        plan: Valid for the graph.
        graph: Gives the resource of each operation; None if unknown.
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
    """Each layer starts a makespan after the previous one; stage s starts s makespans later."""
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
        # A wait for something later in the plan refers to the previous period.
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
    """The span of a nano-operation; `resources` maps operations to their resource, as far as known."""
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
    """Raise `ValueError` if there is nothing to draw."""
    if not timelines or not all(any(span.stop_s > span.start_s for span in line.spans) for line in timelines):
        raise ValueError("nothing to draw: a timeline needs a nano-operation that takes time")


def headline(timeline: Timeline, sequential_s: float | None) -> str:
    """One line: the name, a layer's makespan, and its ratio to the time of the layer's operations run sequentially."""
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
    """The nano-batches of all timelines, numbered in order of their tokens."""
    found = {nano_batch(span) for timeline in timelines for span in timeline.spans}
    return {tokens: number for number, tokens in enumerate(sorted(found))}


def nano_batch(span: Span) -> NanoBatch:
    """The nano-batch of a span."""
    return span.start_token, span.stop_token


def resources_used(timelines: Sequence[Timeline]) -> list[Resource]:
    """Resources to draw a curve of: compute and memory if any resource is known, the network if it is used."""
    found = {span.resource for timeline in timelines for span in timeline.spans} - {None}
    always = {Resource.COMPUTE, Resource.MEMORY} if found else set()
    return [resource for resource in Resource if resource in found | always]


def use_steps(timeline: Timeline, resource: Resource) -> list[tuple[float, float]]:
    """Sum of the shares of running spans bound by a resource, as steps (time, value from then on) from time 0."""
    changes: dict[float, float] = defaultdict(float, {0.0: 0.0})
    for span in timeline.spans:
        if span.resource is resource:
            changes[span.start_s] += span.share
            changes[span.stop_s] -= span.share
    steps, level = [], 0.0
    for time_s in sorted(changes):
        # A sum of shares that have all ended may differ from 0 by rounding.
        level = max(round(level + changes[time_s], 9), 0.0)
        steps.append((time_s, level))
    return steps


def full_s(timeline: Timeline, timelines: Sequence[Timeline]) -> float:
    """Length of the axis: the longest timeline with the same unit, time or tokens."""
    is_timed = timeline.period_s is not None
    return max(other.duration_s for other in timelines if (other.period_s is not None) == is_timed)


def unit(timeline: Timeline) -> str:
    """The unit of the axis."""
    return "tokens" if timeline.period_s is None else "us"


def ticks_us(length_s: float, most: int) -> list[float]:
    """At most `most` round numbers, at least two, on an axis from 0 to `length_s`; in microseconds."""
    length_us = length_s * 1e6
    least = length_us / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    return [round(number * step, 9) for number in range(math.floor(length_us / step * (1 + 1e-9)) + 1)]


def label(operation: str, room: int) -> str:
    """The operation's name if it fits in `room` characters, else its abbreviation, else nothing."""
    return next((name for name in (operation, abbreviation(operation)) if len(name) <= room), "")


def abbreviation(operation: str) -> str:
    """The first letters of the parts of a name; for a name of one part its first three letters."""
    parts = [part for part in operation.split("_") if part]
    return "".join(part[0] for part in parts) if len(parts) > 1 else operation[:3]


def abbreviations(labels: Mapping[str, str]) -> dict[str, str]:
    """Entries of the legend: labels that differ from the name of their operation, in order."""
    return {short: name for short, name in sorted(labels.items()) if short and short != name}


def shares(timelines: Sequence[Timeline]) -> dict[str, float]:
    """The share of each lane that has less than the whole device."""
    return {span.lane: span.share for line in timelines for span in line.spans if 0 < span.share < 1}


SHARE_LEGEND = "R: part of the device that a lane is given"
USE_LEGEND = "sum of the parts of the device that are in use by operations which it bounds"
