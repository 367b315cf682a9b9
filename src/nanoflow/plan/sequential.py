"""Plans that need no search: the sequential baseline, and the layer cut into nano-batches on one lane.

Both are what every other plan is compared with; the sequential plan is also the fallback of the plan book.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import split
from nanoflow.plan.plan import Lane, NanoOperation, PipelinePlan

WHOLE_LANE = Lane(name="whole")


def sequential_plan(graph: OpGraph, num_tokens: int) -> PipelinePlan:
    """Every operation once, on all tokens, on the whole device, in the graph's order."""
    return nanobatch_plan(graph, num_tokens, boundaries=(), name="sequential")


def nanobatch_plan(
    graph: OpGraph, num_tokens: int, boundaries: Sequence[int], name: str = "nano-batches"
) -> PipelinePlan:
    """Every operation split at the same boundaries, nano-batch after nano-batch within each operation, on one lane.

    Args:
        graph: The model.
        num_tokens: Largest dense batch, the token budget.
        boundaries: Where to cut it, strictly increasing inside (0, num_tokens); none gives the sequential plan.
        name: Name of the plan.
    """
    nano_operations = tuple(
        NanoOperation(operation=op.name, start=tokens.start, stop=tokens.stop, lane=WHOLE_LANE.name)
        for op in graph.layer
        for tokens in split(num_tokens, boundaries)
    )
    return PipelinePlan(name=name, num_tokens=num_tokens, lanes=(WHOLE_LANE,), nano_operations=nano_operations)
