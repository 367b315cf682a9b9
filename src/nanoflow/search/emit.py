"""From a schedule with shares to a pipeline plan: lanes, issue order, stages, and the waits that keep to the schedule.

Tasks on one share of one resource become a lane. Lanes run freely beside each other on a device, so where two tasks may
not overlap (one resource, or shares above 1 together) and nothing else orders them, the later one waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanoflow.graph.operation import Operation
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import Lane, NanoOperation, PipelinePlan
from nanoflow.plan.sequential import WHOLE_LANE
from nanoflow.search.allocate import Allocation
from nanoflow.search.problem import Problem, Task

# Starts are compared after rounding: the solver is exact to about 1e-7.
_DIGITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A task in the steady state: the period it starts in, where in that period, how long it takes."""

    task: Task
    lane: Lane
    stage: int
    start: float
    length: float

    @property
    def stop(self) -> float:
        return self.start + self.length

    def conflicts(self, other: _Placed) -> bool:
        """They may not overlap, and their lanes do not see to it."""
        is_same_resource = self.task.group.resource is other.task.group.resource
        return self.lane != other.lane and (is_same_resource or self.lane.share + other.lane.share > 1 + 1e-9)


def emit(problem: Problem, allocation: Allocation, name: str) -> PipelinePlan:
    """The plan of an allocation, valid for the problem's graph."""
    placed = sorted(
        (
            _place(task, start, length, share, allocation.mechanism)
            for task, start, length, share in _rows(problem, allocation)
        ),
        key=lambda item: (item.start, -item.stage, problem.tasks.index(item.task)),
    )
    period_s = allocation.schedule.period_s
    first_place, last_place = _places(placed)
    nano_operations = []
    for at, item in enumerate(placed):
        waits = tuple(sorted(last_place[before] for before in _waits(placed, at)))
        nano_operations += list(_nano_operations(item, waits, period_s))
    assert len(nano_operations) == first_place[-1] + len(placed[-1].task.group.operations)
    lanes = dict.fromkeys([WHOLE_LANE, *(item.lane for item in placed)])
    return PipelinePlan(
        name=name,
        num_tokens=problem.shape.num_tokens,
        lanes=tuple(lanes),
        nano_operations=tuple(nano_operations),
        predicted_makespan_s=period_s,
    )


def _rows(problem: Problem, allocation: Allocation) -> Iterator[tuple[Task, float, float, float]]:
    schedule = allocation.schedule
    return zip(problem.tasks, schedule.starts, schedule.lengths, allocation.shares, strict=True)


def _place(task: Task, start: float, length: float, share: float, mechanism: Mechanism) -> _Placed:
    start = round(start, _DIGITS)
    stage = math.floor(start)
    is_whole = share >= 1.0 or task.cost.time_s <= 0
    lane = WHOLE_LANE if is_whole else Lane(name=f"{task.group.resource} {share:.2f}", mechanism=mechanism, share=share)
    return _Placed(task=task, lane=lane, stage=stage, start=start - stage, length=length)


def _places(placed: Sequence[_Placed]) -> tuple[list[int], list[int]]:
    """Places in the plan of each task's first and last operation."""
    first, last, at = [], [], 0
    for item in placed:
        first.append(at)
        at += len(item.task.group.operations)
        last.append(at - 1)
    return first, last


def _waits(placed: Sequence[_Placed], at: int) -> list[int]:
    """On each other lane the last task before this one that may not overlap with it, in this period or the one before.

    Only busy tasks count, and only those that the schedule has end before this one starts.
    """
    item = placed[at]
    if item.length <= 0:
        return []
    found: dict[str, tuple[float, int]] = {}
    for place, other in enumerate(placed):
        if other.length <= 0 or not item.conflicts(other):
            continue
        # Of this period if it stands before, else of the period before.
        stop = other.stop - (0.0 if place < at else 1.0)
        if stop <= item.start + 10**-_DIGITS and stop > found.get(other.lane.name, (-math.inf, 0))[0]:
            found[other.lane.name] = (stop, place)
    return [place for _, place in found.values()]


def _nano_operations(item: _Placed, waits: tuple[int, ...], period_s: float) -> Iterator[NanoOperation]:
    """The task's operations, back to back; the first one waits."""
    operations: Sequence[Operation] = item.task.group.operations
    # Starts are rounded, so ends keep clear of the next start.
    step_s = max(item.length - 2 * 10**-_DIGITS, 0.0) * period_s / len(operations)
    for place, op in enumerate(operations):
        start_s = item.start * period_s + place * step_s
        yield NanoOperation(
            operation=op.name,
            start=item.task.tokens.start,
            stop=item.task.tokens.stop,
            lane=item.lane.name,
            stage=item.stage,
            waits=waits if place == 0 else (),
            predicted_start_s=start_s,
            predicted_end_s=start_s + step_s,
        )
