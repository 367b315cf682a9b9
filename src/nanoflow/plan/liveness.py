"""Which tensors between operations may share memory: those of which no plan ever needs two at once.

A tensor that more than one of prologue, layers and epilogue touches, or that a layer reads before it writes it, is
needed throughout. Any other is needed from its first touch to its last one, in each layer. Prologue, layers and
epilogue follow each other, whatever the plan. Within a layer the order of issue decides where a plan has one lane; on
parallel lanes everything of a layer is needed at once.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import Operation, Scope
from nanoflow.plan.plan import PipelinePlan

# Bytes to whose multiples tensors are placed: more than any kernel asks for.
ALIGNMENT = 1024

Conflict = frozenset[str]


def place(graph: OpGraph, plans: Sequence[PipelinePlan], num_bytes: Mapping[str, int]) -> dict[str, int]:
    """Where each tensor begins in memory that all share, in bytes: low, large ones first.

    Args:
        graph: Whose tensors.
        plans: All that may run.
        num_bytes: Size of each tensor.
    """
    conflicting = set(conflicts(graph, plans))
    begins: dict[str, int] = {}
    for name in sorted(num_bytes, key=lambda name: (-num_bytes[name], name)):
        taken = sorted(
            (begins[other], begins[other] + num_bytes[other])
            for other in begins
            if Conflict((name, other)) in conflicting
        )
        begin = 0
        for start, stop in taken:
            if begin + num_bytes[name] <= start:
                break
            begin = max(begin, -(-stop // ALIGNMENT) * ALIGNMENT)
        begins[name] = begin
    return begins


def shapes_of(graph: OpGraph, *, num_tokens: int, num_logits: int) -> dict[str, tuple[int, int]]:
    """Rows and width of every tensor between operations, for batches of up to so many tokens and rows with logits."""
    return {
        spec.name: (num_logits if spec.scope is Scope.SAMPLED else num_tokens, spec.width)
        for spec in graph.tensors
        if not spec.is_per_layer and spec.name not in graph.inputs
    }


def bytes_of(graph: OpGraph, *, num_tokens: int, num_logits: int, dtype_bytes: int) -> dict[str, int]:
    """Bytes of every tensor of `shapes_of`, if an element of the model's type has so many."""
    shapes = shapes_of(graph, num_tokens=num_tokens, num_logits=num_logits)
    return {name: rows * graph.tensor(name).row_bytes(dtype_bytes) for name, (rows, _) in shapes.items()}


def size_of(begins: Mapping[str, int], num_bytes: Mapping[str, int]) -> int:
    """Bytes from the beginning to the end of the last tensor."""
    return max((begins[name] + num_bytes[name] for name in begins), default=0)


def workspace_bytes(
    graph: OpGraph, plans: Sequence[PipelinePlan], *, num_tokens: int, num_logits: int, dtype_bytes: int
) -> int:
    """Bytes that the tensors between operations take, for batches of up to so many tokens and rows with logits."""
    num_bytes = bytes_of(graph, num_tokens=num_tokens, num_logits=num_logits, dtype_bytes=dtype_bytes)
    return size_of(place(graph, plans, num_bytes), num_bytes)


def conflicts(graph: OpGraph, plans: Sequence[PipelinePlan]) -> Iterator[Conflict]:
    """Every two tensors that some plan may need at once; those outside all operations are in none."""
    throughout = _needed_throughout(graph)
    names = {spec.name for spec in graph.tensors}
    yield from (Conflict((name, other)) for name in throughout for other in names - {name})
    for operations in (graph.prologue, graph.epilogue):
        yield from _overlapping([(0, op) for op in operations], throughout)
    for plan in plans:
        if len(plan.lanes) > 1:
            yield from map(Conflict, itertools.combinations(_touched(graph.layer_operations) - throughout, 2))
        else:
            for layers in graph.neighbours(plan.max_stage + 2):
                ops = [{op.name: op for op in kind.operations} for kind in layers]
                issued = plan.issued_in(layers)
                yield from _overlapping([(layer, ops[layer][nano.operation]) for layer, nano in issued], throughout)


def _needed_throughout(graph: OpGraph) -> set[str]:
    parts = [_touched(operations) for _, operations in graph.parts()]
    found = {name for one, other in itertools.combinations(parts, 2) for name in one & other}
    for kind in graph.kinds:
        written = set[str]()
        for op in kind.operations:
            found.update(set(op.reads) - written)
            written.update(op.writes)
    return found


def _touched(operations: Iterable[Operation]) -> set[str]:
    return {name for op in operations for name in (*op.reads, *op.writes)}


def _overlapping(order: Sequence[tuple[int, Operation]], throughout: set[str]) -> Iterator[Conflict]:
    """Of one part: two of which one is first touched, in some layer, before the other was for the last time."""
    places: dict[tuple[str, int], list[int]] = defaultdict(list)
    for at, (layer, op) in enumerate(order):
        for name in _touched([op]) - throughout:
            places[name, layer].append(at)
    for ((name, _), one), ((other, _), two) in itertools.combinations(places.items(), 2):
        if name != other and one[0] <= two[-1] and two[0] <= one[-1]:
            yield Conflict((name, other))
