"""What each nano-operation of a plan must wait for, by the graph and by the plan itself.

The executor turns it into events between lanes, the simulator into events in simulated time.
"""

from __future__ import annotations

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import Access, depends, shared_tensors
from nanoflow.plan.plan import PipelinePlan

Dependency = tuple[int, int]


def dependencies(plan: PipelinePlan, graph: OpGraph) -> tuple[tuple[Dependency, ...], ...]:
    """For each nano-operation, in order: places of others, and how many layers before its own those belong to.

    Dependencies on layers further back follow from these. A layer may lack an operation that another one has; what
    depends on it waits for nothing there. A negative number of layers is a later layer: the
    plan's waits are by period, and stages say which layers run in it.
    """
    ops = {op.name: op for op in graph.layer}
    order = {op.name: place for place, op in enumerate(graph.layer)}
    # Most operations share no tensor, and few one that outlives a layer: asked once here, not for each two
    # nano-operations.
    shared = {(one.name, other.name): shared_tensors(one, other) for one in graph.layer for other in graph.layer}
    lasting = {tensor.name for tensor in graph.tensors if not tensor.is_per_layer}
    nanos = plan.nano_operations
    accesses = [Access(op=ops[nano.operation], tokens=nano.tokens) for nano in nanos]
    distances = range(1, graph.reach + 1)
    later = [[Access(op=each.op, tokens=each.tokens, layer=layer) for layer in distances] for each in accesses]
    found: list[tuple[Dependency, ...]] = []
    for late, nano in enumerate(nanos):
        mine: list[Dependency] = []
        for early, other in enumerate(nanos):
            tensors = shared[other.operation, nano.operation]
            if not tensors:
                continue
            is_before = order[other.operation] < order[nano.operation]
            if is_before and depends(graph, accesses[early], accesses[late]):
                mine.append((early, 0))
            if not tensors.isdisjoint(lasting):
                mine += [
                    (early, distance)
                    for distance, on in enumerate(later[late], 1)
                    if depends(graph, accesses[early], on)
                ]
        for wait in nano.waits:
            periods_before = 0 if wait < late else 1
            mine.append((wait, periods_before + nanos[wait].stage - nano.stage))
        found.append(tuple(mine))
    return tuple(found)


def waits_in_period(plan: PipelinePlan, graph: OpGraph) -> tuple[tuple[int, ...], ...]:
    """For each nano-operation, in order: places of those of the same period that must have ended first.

    In a period a nano-operation of stage s works on the layer that is s before the period's first one.
    """
    stages = [nano.stage for nano in plan.nano_operations]
    return tuple(
        tuple(sorted({early for early, distance in found if early < late and stages[early] - stages[late] == distance}))
        for late, found in enumerate(dependencies(plan, graph))
    )
