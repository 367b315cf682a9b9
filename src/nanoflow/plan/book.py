"""The plan book: which pipeline plan to run for a batch of a given shape. The sequential plan is the fallback."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.plan import PipelinePlan, PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """A plan and the batch sizes it is for, both ends included."""

    plan: PipelinePlan
    min_tokens: int
    max_tokens: int

    def fits(self, shape: BatchShape) -> bool:
        """True if the plan is meant for such a batch."""
        return self.min_tokens <= shape.num_tokens <= self.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBook:
    """Plans by batch shape.

    Attributes:
        fallback: Runs any batch within the token budget (the sequential plan).
        entries: The first that fits is taken.
    """

    fallback: PipelinePlan
    entries: tuple[PlanEntry, ...] = ()

    def __post_init__(self) -> None:
        for entry in self.entries:
            if entry.max_tokens > entry.plan.num_tokens:
                raise PlanError(
                    f"plan {entry.plan.name!r} is for {entry.plan.num_tokens} tokens, not for {entry.max_tokens}"
                )

    @property
    def plans(self) -> tuple[PipelinePlan, ...]:
        """Every plan in the book, the fallback first."""
        return (self.fallback, *(entry.plan for entry in self.entries))

    def choose(self, shape: BatchShape) -> PipelinePlan:
        """The plan to run for a batch of this shape."""
        return next((entry.plan for entry in self.entries if entry.fits(shape)), self.fallback)
