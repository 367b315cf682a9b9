"""Plans with lanes for any graph, made without a search."""

from __future__ import annotations

from dataclasses import replace

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import LinearDims, OpKind
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import Lane, NanoOperation, PipelinePlan

COLLECTIVES = frozenset({OpKind.ALL_REDUCE, OpKind.ALL_GATHER})
LANE_OF = {OpKind.DECODE_ATTENTION: "memory", **dict.fromkeys(COLLECTIVES, "network")}


def ping_pong_plan(
    graph: OpGraph, num_tokens: int, boundary: int, mechanism: Mechanism, share: float = 0.5
) -> PipelinePlan:
    """Two nano-batches, the second a layer behind: decode attention of each runs beside the products of the other.

    Collectives, if the graph has any, run beside both.
    """
    network = (Lane(name="network", mechanism=mechanism),) if any(op.kind in COLLECTIVES for op in graph.layer) else ()
    lanes = (
        Lane(name="whole"),
        Lane(name="compute", mechanism=mechanism, share=share),
        Lane(name="memory", mechanism=mechanism, share=1.0 - share),
        *network,
    )
    nano_operations = tuple(
        NanoOperation(
            operation=op.name,
            start=start,
            stop=stop,
            lane=LANE_OF.get(op.kind, "compute"),
            stage=stage,
        )
        for stage, (start, stop) in enumerate(((0, boundary), (boundary, num_tokens)))
        for op in graph.layer
    )
    return PipelinePlan(
        name=f"ping-pong, {mechanism}", num_tokens=num_tokens, lanes=lanes, nano_operations=nano_operations
    )


def experts_beside_plan(graph: OpGraph, num_tokens: int, boundary: int, share: float) -> PipelinePlan:
    """As searches plan a mixture of experts: grouped products beside attention, other products on the whole device."""
    plan = ping_pong_plan(graph, num_tokens, boundary, Mechanism.PARTITION, share)
    alone = {op.name for op in graph.layer if isinstance(op.dims, LinearDims)}
    nano_operations = (
        replace(nano, lane="whole" if nano.operation in alone else nano.lane) for nano in plan.nano_operations
    )
    return replace(plan, name="experts beside attention", nano_operations=tuple(nano_operations))


def resource_plan(graph: OpGraph, num_tokens: int, boundary: int) -> PipelinePlan:
    """Two nano-batches in the graph's order with a lane for each resource, so that some steps wait for two lanes."""
    resources = dict.fromkeys(op.resource for op in graph.layer)
    return PipelinePlan(
        name="a lane for each resource",
        num_tokens=num_tokens,
        lanes=tuple(Lane(name=resource, mechanism=Mechanism.STREAM) for resource in resources),
        nano_operations=tuple(
            NanoOperation(operation=op.name, start=start, stop=stop, lane=op.resource)
            for op in graph.layer
            for start, stop in ((0, boundary), (boundary, num_tokens))
        ),
    )


def alternating_plan(graph: OpGraph, num_tokens: int, boundary: int, share: float) -> PipelinePlan:
    """Two nano-batches, one in decode attention while the other is in products; each lane has this share."""
    at = next(place for place, op in enumerate(graph.layer) if op.kind is OpKind.DECODE_ATTENTION)
    before, after = graph.layer[: at + 1], graph.layer[at + 1 :]
    halves = ((0, boundary), (boundary, num_tokens))
    order = ((before, 0, 0), (after, 1, 1), (before, 1, 0), (after, 0, 0))
    return PipelinePlan(
        name="alternating",
        num_tokens=num_tokens,
        lanes=tuple(Lane(name=name, mechanism=Mechanism.STREAM, share=share) for name in ("compute", "memory")),
        nano_operations=tuple(
            NanoOperation(
                operation=op.name,
                start=halves[half][0],
                stop=halves[half][1],
                lane=LANE_OF.get(op.kind, "compute"),
                stage=stage,
            )
            for operations, half, stage in order
            for op in operations
        ),
    )
