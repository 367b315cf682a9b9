"""What is to be ordered: tasks on token ranges, what each costs alone, and which must wait for which.

A task is a run of operations that stay together on one lane: a product with the row-wise operations around it, an
attention, a collective. Dependencies come from the graph alone (`graph/nanobatch.py`); how tasks are ordered is
`structure.py`'s, on which share they run `allocate.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import Access, TokenRange, depends, split
from nanoflow.graph.operation import BatchShape, Operation, OpKind, Resource
from nanoflow.profile.interference import lane_of
from nanoflow.profile.operation_cost import operation_cost
from nanoflow.profile.table import NO_COST, Cost, CostTable

# These run with the product after them.
_LEADING = frozenset({OpKind.RMS_NORM, OpKind.RMS_NORM_FP8, OpKind.QUANTISE_FP8, OpKind.GATHER_ROWS})
# Where each operation is cut: task name to boundaries.
Splits = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Operations that run back to back on one lane, named after the one that counts."""

    name: str
    operations: tuple[Operation, ...]
    resource: Resource


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A group on a nano-batch."""

    group: Group
    tokens: TokenRange
    cost: Cost

    def __str__(self) -> str:
        return f"{self.group.name}[{self.tokens.start}:{self.tokens.stop}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """The second task must wait for the first of `distance` layers before (0: of its own layer); places of tasks."""

    first: int
    second: int
    distance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A layer, cut into tasks: `tasks` in the order of the graph, with what they take in a layer on average."""

    graph: OpGraph
    shape: BatchShape
    tasks: tuple[Task, ...]
    edges: tuple[Edge, ...]

    def same_lane(self) -> Iterator[tuple[int, int]]:
        """Pairs of tasks that take time on the same resource, so cannot overlap."""
        yield from ((i, j) for i, j in self._busy_pairs() if self._resource(i) is self._resource(j))

    def other_lane(self) -> Iterator[tuple[int, int]]:
        """Pairs of tasks that take time on different resources."""
        yield from ((i, j) for i, j in self._busy_pairs() if self._resource(i) is not self._resource(j))

    def _busy_pairs(self) -> Iterator[tuple[int, int]]:
        busy = [place for place, task in enumerate(self.tasks) if task.cost.time_s > 0]
        yield from ((i, j) for at, i in enumerate(busy) for j in busy[at + 1 :])

    def _resource(self, place: int) -> Resource:
        return self.tasks[place].group.resource

    @property
    def sequential_s(self) -> float:
        """All tasks one after the other."""
        return sum(task.cost.time_s for task in self.tasks)


def groups_of(graph: OpGraph) -> tuple[Group, ...]:
    """The layer's operations as groups: a norm goes with the product after it, other row-wise ones with that before."""
    found: list[list[Operation]] = []
    takes_next = False
    for op in graph.layer:
        is_row_wise = op.resource is not lane_of(op) or op.kind in _LEADING
        if found and (takes_next or (is_row_wise and op.kind not in _LEADING)):
            found[-1].append(op)
        else:
            found.append([op])
        takes_next = op.kind in _LEADING
    return tuple(_group(operations) for operations in found)


def _group(operations: list[Operation]) -> Group:
    counting = next((op for op in operations if op.is_product), operations[0])
    return Group(name=counting.name, operations=tuple(operations), resource=lane_of(counting))


def make_problem(graph: OpGraph, table: CostTable, shape: BatchShape, splits: Splits) -> Problem:
    """Cut the layer of a batch.

    Args:
        graph, table: What runs, and what it costs.
        shape: The batch.
        splits: Boundaries of every group by name; a group that is not named is not cut.
    """
    tasks = tuple(
        Task(group=group, tokens=tokens, cost=_cost(graph, group, tokens, shape, table))
        for group in groups_of(graph)
        for tokens in split(shape.num_tokens, splits.get(group.name, ()))
    )
    return Problem(graph=graph, shape=shape, tasks=tasks, edges=tuple(_edges(graph, tasks)))


def has_collectives(problem: Problem) -> bool:
    """Whether several GPUs exchange something within the layer."""
    return any(task.group.resource is Resource.NETWORK for task in problem.tasks)


def _cost(graph: OpGraph, group: Group, tokens: TokenRange, shape: BatchShape, table: CostTable) -> Cost:
    """The mean over all layers, each with what its own kind has of the group."""
    names = [op.name for op in group.operations]
    of_kinds = (
        _cost_of([op for op in kind.operations if op.name in names], tokens, shape, table).times(
            count / graph.num_layers
        )
        for kind, count in graph.kind_counts
    )
    return sum(of_kinds, start=NO_COST)


def _cost_of(operations: Sequence[Operation], tokens: TokenRange, shape: BatchShape, table: CostTable) -> Cost:
    costs = [operation_cost(op, tokens, shape, table) for op in operations]
    launches = sum(cost.time_s > 0 for cost in costs)
    gap = Cost(time_s=launches * table.profile.launch_gap_s, energy_j=0.0)
    return sum(costs, start=NO_COST) + gap


def _edges(graph: OpGraph, tasks: Sequence[Task]) -> Iterator[Edge]:
    """Dependencies within a layer, and from a layer to the next one; those over more layers follow from these."""
    for first, early in enumerate(tasks):
        for second, late in enumerate(tasks):
            if first < second and _depend(graph, early, late, distance=0):
                yield Edge(first=first, second=second, distance=0)
            if _depend(graph, early, late, distance=1):
                yield Edge(first=first, second=second, distance=1)


def _depend(graph: OpGraph, early: Task, late: Task, distance: int) -> bool:
    return any(
        depends(graph, Access(op=one, tokens=early.tokens), Access(op=two, tokens=late.tokens, layer=distance))
        for one in early.group.operations
        for two in late.group.operations
    )
