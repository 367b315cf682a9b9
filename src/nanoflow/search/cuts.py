"""Where the layer of a batch is cut into nano-batches, and the best order for each way to cut it (stage 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import split
from nanoflow.graph.operation import BatchShape, Resource
from nanoflow.profile.table import CostTable
from nanoflow.search.problem import Group, Problem, Splits, groups_of, has_collectives, make_problem
from nanoflow.search.structure import Deadline, Schedule, solve_structure

# The tile of a product: nano-batches are multiples of it.
STEP = 128
# Periods that a layer may last: how many layers are in flight.
MAX_STAGES = 3
STRUCTURE_NODES = 300
# Neither nano-batch is smaller than this part of the batch.
_LEAST_PART = 0.2
# Boundaries on each side of the middle that are tried.
_NEIGHBOURS = 1
# Idle compute, as a part of the period, above which four nano-batches are tried.
_BUBBLE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to cut the layer, with the best order of its tasks if they did not disturb each other."""

    problem: Problem
    schedule: Schedule
    label: str

    @property
    def bubble(self) -> float:
        """The part of a period in which no product runs."""
        busy = sum(
            length
            for task, length in zip(self.problem.tasks, self.schedule.lengths, strict=True)
            if task.group.resource is Resource.COMPUTE
        )
        return 1.0 - busy


def boundaries(num_tokens: int) -> list[int]:
    """Where to cut a batch in two: at the multiple of a tile nearest to its middle, then one tile to each side.

    Fewer, or none, if a batch is too small for them.
    """
    places = [
        place for place in range(STEP, num_tokens, STEP) if _LEAST_PART <= place / num_tokens <= 1.0 - _LEAST_PART
    ]
    return sorted(places, key=lambda place: abs(place - num_tokens / 2))[: 1 + 2 * _NEIGHBOURS]


def candidates(graph: OpGraph, table: CostTable, shape: BatchShape, deadline: Deadline) -> Iterator[Candidate]:
    """The layer of a batch cut in two at each boundary; none that a solver could not order before the deadline.

    With collectives it is also cut in four up to decode attention, as in the paper, where compute is still idle then.
    """
    groups = groups_of(graph)
    for boundary in boundaries(shape.num_tokens):
        if not deadline.left_s:
            return
        two = dict.fromkeys((group.name for group in groups), (boundary,))
        candidate = _ordered(graph, table, shape, two, f"2 nano-batches at {boundary}", deadline)
        if candidate is None:
            continue
        yield candidate
        four = halves(shape.num_tokens, boundary)
        if has_collectives(candidate.problem) and candidate.bubble > _BUBBLE and len(four) > 1:
            splits = {**two, **dict.fromkeys(_until_attention(groups), four)}
            label = f"4 nano-batches until attention, 2 at {boundary} after it"
            refined = _ordered(graph, table, shape, splits, label, deadline)
            if refined is not None and refined.schedule.period_s < candidate.schedule.period_s * (1 - 1e-3):
                yield refined


def halves(num_tokens: int, boundary: int) -> tuple[int, ...]:
    """Boundaries of four nano-batches: both sides of a boundary cut near the middle."""
    found = {boundary}
    for tokens in split(num_tokens, (boundary,)):
        middle = tokens.start + round(tokens.num_tokens / 2 / STEP) * STEP
        found |= {middle} if tokens.start < middle < tokens.stop else set()
    return tuple(sorted(found))


def _ordered(
    graph: OpGraph, table: CostTable, shape: BatchShape, splits: Splits, label: str, deadline: Deadline
) -> Candidate | None:
    problem = make_problem(graph, table, shape, splits)
    schedule = solve_structure(problem, max_stages=MAX_STAGES, effort=deadline.effort(STRUCTURE_NODES))
    return None if schedule is None else Candidate(problem=problem, schedule=schedule, label=label)


def _until_attention(groups: Sequence[Group]) -> list[str]:
    """Groups up to the first one bound by memory: what the paper cuts in four."""
    memory_bound = [place for place, group in enumerate(groups) if group.resource is Resource.MEMORY]
    return [group.name for group in groups[: memory_bound[0] + 1]] if memory_bound else []
