"""Auto-search: cut the layer, order it (stage 1), give shares (stage 2), keep a plan only if it is predicted to win.

Candidates are tried in a fixed order, so a search is anytime: at first the best plan is the sequential one, and each
candidate may replace it. Nodes of the programs, not seconds, end a stage, so equal inputs give equal plans unless the
time limit strikes. What the plan does on a device is measured elsewhere.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import split
from nanoflow.graph.operation import BatchShape, Resource
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.interference import Interference
from nanoflow.profile.table import CostTable, Profile
from nanoflow.search.allocate import Allocation, allocate, divisions, least_period_s
from nanoflow.search.carry import can_be_carried, carry_plan, carrying_runs
from nanoflow.search.emit import emit
from nanoflow.search.problem import Group, Problem, Splits, groups_of, make_problem
from nanoflow.search.structure import Effort, Schedule, solve_structure
from nanoflow.simulate.iteration import graphs_of
from nanoflow.simulate.layer import PlanSimulator

# The GEMM tile: nano-batches are multiples of it.
_STEP = 128
# Periods that a layer may last: how many layers are in flight.
_MAX_STAGES = 3
_STRUCTURE_NODES = 300
_ALLOCATION_NODES = 2500
_MAX_ALLOCATIONS = 3
# Idle compute, as a part of the period, above which more nano-batches are tried.
_BUBBLE = 0.01
# Ways to divide the device are followed as far as they might be so much slower than the best one: a prediction tells no
# more than that.
_CLOSE = 1.04
# What a plan must win under the simulator.
_LEAST_GAIN = 0.005

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A candidate that went through both stages.

    Attributes:
        plan: The plan.
        period_s: As the programs planned it.
        least_period_s: What they have proven to be out of reach for this structure and order.
        makespan_s: As the simulator predicts it.
    """

    plan: PipelinePlan
    period_s: float
    least_period_s: float
    makespan_s: float

    @property
    def gap(self) -> float:
        """How much shorter the period might be, as a part of it."""
        return 1.0 - self.least_period_s / self.period_s


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What was found.

    Attributes:
        plan: The best plan, with the simulator's makespan as its prediction.
        sequential_s: Makespan of the sequential layer under the same simulator.
        least_period_s: Makespan without interference of the best structure; no shares can undercut it.
        attempts: Candidates, in the order tried.
        reason: Why this plan.
        elapsed_s: How long it took.
    """

    plan: PipelinePlan
    sequential_s: float
    least_period_s: float
    attempts: tuple[Attempt, ...]
    reason: str
    elapsed_s: float

    @property
    def makespan_s(self) -> float:
        """Of the plan."""
        assert self.plan.predicted_makespan_s is not None
        return self.plan.predicted_makespan_s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A way to cut the layer, ordered."""

    problem: Problem
    schedule: Schedule
    label: str


class Search:
    """The search for one batch shape on one profile.

    Args:
        profile: What operations take.
        shape: The batch.
        time_limit_s: When to stop at the latest.
        report: Is told what happens, line by line.
        is_quick: Cut in the middle, and give every task of a resource the same share: seconds, for one of many shapes.
    """

    def __init__(
        self,
        profile: Profile,
        shape: BatchShape,
        *,
        time_limit_s: float = 60.0,
        report: Report = lambda _line: None,
        is_quick: bool = False,
    ) -> None:
        self._profile, self._shape, self._report, self._is_quick = profile, shape, report, is_quick
        self._begin_s = time.monotonic()
        self._time_limit_s = time_limit_s

    def run(self) -> SearchResult:
        """Try all candidates; the sequential plan if nothing is predicted to win."""
        graphs = graphs_of(self._profile)
        sequential_s = min(self._makespan_s(graph, sequential_plan(graph, self._shape.num_tokens)) for graph in graphs)
        self._report(f"sequential: {sequential_s * 1e6:,.1f} us a layer")
        candidates = sorted(
            (candidate for graph in graphs for candidate in self._structures(graph)), key=self._least_period_s
        )
        attempts = []
        for candidate in self._promising(candidates, sequential_s):
            attempts += list(self._allocations(candidate))
            if self._left_s() <= 0:
                self._report("the time limit ends the search")
                break
        attempts += [attempt for graph in graphs for attempt in self._carried(graph)]
        return self._choose(graphs[0], sequential_s, candidates, attempts)

    def _structures(self, graph: OpGraph) -> Iterator[_Candidate]:
        """Stage 1: two nano-batches at every place; more at the beginning of the layer where a bubble remains."""
        table = CostTable(self._profile, graph)
        groups = groups_of(graph)
        for boundary in self._boundaries():
            if self._left_s() <= 0:
                continue
            two = dict.fromkeys((group.name for group in groups), (boundary,))
            candidate = self._structure(graph, table, two, f"2 nano-batches at {boundary}")
            if candidate is None:
                continue
            yield candidate
            more = () if self._is_quick else halves(self._shape.num_tokens, boundary)
            if _bubble(candidate) > _BUBBLE and len(more) > 1:
                refined = self._structure(
                    graph,
                    table,
                    {**two, **dict.fromkeys(_until_attention(groups), more)},
                    f"4 nano-batches until attention, 2 at {boundary} after it",
                )
                if refined is not None and refined.schedule.period_s < candidate.schedule.period_s * (1 - 1e-3):
                    yield refined

    def _boundaries(self) -> list[int]:
        """Where to cut in two: anywhere but near the ends, or only in the middle."""
        num_tokens = self._shape.num_tokens
        found = [place for place in range(_STEP, num_tokens, _STEP) if 0.2 <= place / num_tokens <= 0.8]
        return sorted(found, key=lambda place: abs(place - num_tokens / 2))[:1] if self._is_quick else found

    def _structure(self, graph: OpGraph, table: CostTable, splits: Splits, label: str) -> _Candidate | None:
        problem = make_problem(graph, table, self._shape, splits)
        effort = Effort(num_nodes=_STRUCTURE_NODES, time_limit_s=max(self._left_s(), 0.1))
        schedule = solve_structure(problem, max_stages=_MAX_STAGES, effort=effort)
        return None if schedule is None else _Candidate(problem=problem, schedule=schedule, label=label)

    def _promising(self, candidates: Sequence[_Candidate], sequential_s: float) -> Iterator[_Candidate]:
        """The few that shares could make fastest, if they could win at all."""
        for candidate in candidates[:_MAX_ALLOCATIONS]:
            if self._least_period_s(candidate) < sequential_s * (1 - _LEAST_GAIN):
                self._report(f"{candidate.label}: {candidate.schedule.period_s * 1e6:,.1f} us without interference")
                yield candidate

    def _least_period_s(self, candidate: _Candidate) -> float:
        """What no shares of any mechanism can undercut."""
        interference = Interference(self._profile, candidate.problem.graph)
        bounds = [
            least_period_s(candidate.problem, candidate.schedule, interference, self._profile.setup, mechanism)
            for mechanism in interference.mechanisms
        ]
        return min(bounds, default=candidate.schedule.period_s)

    def _allocations(self, candidate: _Candidate) -> Iterator[Attempt]:
        """Stage 2 under every mechanism that pairs were measured with."""
        interference = Interference(self._profile, candidate.problem.graph)
        yield from self._on_halves(candidate, interference)
        if not self._is_quick:
            yield from self._on_any_shares(candidate, interference)

    def _on_halves(self, candidate: _Candidate, interference: Interference) -> Iterator[Attempt]:
        """The device divided in two once, ordered anew for each way to divide it; the most even one first."""
        best_s = math.inf
        for even in divisions(candidate.problem, interference):
            if even.least_period_s >= best_s * _CLOSE or self._left_s() <= 0:
                break
            effort = Effort(num_nodes=_STRUCTURE_NODES, time_limit_s=max(self._left_s(), 0.1))
            schedule = solve_structure(even.problem, max_stages=_MAX_STAGES, effort=effort)
            if schedule is not None:
                allocation = Allocation(mechanism=even.mechanism, schedule=schedule, shares=even.shares)
                attempt = self._attempt(even.problem, allocation, f"{even.name}, {candidate.label}")
                best_s = min(best_s, attempt.makespan_s)
                yield attempt

    def _on_any_shares(self, candidate: _Candidate, interference: Interference) -> Iterator[Attempt]:
        """Every task on a share of its own, in the order of stage 1."""
        for mechanism in interference.mechanisms:
            effort = Effort(num_nodes=_ALLOCATION_NODES, time_limit_s=max(self._left_s(), 0.1) / 2)
            allocation = allocate(
                candidate.problem,
                candidate.schedule,
                interference,
                self._profile.setup,
                mechanism=mechanism,
                max_stages=_MAX_STAGES,
                effort=effort,
            )
            if allocation is None:
                self._report(f"{candidate.label}, {mechanism}: no shares found in time")
                continue
            yield self._attempt(candidate.problem, allocation, f"{mechanism}, {candidate.label}")

    def _carried(self, graph: OpGraph) -> Iterator[Attempt]:
        """Decode attention inside products: any of them, at every rate that was measured, and no order to look for."""
        if not can_be_carried(graph):
            return
        shares, runs = Interference(self._profile, graph).carry.shares, list(carrying_runs(graph))
        for share, boundary, carrying in itertools.product(shares, self._boundaries(), runs):
            plan = carry_plan(graph, self._shape.num_tokens, boundary, share, carrying)
            makespan_s = self._makespan_s(graph, plan)
            self._report(f"{plan.name}: {makespan_s * 1e6:,.1f} us predicted")
            yield Attempt(
                plan=_with_makespan(plan, makespan_s),
                period_s=makespan_s,
                least_period_s=makespan_s,
                makespan_s=makespan_s,
            )

    def _attempt(self, problem: Problem, allocation: Allocation, name: str) -> Attempt:
        plan = emit(problem, allocation, name)
        plan.validate(problem.graph)
        makespan_s = self._makespan_s(problem.graph, plan)
        self._report(
            f"{plan.name}: {makespan_s * 1e6:,.1f} us predicted, {allocation.schedule.period_s * 1e6:,.1f} us "
            f"planned, gap {allocation.schedule.gap:.1%}"
        )
        return Attempt(
            plan=_with_makespan(plan, makespan_s),
            period_s=allocation.schedule.period_s,
            least_period_s=allocation.schedule.least_period_s,
            makespan_s=makespan_s,
        )

    def _makespan_s(self, graph: OpGraph, plan: PipelinePlan) -> float:
        table, interference = CostTable(self._profile, graph), Interference(self._profile, graph)
        return PlanSimulator(plan, graph, table, interference).run(self._shape).period_s

    def _choose(
        self, graph: OpGraph, sequential_s: float, candidates: Sequence[_Candidate], attempts: Sequence[Attempt]
    ) -> SearchResult:
        best = min(attempts, key=lambda attempt: attempt.makespan_s, default=None)
        plan = _with_makespan(sequential_plan(graph, self._shape.num_tokens), sequential_s)
        least_s = min((candidate.schedule.least_period_s for candidate in candidates), default=sequential_s)
        if best is not None and best.makespan_s < sequential_s * (1 - _LEAST_GAIN):
            plan, reason = best.plan, f"{sequential_s / best.makespan_s:.3f}x of sequential"
        elif best is not None:
            reason = f"sequential: the best overlap is predicted at {sequential_s / best.makespan_s:.3f}x of it"
        elif candidates:
            reason = "sequential: no pair of operations was measured, or nothing would win without interference"
        else:
            reason = f"sequential: {self._shape.num_tokens} tokens cannot be cut into nano-batches of {_STEP}"
        return SearchResult(
            plan=plan,
            sequential_s=sequential_s,
            least_period_s=min(least_s, sequential_s),
            attempts=tuple(attempts),
            reason=reason,
            elapsed_s=time.monotonic() - self._begin_s,
        )

    def _left_s(self) -> float:
        return self._begin_s + self._time_limit_s - time.monotonic()


def halves(num_tokens: int, boundary: int) -> tuple[int, ...]:
    """Boundaries of four nano-batches: both sides of a boundary cut near the middle."""
    found = {boundary}
    for tokens in split(num_tokens, (boundary,)):
        middle = tokens.start + round(tokens.num_tokens / 2 / _STEP) * _STEP
        found |= {middle} if tokens.start < middle < tokens.stop else set()
    return tuple(sorted(found))


def _until_attention(groups: Sequence[Group]) -> list[str]:
    """Groups up to the first one bound by memory: what the paper cuts in four."""
    memory_bound = [place for place, group in enumerate(groups) if group.resource is Resource.MEMORY]
    return [group.name for group in groups[: memory_bound[0] + 1]] if memory_bound else []


def _bubble(candidate: _Candidate) -> float:
    """The part of a period in which no product runs."""
    busy = sum(
        length
        for task, length in zip(candidate.problem.tasks, candidate.schedule.lengths, strict=True)
        if task.group.resource is Resource.COMPUTE
    )
    return 1.0 - busy


def _with_makespan(plan: PipelinePlan, makespan_s: float) -> PipelinePlan:
    return PipelinePlan(
        name=plan.name,
        num_tokens=plan.num_tokens,
        lanes=plan.lanes,
        nano_operations=plan.nano_operations,
        predicted_makespan_s=makespan_s,
    )
