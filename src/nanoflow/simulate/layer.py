"""What a plan is predicted to take: its nano-operations as events on lanes, several layers in a row.

The rules are those of a device. A lane runs its nano-operations in order; each waits for what it depends on, and for
what the plan says. How fast it runs follows from its share, and from what else runs at that moment (`rates.py`). If the
energy of a layer exceeds what the power limit allows, the whole layer is stretched (`profile/power.py`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanoflow.graph.graph import LayerKind, OpGraph
from nanoflow.graph.operation import BatchShape, Operation
from nanoflow.plan.carry import carriers
from nanoflow.plan.dependencies import dependencies
from nanoflow.plan.plan import PipelinePlan
from nanoflow.profile.interference import Interference
from nanoflow.profile.operation_cost import mean_context, operation_cost
from nanoflow.profile.power import dynamic_energy_j, dynamic_power_w, static_power_w
from nanoflow.profile.table import NO_COST, Cost, CostTable
from nanoflow.simulate.rates import Item, rates_of
from nanoflow.timeline.timeline import Span, Timeline

# Layers whose ends give the period, after those in which the pipeline fills and before those in which it drains.
_STEADY_LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Predicted layers, one after the other.

    Attributes:
        timeline: When what ran; `period_s` is the steady-state makespan of one layer.
        layer_ends_s: When the last nano-operation of each layer ended.
        layer_energy_j: Mean energy of one layer on one GPU; None if unknown.
        mix: How much longer the mean layer of the whole model takes than that of the pattern, one operation after the
            other: sections may hold kinds in other proportions.
    """

    timeline: Timeline
    layer_ends_s: tuple[float, ...]
    layer_energy_j: float | None
    mix: float = 1.0

    @property
    def period_s(self) -> float:
        """Steady-state makespan of one layer."""
        assert self.timeline.period_s is not None
        return self.timeline.period_s


@dataclass(slots=True, eq=False)
class _Work:
    """A nano-operation of one layer while it waits, runs or has ended."""

    item: Item
    place: int
    layer: int
    num_waits: int = 0
    left: float = 1.0
    start_s: float = 0.0
    stop_s: float = 0.0


class PlanSimulator:
    """Predicts one plan; what depends on what is worked out once, batches may differ.

    Layers of several kinds follow each other as in the pattern that most of the model's layers are in.

    Args:
        plan, graph: A plan that is valid for the graph.
        table, interference: What operations take, alone and together.
    """

    def __init__(self, plan: PipelinePlan, graph: OpGraph, table: CostTable, interference: Interference) -> None:
        self._plan, self._table, self._interference = plan, table, interference
        self._pattern = graph.main_pattern
        self._ops = {kind.name: {op.name: op for op in kind.operations} for kind in graph.kinds}
        self._counts = graph.kind_counts
        self._num_layers = graph.num_layers
        lanes = {lane.name: lane for lane in plan.lanes}
        self._lanes = [lanes[nano.lane] for nano in plan.nano_operations]
        self._depends = dependencies(plan, graph)
        self._setup = table.profile.setup
        # What carries in one layer does in all of them, but where the pipeline fills or drains.
        layers = self._kinds(plan.max_stage + 1 + len(self._pattern))
        issued = [place for _, place in _issued(plan, layers)]
        self._carriers = {issued[at] for at, _ in carriers(plan, graph, layers, self._depends)}

    def run(self, shape: BatchShape, num_layers: int | None = None) -> Simulation:
        """Predict so many layers on a batch.

        Args:
            shape: At most as many tokens as the plan takes.
            num_layers: Enough for a steady state if None; with fewer the period is that of filling and draining too.
                More are run where the last pattern would be a part, as a part has kinds in other proportions.
        """
        filling, of_pattern = self._plan.max_stage + 1, len(self._pattern)
        num_layers = num_layers or 2 * filling + max(_STEADY_LAYERS, of_pattern) + 1
        num_layers = next_multiple(num_layers, of_pattern)
        layers = self._kinds(num_layers)
        items = {kind.name: self._items(kind, shape) for kind in self._pattern}
        works = list(self._works([items[kind.name] for kind in layers], layers))
        dynamic_j = self._execute(works)
        period_s = _period_s(_layer_ends_s(works, num_layers), filling, of_pattern)
        # The power limit holds for the steady state as a whole.
        slower = self._slowdown(dynamic_j, period_s * num_layers)
        for work in works:
            work.start_s, work.stop_s = work.start_s * slower, work.stop_s * slower
        spans = tuple(
            self._span(work)
            for work in sorted(works, key=lambda work: (work.start_s, work.layer, work.place))
            if work.stop_s > work.start_s
        )
        ends_s = _layer_ends_s(works, num_layers)
        static_j = static_power_w(self._setup) * ends_s[-1]
        return Simulation(
            timeline=Timeline(name=self._plan.name, spans=spans, period_s=period_s * slower),
            layer_ends_s=ends_s,
            layer_energy_j=None if dynamic_j is None else (dynamic_j + static_j) / num_layers,
            mix=self._mix(shape),
        )

    def _mix(self, shape: BatchShape) -> float:
        if len(self._counts) == 1:
            return 1.0
        of_pattern = sum(self._in_sequence(kind, shape).time_s for kind in self._pattern) / len(self._pattern)
        return self.layer_in_sequence(shape).time_s / of_pattern

    def layer_in_sequence(self, shape: BatchShape) -> Cost:
        """What `run` says of one layer where nothing overlaps: all lanes run one after the other, and none is a part.

        It needs no events, so it is what whole runs of the sequential plan are simulated with. Of layers of several
        kinds it is the mean.
        """
        of_kinds = [self._in_sequence(kind, shape).times(count / self._num_layers) for kind, count in self._counts]
        return sum(of_kinds, start=NO_COST)

    def _in_sequence(self, kind: LayerKind, shape: BatchShape) -> Cost:
        items = [item for item in self._items(kind, shape) if item is not None]
        time_s = sum(item.cost.time_s for item in items)
        known_j = [item.dynamic_j for item in items if item.dynamic_j is not None]
        dynamic_j = sum(known_j) if len(known_j) == len(items) else None
        time_s *= self._slowdown(dynamic_j, time_s)
        static_w = static_power_w(self._setup)
        return Cost(time_s=time_s, energy_j=None if dynamic_j is None else dynamic_j + static_w * time_s)

    def _slowdown(self, dynamic_j: float | None, time_s: float) -> float:
        """How much longer work takes under the power limit."""
        limit_w = dynamic_power_w(self._setup)
        return 1.0 if limit_w is None or dynamic_j is None else max(1.0, dynamic_j / (limit_w * time_s))

    def _kinds(self, num_layers: int) -> tuple[LayerKind, ...]:
        """So many layers of the pattern."""
        return tuple(self._pattern[layer % len(self._pattern)] for layer in range(num_layers))

    def _items(self, kind: LayerKind, shape: BatchShape) -> list[Item | None]:
        """The nano-operations of the plan in a layer of a kind, None where it does not have the operation."""
        ops = self._ops[kind.name]
        found = [ops.get(nano.operation) for nano in self._plan.nano_operations]
        return [None if op is None else self._item(place, op, shape) for place, op in enumerate(found)]

    def _item(self, place: int, op: Operation, shape: BatchShape) -> Item:
        tokens = self._plan.nano_operations[place].tokens.clip(0, shape.num_tokens)
        cost = operation_cost(op, tokens, shape, self._table)
        dynamic_j = dynamic_energy_j(cost, self._setup)
        if cost.time_s > 0:
            cost = Cost(time_s=cost.time_s + self._table.profile.launch_gap_s, energy_j=cost.energy_j)
        return Item(
            op=op,
            lane=self._lanes[place],
            tokens=tokens,
            cost=cost,
            dynamic_j=dynamic_j,
            context=mean_context(op, shape),
            carries=place in self._carriers,
        )

    def _works(self, items: Sequence[Sequence[Item | None]], layers: Sequence[LayerKind]) -> Iterator[_Work]:
        """In issue order."""
        for layer, place in _issued(self._plan, layers):
            item = items[layer][place]
            assert item is not None, "issued in a layer that has no such operation"
            yield _Work(item, place, layer)

    def _execute(self, works: list[_Work]) -> float | None:
        """Advance from event to event: something ends, whatever may start now does. The energy, if it is known."""
        at = {(work.layer, work.place): work for work in works}
        followers: dict[tuple[int, int], list[_Work]] = defaultdict(list)
        for work in works:
            for place, distance in self._depends[work.place]:
                if (work.layer - distance, place) in at:
                    followers[work.layer - distance, place].append(work)
                    work.num_waits += 1
        queues: dict[str, deque[_Work]] = defaultdict(deque)
        for work in works:
            queues[work.item.lane.name].append(work)
        running: list[_Work] = []
        now_s, energy_j = 0.0, 0.0
        # Layers repeat each other: the same items run together again.
        known: dict[tuple[int, ...], tuple[list[float], float]] = {}
        while running or any(queues.values()):
            while _start_next(queues, running, followers, now_s):
                pass
            if not running:
                break
            together = tuple(id(work.item) for work in running)
            if together not in known:
                known[together] = rates_of([work.item for work in running], self._interference)
            rates, dynamic_w = known[together]
            step_s = min(
                work.left * work.item.cost.time_s / rate for work, rate in zip(running, rates, strict=True) if rate > 0
            )
            now_s += step_s
            energy_j += step_s * dynamic_w
            for work, rate in zip(running, rates, strict=True):
                work.left -= step_s * rate / work.item.cost.time_s
            for work in [work for work in running if work.left <= 1e-9]:
                running.remove(work)
                _end(work, now_s, queues[work.item.lane.name], followers)
        is_known = all(work.item.dynamic_j is not None for work in works)
        return energy_j if is_known else None

    def _span(self, work: _Work) -> Span:
        item = work.item
        return Span(
            operation=item.op.name,
            layer=work.layer,
            start_token=item.tokens.start,
            stop_token=item.tokens.stop,
            lane=item.lane.name,
            resource=item.op.resource,
            share=item.lane.share,
            start_s=work.start_s,
            stop_s=work.stop_s,
        )


def _layer_ends_s(works: Sequence[_Work], num_layers: int) -> tuple[float, ...]:
    return tuple(max(work.stop_s for work in works if work.layer == layer) for layer in range(num_layers))


def next_multiple(count: int, of: int) -> int:
    """The least multiple that is not below a count."""
    return -(-count // of) * of


def _period_s(ends_s: Sequence[float], filling: int, of_pattern: int) -> float:
    """Over the whole patterns at whose ends the pipeline is full; over all layers if there are too few."""
    first, last = filling, len(ends_s) - 1 - filling
    last -= (last - first) % of_pattern
    return (ends_s[last] - ends_s[first]) / (last - first) if last > first else ends_s[-1] / len(ends_s)


def _issued(plan: PipelinePlan, layers: Sequence[LayerKind]) -> list[tuple[int, int]]:
    """(layer, place) in issue order."""
    places = {id(nano): place for place, nano in enumerate(plan.nano_operations)}
    return [(layer, places[id(nano)]) for layer, nano in plan.issued_in(layers)]


def _start_next(
    queues: dict[str, deque[_Work]],
    running: list[_Work],
    followers: dict[tuple[int, int], list[_Work]],
    now_s: float,
) -> bool:
    """Start what may start on any lane; True if something ended at once, so that more may start."""
    has_ended = False
    for queue in queues.values():
        if queue and queue[0] not in running and queue[0].num_waits == 0:
            work = queue[0]
            work.start_s = now_s
            if work.item.cost.time_s > 0:
                running.append(work)
            else:
                _end(work, now_s, queue, followers)
                has_ended = True
    return has_ended


def _end(work: _Work, now_s: float, queue: deque[_Work], followers: dict[tuple[int, int], list[_Work]]) -> None:
    work.stop_s = now_s
    queue.popleft()
    for follower in followers[work.layer, work.place]:
        follower.num_waits -= 1
