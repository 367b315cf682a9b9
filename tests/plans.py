"""Plans with lanes for any graph: what a search would find, made by hand."""

from __future__ import annotations

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import OpKind
from nanoflow.plan.plan import Lane, Mechanism, NanoOperation, PipelinePlan


def ping_pong_plan(
    graph: OpGraph, num_tokens: int, boundary: int, mechanism: Mechanism, share: float = 0.5
) -> PipelinePlan:
    """Two nano-batches, the second a layer behind: decode attention of each runs beside the products of the other."""
    lanes = (
        Lane(name="whole"),
        Lane(name="compute", mechanism=mechanism, share=share),
        Lane(name="memory", mechanism=mechanism, share=1.0 - share),
    )
    nano_operations = tuple(
        NanoOperation(
            operation=op.name,
            start=start,
            stop=stop,
            lane="memory" if op.kind is OpKind.DECODE_ATTENTION else "compute",
            stage=stage,
        )
        for stage, (start, stop) in enumerate(((0, boundary), (boundary, num_tokens)))
        for op in graph.layer
    )
    return PipelinePlan(
        name=f"ping-pong, {mechanism}", num_tokens=num_tokens, lanes=lanes, nano_operations=nano_operations
    )
