"""A plan for all layers of a model: every step in issue order, and the steps on other lanes that it waits for.

Steps of one lane run in order. So a step waits for at most one step of each other lane, the last that it depends on,
and never for a step that its lane has waited for already. `lanes.py` makes the streams wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import Operation
from nanoflow.plan.dependencies import dependencies
from nanoflow.plan.plan import PipelinePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A nano-operation in a layer.

    Attributes:
        layer, op, tokens: What to run; a smaller batch clips the tokens.
        lane: Name of its lane.
        waits: Indices of steps on other lanes that must have ended.
        is_waited_for: Whether another lane waits for it.
    """

    layer: int
    op: Operation
    tokens: TokenRange
    lane: str
    waits: tuple[int, ...] = ()
    is_waited_for: bool = False


def bind(plan: PipelinePlan, graph: OpGraph) -> tuple[Step, ...]:
    """All steps of a valid plan.

    Raises:
        PlanError: The plan is not valid for the graph.
    """
    plan.validate(graph)
    layers = graph.layers
    ops = {kind.name: {op.name: op for op in kind.operations} for kind in graph.kinds}
    places = {id(nano): place for place, nano in enumerate(plan.nano_operations)}
    issued = [(layer, places[id(nano)]) for layer, nano in plan.issued_in(layers)]
    at = {key: step for step, key in enumerate(issued)}
    needs = dependencies(plan, graph)
    lanes = [plan.nano_operations[place].lane for _, place in issued]
    reached: dict[tuple[str, str], int] = {}
    waits: list[tuple[int, ...]] = []
    for step, (layer, place) in enumerate(issued):
        last: dict[str, int] = {}
        for other, distance in needs[place]:
            # A wait for a layer that does not exist, or that is issued later, is dropped.
            before = at.get((layer - distance, other))
            if before is not None and before < step and lanes[before] != lanes[step]:
                last[lanes[before]] = max(before, last.get(lanes[before], -1))
        new = {lane: before for lane, before in last.items() if before > reached.get((lanes[step], lane), -1)}
        reached |= {(lanes[step], lane): before for lane, before in new.items()}
        waits.append(tuple(sorted(new.values())))
    waited_for = {before for some in waits for before in some}
    return tuple(
        Step(
            layer=layer,
            op=ops[layers[layer].name][plan.nano_operations[place].operation],
            tokens=plan.nano_operations[place].tokens,
            lane=lanes[step],
            waits=waits[step],
            is_waited_for=step in waited_for,
        )
        for step, (layer, place) in enumerate(issued)
    )
