"""Auto-search: cut the layer, order it (stage 1), share the device (stage 2), keep a plan only if it should win.

It is the same search for one batch and for each kind of batch of a plan book. What is cheap comes first:

1. The layer is cut in two at a few places, and ordered for each (`cuts.py`).
2. The device is divided in two for a whole layer, and the tasks are ordered anew for that (`divide.py`).
3. Products carry decode attention, where kernels for that were measured (`carry.py`).
4. Every task gets a share of its own, by the paper's program (`allocate.py`). It must beat the best plan so far, which
   the solver is told: where it cannot, that is mostly proven in hundredths of a second.

A search is anytime: the first plan is the sequential one, and each attempt may replace it. Nodes of the programs, not
seconds, end a stage, so equal inputs give equal plans unless the time limit strikes. How plans are measured on a device
is `trials/`'s.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.interference import Interference
from nanoflow.profile.table import CostTable, Profile
from nanoflow.search.allocate import Allocation, allocate, least_period_s
from nanoflow.search.carry import can_be_carried, carry_plan, carrying_runs
from nanoflow.search.cuts import MAX_STAGES, STEP, STRUCTURE_NODES, Candidate, boundaries, candidates
from nanoflow.search.divide import divisions
from nanoflow.search.emit import emit
from nanoflow.search.problem import Problem
from nanoflow.search.structure import Deadline, solve_structure
from nanoflow.simulate.iteration import graphs_of
from nanoflow.simulate.layer import PlanSimulator

_ALLOCATION_NODES = 2500
# Candidates that shares are searched for.
_MAX_SHARED = 3
# Smallest batch for which shares are searched. In smaller ones the solver takes seconds to prove that nothing is found:
# its bound is loose where products are bound by memory too (docs/log, one path of the search).
_LEAST_SHARED_TOKENS = 1024
# Ways to divide the device are followed as long as their bound is at most this factor above the best one's makespan:
# a prediction tells no more than that.
_CLOSE = 1.04
# What a plan must win under the simulator.
_LEAST_GAIN = 0.005

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A plan that was found, whether it wins or not.

    Attributes:
        plan: The plan.
        period_s: As the program that ordered it planned it.
        least_period_s: No plan of that program can have a shorter period; as far as its solver has proven it.
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
        least_period_s: Makespan without interference of the best order; no shares can undercut it.
        attempts: In the order tried.
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
class _Layer:
    """A graph that a profile covers, with what its operations take alone and beside each other."""

    graph: OpGraph
    table: CostTable
    interference: Interference

    @staticmethod
    def of(profile: Profile, graph: OpGraph) -> _Layer:
        return _Layer(graph=graph, table=CostTable(profile, graph), interference=Interference(profile, graph))

    def makespan_s(self, plan: PipelinePlan, shape: BatchShape) -> float:
        return PlanSimulator(plan, self.graph, self.table, self.interference).run(shape).period_s


class Search:
    """The search for one batch shape on one profile.

    Args:
        profile: What operations take.
        shape: The batch.
        time_limit_s: When to stop at the latest.
        report: Is told what happens, line by line.
    """

    def __init__(
        self,
        profile: Profile,
        shape: BatchShape,
        *,
        time_limit_s: float = 60.0,
        report: Report = lambda _line: None,
    ) -> None:
        self._profile, self._shape, self._report = profile, shape, report
        self._begin_s, self._deadline = time.monotonic(), Deadline.after(time_limit_s)

    def run(self) -> SearchResult:
        """Try all candidates; the sequential plan if nothing is predicted to win."""
        layers = [_Layer.of(self._profile, graph) for graph in graphs_of(self._profile)]
        plans = [(layer, sequential_plan(layer.graph, self._shape.num_tokens)) for layer in layers]
        sequential_s = min(layer.makespan_s(plan, self._shape) for layer, plan in plans)
        self._report(f"sequential: {sequential_s * 1e6:,.1f} us a layer")
        found = [
            (layer, candidate)
            for layer in layers
            for candidate in candidates(layer.graph, layer.table, self._shape, self._deadline)
        ]
        promising = list(self._promising(found, sequential_s))
        attempts: list[Attempt] = []
        for layer, candidate in promising:
            attempts += self._divided(layer, candidate)
        for layer in layers:
            attempts += self._carried(layer)
        for layer, candidate in promising if self._shape.num_tokens >= _LEAST_SHARED_TOKENS else ():
            best_s = min((attempt.makespan_s for attempt in attempts), default=sequential_s)
            attempts += self._allocated(layer, candidate, min(best_s, sequential_s * (1 - _LEAST_GAIN)))
        if not self._deadline.left_s:
            self._report("the time limit ends the search")
        return self._choose(layers[0].graph, sequential_s, [candidate for _, candidate in found], attempts)

    def _promising(
        self, found: Sequence[tuple[_Layer, Candidate]], sequential_s: float
    ) -> Iterator[tuple[_Layer, Candidate]]:
        """The few that shares could make fastest, if they could win at all."""
        for layer, candidate in sorted(found, key=lambda each: self._least_period_s(*each))[:_MAX_SHARED]:
            if self._least_period_s(layer, candidate) < sequential_s * (1 - _LEAST_GAIN):
                self._report(f"{candidate.label}: {candidate.schedule.period_s * 1e6:,.1f} us without interference")
                yield layer, candidate

    def _least_period_s(self, layer: _Layer, candidate: Candidate) -> float:
        """What no shares of any mechanism can undercut."""
        bounds = [
            least_period_s(candidate.problem, candidate.schedule, layer.interference, self._profile.setup, mechanism)
            for mechanism in layer.interference.mechanisms
        ]
        return min(bounds, default=candidate.schedule.period_s)

    def _divided(self, layer: _Layer, candidate: Candidate) -> Iterator[Attempt]:
        """The device divided in two once, ordered anew for each way to divide it."""
        best_s = math.inf
        for division in divisions(candidate.problem, layer.interference):
            if division.least_period_s >= best_s * _CLOSE or not self._deadline.left_s:
                break
            effort = self._deadline.effort(STRUCTURE_NODES)
            schedule = solve_structure(division.problem, max_stages=MAX_STAGES, effort=effort)
            if schedule is not None:
                allocation = Allocation(mechanism=division.mechanism, schedule=schedule, shares=division.shares)
                attempt = self._attempt(layer, division.problem, allocation, f"{division.name}, {candidate.label}")
                best_s = min(best_s, attempt.makespan_s)
                yield attempt

    def _carried(self, layer: _Layer) -> Iterator[Attempt]:
        """Products that carry decode attention: any run of them, at every rate that was measured."""
        if not can_be_carried(layer.graph):
            return
        rates, runs = layer.interference.carry.shares, list(carrying_runs(layer.graph))
        for rate, boundary, carrying in itertools.product(rates, boundaries(self._shape.num_tokens), runs):
            plan = carry_plan(layer.graph, self._shape.num_tokens, boundary, rate, carrying)
            makespan_s = layer.makespan_s(plan, self._shape)
            self._report(f"{plan.name}: {makespan_s * 1e6:,.1f} us predicted")
            yield Attempt(
                plan=_with_makespan(plan, makespan_s),
                period_s=makespan_s,
                least_period_s=makespan_s,
                makespan_s=makespan_s,
            )

    def _allocated(self, layer: _Layer, candidate: Candidate, best_s: float) -> Iterator[Attempt]:
        """Every task on a share of its own in the order of stage 1, where that is planned to take less than so long."""
        for mechanism in layer.interference.mechanisms:
            if not self._deadline.left_s:
                return
            allocation = allocate(
                candidate.problem,
                candidate.schedule,
                layer.interference,
                self._profile.setup,
                mechanism=mechanism,
                max_stages=MAX_STAGES,
                effort=self._deadline.effort(_ALLOCATION_NODES, part=0.5),
                most_s=best_s,
            )
            if allocation is None:
                self._report(f"{mechanism}, {candidate.label}: no shares found that beat {best_s * 1e6:,.1f} us")
                continue
            attempt = self._attempt(layer, candidate.problem, allocation, f"{mechanism}, {candidate.label}")
            best_s = min(best_s, attempt.makespan_s)
            yield attempt

    def _attempt(self, layer: _Layer, problem: Problem, allocation: Allocation, name: str) -> Attempt:
        plan = emit(problem, allocation, name)
        plan.validate(problem.graph)
        makespan_s = layer.makespan_s(plan, self._shape)
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

    def _choose(
        self, graph: OpGraph, sequential_s: float, found: Sequence[Candidate], attempts: Sequence[Attempt]
    ) -> SearchResult:
        best = min(attempts, key=lambda attempt: attempt.makespan_s, default=None)
        plan = _with_makespan(sequential_plan(graph, self._shape.num_tokens), sequential_s)
        least_s = min((candidate.schedule.least_period_s for candidate in found), default=sequential_s)
        if best is not None and best.makespan_s < sequential_s * (1 - _LEAST_GAIN):
            plan, reason = best.plan, f"{sequential_s / best.makespan_s:.3f}x of sequential"
        elif best is not None:
            reason = f"sequential: the best overlap is predicted at {sequential_s / best.makespan_s:.3f}x of it"
        elif found:
            reason = "sequential: no pair of operations was measured, or nothing would win without interference"
        else:
            reason = f"sequential: {self._shape.num_tokens} tokens cannot be cut into nano-batches of {STEP}"
        return SearchResult(
            plan=plan,
            sequential_s=sequential_s,
            least_period_s=min(least_s, sequential_s),
            attempts=tuple(attempts),
            reason=reason,
            elapsed_s=time.monotonic() - self._begin_s,
        )


def _with_makespan(plan: PipelinePlan, makespan_s: float) -> PipelinePlan:
    return PipelinePlan(
        name=plan.name,
        num_tokens=plan.num_tokens,
        lanes=plan.lanes,
        nano_operations=plan.nano_operations,
        predicted_makespan_s=makespan_s,
    )
