"""The plans that an engine chooses from, as front ends know them: names and digests, and what is drawn of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.plan.plan import PipelinePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanName:
    """Name of a pipeline plan, and digest of its content."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BookFacts:
    """The plans that an engine chooses from.

    Attributes:
        digest: Digest of the book's entries; the same as that of the stored book.
        plans: All plans, the fallback first.
        contents: The same plans as a whole, to be drawn; empty if only their names are known.
        waits: For each of these, by its digest: `plan.dependencies.waits_in_period`.
        resources: What bounds each operation that they order: compute, memory or network.
    """

    digest: str
    plans: tuple[PlanName, ...]
    contents: tuple[PipelinePlan, ...] = ()
    waits: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    resources: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The plan's name and digest if there is one beside the fallback or none but the fallback, else the book's."""
        chosen = self.plans[1:] or self.plans
        if len(chosen) == 1:
            return f"{chosen[0].name} ({chosen[0].digest})"
        return f"book ({self.digest}) of {len(chosen)} plans"
