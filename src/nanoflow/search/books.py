"""A plan book for the batches of a run: a search for each cell of alike batches, and the best of all plans for it.

The caller brings the iterations (a simulated run of a workload); `shapes.py` groups them in cells. A prediction is off
by some percent, which is as much as there is to win. So where a GPU is at hand, plans that may win are tried on it
(`trials/iterations.py`), and only those that do win stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanEntry
from nanoflow.plan.plan import PipelinePlan
from nanoflow.profile.host_link import NO_COPIES, Copies
from nanoflow.profile.table import Profile
from nanoflow.search.search import Search
from nanoflow.search.shapes import LEAST_GAIN, Cell, cells_of, entry_of, leading, least_predicted_gain, ranked
from nanoflow.simulate.iteration import IterationModel

# Cells are searched until they cover so much of the run's time.
_COVERED = 0.98
# Best plans of a cell's median batch, of any mechanism. They are compared on all batches that stand for the cell, and
# for later cells.
_PLANS_A_CELL = 4
# Least predicted gain of a plan that is tried: predictions of both plans are off by some percent.
_LEAST_GAIN_TO_TRY = 0.99
# Plans of a cell that are tried, of any mechanism; and of a cell with at least the part `_COMMON` of the run's time.
# Predictions do not rank plans more finely than that.
_BEST_TO_TRY, _BEST_OF_COMMON, _COMMON = 2, 4, 0.02
# Plans are tried in cells that cover so much of the run's time; a trial takes as long for a rare kind of batch.
_TRIED = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPlan:
    """What a cell is worth.

    Attributes:
        cell: The batches.
        part: Their part of the run's time.
        gain: Predicted time under the sequential plan / under the best plan.
        plans: The plans that may win there, the best one first; none if nothing does.
        measured_gain: Of the first of them on a device; None if none was tried.
        candidate: The plan that `gain` is predicted of, kept or not; None if no plan could win at all.
        margin: As of `BookSearch`.
    """

    cell: Cell
    part: float
    gain: float
    plans: tuple[PipelinePlan, ...]
    measured_gain: float | None = None
    candidate: PipelinePlan | None = None
    margin: float | None = None

    @property
    def entry(self) -> PlanEntry | None:
        """The best plan and its range; None if nothing wins there."""
        return entry_of(self.plans[0], self.cell) if self.plans else None

    @property
    def expected_gain(self) -> float:
        """Of its best plan: as measured, else as predicted; nobody runs a plan that was tried and loses."""
        if not self.plans:
            return 1.0
        return max(self.gain, 1.0) if self.measured_gain is None else self.measured_gain

    @property
    def trusted(self) -> FoundPlan:
        """Without a trial: the best plan stays if the prediction is safe."""
        is_safe = bool(self.plans) and self.gain >= least_predicted_gain(self.plans[0], self.margin)
        return replace(self, plans=self.plans[:1] if is_safe else ())

    def confirmed(self, gains: Sequence[float]) -> FoundPlan:
        """With what a device says of each plan; the best stays, if it wins there too."""
        best = max(range(len(gains)), key=lambda place: gains[place])
        plans = self.plans[best : best + 1] if gains[best] >= LEAST_GAIN else ()
        return replace(self, plans=plans, measured_gain=gains[best])


class BookSearch:
    """Searches plans for the cells of one run after the other, and keeps them for cells that are alike.

    Args:
        profile: What operations take.
        time_limit_s: For one cell at most.
        will_be_tried: Give several plans a cell, those too that may lose; else one that is safely predicted to win.
        margin: What that is, as a part, in place of what is known of each kind of lanes.
        copies: Of KV pages, beside every iteration.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        time_limit_s: float,
        will_be_tried: bool = False,
        margin: float | None = None,
        copies: Copies = NO_COPIES,
    ) -> None:
        self._profile, self._time_limit_s, self._will_be_tried = profile, time_limit_s, will_be_tried
        self._margin = margin
        self._model = IterationModel(profile, copies=copies)
        self._plans: dict[str, PipelinePlan] = {}
        self._searched: set[tuple[int, tuple[float, float]]] = set()

    def found(self, iterations: Sequence[tuple[BatchShape, float]], max_batch_tokens: int) -> Iterator[FoundPlan]:
        """Cell after cell, those that take the most time first, each as soon as it has been searched.

        Args:
            iterations: Every iteration of a run, sequential, with the time it takes.
            max_batch_tokens: The token budget.
        """
        total_s = sum(time_s for _, time_s in iterations)
        for cell in covering_cells(iterations, max_batch_tokens):
            self._search(cell)
            found = ranked(self._plans.values(), cell, self._model.iteration_s)
            if self._will_be_tried:
                count = _BEST_OF_COMMON if cell.time_s >= _COMMON * total_s else _BEST_TO_TRY
                promising = leading([plan for gain, plan in found if gain >= _LEAST_GAIN_TO_TRY], count)
                kept = [each for each in found if each[1] in promising]
            else:
                kept = [each for each in found if each[0] >= least_predicted_gain(each[1], self._margin)][:1]
            gain, candidate = next(iter((*kept, *found)), (1.0, None))
            yield FoundPlan(
                cell=cell,
                part=cell.time_s / total_s,
                gain=gain,
                plans=tuple(plan for _, plan in kept),
                candidate=candidate,
                margin=self._margin,
            )

    def _search(self, cell: Cell) -> None:
        """Search for the cell's median batch, unless one was made for batches of its size and keys before."""
        key = (cell.max_tokens, cell.keys)
        if key in self._searched:
            return
        self._searched.add(key)
        result = Search(self._profile, cell.median_batch, time_limit_s=self._time_limit_s).run()
        attempts = sorted(result.attempts, key=lambda attempt: attempt.makespan_s)
        plans = leading([attempt.plan for attempt in attempts], _PLANS_A_CELL)
        self._plans |= {plan.digest: plan for plan in plans}


def search_book(
    profile: Profile,
    iterations: Sequence[tuple[BatchShape, float]],
    *,
    max_batch_tokens: int,
    time_limit_s: float,
    will_be_tried: bool = False,
) -> Iterator[FoundPlan]:
    """One run's cells; arguments as of `BookSearch` and `BookSearch.found`."""
    search = BookSearch(profile, time_limit_s=time_limit_s, will_be_tried=will_be_tried)
    return search.found(iterations, max_batch_tokens)


def gain_under(found: Sequence[FoundPlan]) -> Callable[[BatchShape], float]:
    """How much faster a batch is with what was found for its cell: as measured, else as predicted; 1 without a plan."""
    entries = [(each.entry, each.expected_gain) for each in found if each.entry is not None]

    def gain(shape: BatchShape) -> float:
        return next((gain for entry, gain in entries if entry.fits(shape)), 1.0)

    return gain


def divided(found: Sequence[FoundPlan]) -> tuple[list[FoundPlan], list[FoundPlan]]:
    """Cells whose plans are worth a trial, and those that are too rare; both in order, the most time first."""
    before = itertools.accumulate((each.part for each in found), initial=0.0)
    is_tried = [bool(each.plans) and part < _TRIED for each, part in zip(found, before, strict=False)]
    return list(itertools.compress(found, is_tried)), [
        each for each, tried in zip(found, is_tried, strict=True) if not tried
    ]


def covering_cells(iterations: Sequence[tuple[BatchShape, float]], max_batch_tokens: int) -> Iterator[Cell]:
    """Cells of the iterations of a run, those that take the most time first, until what is left is little."""
    left_s = sum(time_s for _, time_s in iterations)
    least_s = (1.0 - _COVERED) * left_s
    for cell in cells_of(iterations, max_batch_tokens):
        if left_s < least_s:
            return
        left_s -= cell.time_s
        yield cell
