"""Which products of a plan carry decode attention, that is, compute a part of it in their own kernel.

The order of issue decides. A product that is issued after an attention carries a part of it. That ends when something
is issued that waits for the attention, or when the next attention is issued. The executor and the simulator both ask
here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nanoflow.graph.graph import LayerKind, OpGraph
from nanoflow.graph.operation import FP8_LINEARS, OpKind, Scope
from nanoflow.plan.dependencies import Dependency, dependencies
from nanoflow.plan.plan import PipelinePlan

PRODUCTS = (OpKind.LINEAR, OpKind.LINEAR_ADD, OpKind.LINEAR_SWIGLU, *FP8_LINEARS)


def carriers(
    plan: PipelinePlan,
    graph: OpGraph,
    layers: Sequence[LayerKind],
    needs: Sequence[Sequence[Dependency]] | None = None,
) -> Iterator[tuple[int, int]]:
    """Each product that carries and the attention it carries, as places in the issue order of layers of these kinds.

    Nothing in a plan whose products do not carry. `needs` are the plan's `dependencies`, if the caller has them.
    """
    if not plan.carry_lanes:
        return
    ops = {op.name: op for op in graph.layer}
    needs = dependencies(plan, graph) if needs is None else needs
    at = {id(nano): place for place, nano in enumerate(plan.nano_operations)}
    taken: tuple[int, tuple[int, int]] | None = None
    for issued, (layer, nano) in enumerate(plan.issued_in(layers)):
        op, place = ops[nano.operation], at[id(nano)]
        if op.kind is OpKind.DECODE_ATTENTION:
            taken = issued, (layer, place)
        elif taken is not None and taken[1] in {(layer - distance, before) for before, distance in needs[place]}:
            taken = None
        elif taken is not None and op.kind in PRODUCTS and op.scope is Scope.ALL:
            yield issued, taken[0]
