"""Stage 1: the order of tasks in the steady state, as if they did not disturb each other. A mixed-integer program.

Layers repeat with a period H, and task i of layer l starts at (s_i + l) H, so s_i counts in periods. With u = 1 / H the
program is linear, and exact for any number of layers in a row (the paper unrolls three):

    maximise u
    s_j + h >= s_i + d_i u                           for every edge i -> j over h layers
    s_j - s_i >= d_i u - k_ij,                       for i, j on one resource: j comes k_ij periods before it would
    s_i - s_j >= d_j u - (1 - k_ij), k_ij integer      come after i; together they exclude any overlap
    0 <= s_i <= number of periods a layer may last

Shares, interference and power are `allocate.py`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from nanoflow.search.problem import Problem

Row = dict[int, float]
_ROUNDING = 1e-6


class Program:
    """A mixed-integer program that is put together row by row; all variables are at least 0 unless said otherwise."""

    def __init__(self) -> None:
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._is_integer: list[bool] = []
        self._rows: list[tuple[Row, float, float]] = []

    def variable(self, upper: float, *, lower: float = 0.0, is_integer: bool = False) -> int:
        """A new variable, named by its place."""
        self._lower.append(lower)
        self._upper.append(upper)
        self._is_integer.append(is_integer)
        return len(self._lower) - 1

    def at_least(self, row: Row, value: float) -> None:
        """Coefficients by variable: their sum is at least a value."""
        self._rows.append((row, value, np.inf))

    def equals(self, row: Row, value: float) -> None:
        """Their sum is a value."""
        self._rows.append((row, value, value))

    def maximise(self, variable: int, *, time_limit_s: float, num_nodes: int) -> Solution | None:
        """The best solution found; None if there was none in time or there is none at all."""
        costs = np.zeros(len(self._lower))
        costs[variable] = -1.0
        entries = [
            (place, column, factor) for place, (row, _, _) in enumerate(self._rows) for column, factor in row.items()
        ]
        places, columns, factors = (np.array(part) for part in zip(*entries, strict=True))
        matrix = coo_array((factors, (places, columns)), shape=(len(self._rows), len(self._lower))).tocsr()
        result = milp(
            costs,
            constraints=LinearConstraint(
                matrix, [low for _, low, _ in self._rows], [high for _, _, high in self._rows]
            ),
            bounds=Bounds(np.array(self._lower), np.array(self._upper)),
            integrality=np.array(self._is_integer, dtype=np.int64),
            options={"time_limit": time_limit_s, "node_limit": num_nodes, "mip_rel_gap": 1e-4},
        )
        if result.x is None:
            return None
        bound = -result.mip_dual_bound if result.mip_dual_bound is not None else result.x[variable]
        return Solution(values=result.x, bound=max(float(bound), float(result.x[variable])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Values of the variables, and what the objective can at most be."""

    values: NDArray[np.float64]
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long a program may be worked on: so many nodes (which decides, so that results repeat), at most so long."""

    num_nodes: int
    time_limit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """When a search ends at the latest, by `time.monotonic`, in seconds."""

    end_s: float

    @staticmethod
    def after(seconds: float) -> Deadline:
        """So many seconds from now."""
        return Deadline(end_s=time.monotonic() + seconds)

    @property
    def left_s(self) -> float:
        """Seconds until then; 0 once it has passed."""
        return max(self.end_s - time.monotonic(), 0.0)

    def effort(self, num_nodes: int, part: float = 1.0) -> Effort:
        """For a program that may take a part of the time that is left; a tenth of a second at least."""
        return Effort(num_nodes=num_nodes, time_limit_s=max(self.left_s, 0.1) * part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When each task starts, in the steady state.

    Attributes:
        starts: In periods since its layer's beginning, in the order of the problem's tasks; the smallest is 0.
        lengths: In periods.
        period_s: Time from one layer to the next.
        least_period_s: What no order of these tasks can undercut, as far as the solver has proven it.
    """

    starts: tuple[float, ...]
    lengths: tuple[float, ...]
    period_s: float
    least_period_s: float

    @property
    def gap(self) -> float:
        """How much shorter the period might still be, as a part of it."""
        return 1.0 - self.least_period_s / self.period_s

    def separation(self, i: int, j: int, margin: float = 0.0) -> int | None:
        """By how many periods task j comes before it would come after task i of its own layer (k_ij).

        None if the two overlap, or are nearer to each other than the margin, in periods.
        """
        periods = -math.floor(self.starts[j] - self.starts[i] - self.lengths[i] + _ROUNDING)
        after_i = self.starts[j] + periods - self.starts[i] - self.lengths[i]
        before_next_i = self.starts[i] + 1 - self.starts[j] - periods - self.lengths[j]
        return periods if min(after_i, before_next_i) >= margin - _ROUNDING else None


def solve_structure(problem: Problem, *, max_stages: int, effort: Effort) -> Schedule | None:
    """The order with the shortest period; None if none was found in time.

    Args:
        problem: The tasks.
        max_stages: Periods that one layer may last at most.
        effort: When to stop.
    """
    # 1. Times in units of the sequential layer, so that the rate u is a speed-up.
    durations = [task.cost.time_s / problem.sequential_s for task in problem.tasks]
    program = Program()
    rate = program.variable(_largest_rate(problem, durations), lower=1.0)
    starts = [program.variable(max_stages) for _ in problem.tasks]
    add_dependencies(program, problem, starts, [{rate: duration} for duration in durations])
    # 2. One at a time on each resource.
    for i, j in problem.same_lane():
        order = program.variable(max_stages, lower=-max_stages, is_integer=True)
        program.at_least({starts[j]: 1.0, starts[i]: -1.0, rate: -durations[i], order: 1.0}, 0.0)
        program.at_least({starts[i]: 1.0, starts[j]: -1.0, rate: -durations[j], order: -1.0}, -1.0)
    solution = program.maximise(rate, time_limit_s=effort.time_limit_s, num_nodes=effort.num_nodes)
    if solution is None:
        return None
    speed_up = float(solution.values[rate])
    return Schedule(
        starts=shifted([float(solution.values[start]) for start in starts]),
        lengths=tuple(duration * speed_up for duration in durations),
        period_s=problem.sequential_s / speed_up,
        least_period_s=problem.sequential_s / solution.bound,
    )


def add_dependencies(program: Program, problem: Problem, starts: Sequence[int], durations: Sequence[Row]) -> None:
    """No task starts before what it depends on has ended; durations are rows in periods."""
    for edge in problem.edges:
        if edge.first == edge.second:
            continue
        row = {starts[edge.second]: 1.0, starts[edge.first]: -1.0}
        row |= {variable: -factor for variable, factor in durations[edge.first].items()}
        program.at_least(row, -float(edge.distance))


def shifted(starts: Sequence[float]) -> tuple[float, ...]:
    """The same starts with the earliest at 0."""
    first = min(starts)
    return tuple(max(start - first, 0.0) for start in starts)


def _largest_rate(problem: Problem, durations: Sequence[float]) -> float:
    """No resource can work for more than a period in a period."""
    busy: dict[str, float] = {}
    for task, duration in zip(problem.tasks, durations, strict=True):
        busy[task.group.resource] = busy.get(task.group.resource, 0.0) + duration
    return 1.0 / max(busy.values())
