"""A plan book for the batches of a run: a quick search for each cell of alike batches, and the best plan of all for it.

Where the iterations come from is the caller's (a simulated run of a workload); cells are `shapes.py`'s. A prediction
is off by some percent, which is as much as there is to win: where a GPU is at hand, plans that may win are tried on it
(`profiler/iterations.py`), and only those that do win stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nanoflow.cost.table import Profile
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanEntry
from nanoflow.plan.plan import PipelinePlan
from nanoflow.search.iteration import IterationModel
from nanoflow.search.search import Search
from nanoflow.search.shapes import LEAST_GAIN, Cell, best_entry, cells_of

# Cells are searched until they cover so much of the run's time.
_COVERED = 0.98
# What a plan must be predicted to win to be tried: predictions of both sides are off by some percent.
LEAST_GAIN_TO_TRY = 0.96


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPlan:
    """What a cell is worth.

    Attributes:
        cell: The batches.
        part: Their part of the run's time.
        entry: The plan and its range; None if nothing wins there.
        gain: Time sequentially / under the best plan, as predicted.
        measured_gain: The same on a device; None if it was not tried.
    """

    cell: Cell
    part: float
    entry: PlanEntry | None
    gain: float
    measured_gain: float | None = None

    @property
    def saved(self) -> float:
        """Part of the run's time that the plan saves: as measured, else as predicted."""
        if self.entry is None:
            return 0.0
        return self.part * (1.0 - 1.0 / (self.gain if self.measured_gain is None else self.measured_gain))

    def confirmed(self, measured_gain: float) -> FoundPlan:
        """With what a device says; the plan stays only if it wins there too."""
        entry = self.entry if measured_gain >= LEAST_GAIN else None
        return replace(self, entry=entry, measured_gain=measured_gain)


def search_book(
    profile: Profile,
    iterations: Sequence[tuple[BatchShape, float]],
    *,
    max_batch_tokens: int,
    time_limit_s: float,
    least_gain: float = LEAST_GAIN,
) -> Iterator[FoundPlan]:
    """Cell after cell, those that take the most time first, each as soon as it has been searched.

    Args:
        profile: What operations take.
        iterations: Every iteration of a run, sequential, with the time it takes.
        max_batch_tokens: The token budget.
        time_limit_s: For one cell at most.
        least_gain: What a plan must be predicted to win; less than 1 for plans that will be tried.
    """
    model = IterationModel(profile)
    sequential_s: dict[BatchShape, float] = {}

    def predict(shape: BatchShape, plan: PipelinePlan | None) -> float:
        if plan is not None:
            return model.predict(shape, plan).iteration_s
        if shape not in sequential_s:
            sequential_s[shape] = model.predict(shape).iteration_s
        return sequential_s[shape]

    total_s, covered_s = sum(time_s for _, time_s in iterations), 0.0
    plans: dict[str, PipelinePlan] = {}
    for cell in cells_of(iterations, max_batch_tokens):
        if covered_s > _COVERED * total_s:
            break
        covered_s += cell.time_s
        result = Search(profile, cell.middle, time_limit_s=time_limit_s, is_quick=True).run()
        for plan in (result.plan, *(attempt.plan for attempt in result.attempts)):
            plans[plan.digest] = plan
        entry, gain = best_entry(plans.values(), cell, predict, least_gain)
        yield FoundPlan(cell=cell, part=cell.time_s / total_s, entry=entry, gain=gain)
