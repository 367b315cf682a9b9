"""Texts of `nanoflow search` about candidates: what each is compared with, and why it was chosen or not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from nanoflow.plan.plan import PipelinePlan
from nanoflow.search.books import FoundPlan
from nanoflow.search.limits import LimitsFound, WithPlans
from nanoflow.search.shapes import LEAST_GAIN, least_predicted_gain
from nanoflow.timeline.drawing import faster_or_slower

COMPARED = "x: speed under a plan / under the sequential plan, of the same batches under the same limits"


def cell_line(found: FoundPlan) -> str:
    """A line about a cell: its share of the time, its batches, and the outcome."""
    cell = found.cell
    (low_share, high_share), (low_keys, high_keys) = cell.decode_share, cell.decode_context
    return (
        f"{found.part:6.1%} of the time: {cell.min_tokens:,} to {cell.max_tokens:,} tokens, {low_share:.0%} to "
        f"{high_share:.0%} decodes with {low_keys:,.0f} to {high_keys:,.0f} keys: {_verdict(found)}"
    )


def _verdict(found: FoundPlan) -> str:
    """The chosen plan and its gain, or why the cell runs sequentially."""
    if found.measured_gain is not None:
        kept = "sequential" if found.entry is None else named(found.entry.plan)
        return f"{found.gain:.3f}x predicted, measured {found.measured_gain:.3f}x, {kept}"
    if found.entry is not None:
        return f"{found.gain:.3f}x, {named(found.entry.plan)}"
    if found.candidate is None:
        return "sequential; no way to overlap can win there"
    if found.gain < 1.0:
        return f"sequential; the best candidate is {faster_or_slower(found.gain)} ({found.candidate.name})"
    least = least_predicted_gain(found.candidate, found.margin)
    return f"sequential; the best candidate wins {found.gain:.3f}x, needs {least:.3f}x ({found.candidate.name})"


def named(plan: PipelinePlan) -> str:
    """A plan as its name and digest."""
    return f"{plan.name} ({plan.digest})"


def why_none(searched: Sequence[WithPlans], best: LimitsFound, *, is_measured: bool, was_tried: bool) -> Iterator[str]:
    """Lines on a search that found no plans: the nearest candidate, why it was not chosen, and what would change that.

    Args:
        searched: What was found under each of the limits.
        best: The best sequential run.
        is_measured: Whether the profile was measured; plans from an estimate cannot be tried.
        was_tried: Whether plans were tried on the device.
    """
    kept = [each for each in searched if any(plan.plans for plan in each.plans)]
    if kept:
        first = max(kept, key=lambda each: each.rate)
        yield (
            f"the best run with plans, under {first.limits}, is {faster_or_slower(first.rate / best.rate)} than the "
            f"sequential one under {best.limits}"
        )
    candidates = [
        (each, plan) for each in searched for plan in each.plans if plan.candidate is not None and not plan.plans
    ]
    if not candidates and not kept:
        yield "no candidate could win under any limits, whatever lanes and shares it had"
    elif candidates:
        yield from _nearest(
            *max(candidates, key=lambda found: found[1].gain), is_measured=is_measured, was_tried=was_tried
        )


def _nearest(under: WithPlans, found: FoundPlan, *, is_measured: bool, was_tried: bool) -> Iterator[str]:
    """Lines on the best candidate that was not chosen, and what would change that."""
    assert found.candidate is not None
    least = least_predicted_gain(found.candidate, found.margin)
    yield (
        f"best candidate: {found.gain:.3f}x, predicted, on batches of {found.cell.min_tokens:,} to "
        f"{found.cell.max_tokens:,} tokens that take {found.part:.1%} of the time under {under.limits}: "
        f"{named(found.candidate)}"
    )
    if found.gain < LEAST_GAIN:
        yield f"not kept: it is predicted to be {faster_or_slower(found.gain)}"
        return
    if was_tried:
        return
    if found.gain < least:
        trial = (
            "--measure tries it on the card" if is_measured else "a profile measured on the card lets --measure try it"
        )
        percent = math.floor((found.gain - 1.0) * 1000) / 10
        yield (
            f"not kept: below the margin of {(least - 1) * 100:.1f} % for plans without trials; {trial}, or "
            f"--margin {percent:g} keeps it untried, where the whole run gains by it"
        )
