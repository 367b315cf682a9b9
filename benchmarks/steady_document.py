"""What `steady.py` writes: a document of workloads, each with what its rungs are worth, and a table of it for people.

How that is reckoned from turns is `turns.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks.ladder import SEQUENTIAL
from nanoflow.bench.offline import impossible_power

STEADY_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanGain:
    """What a plan of a rung's book is worth on the batches that it ran.

    Attributes:
        plan, digest: Its name and digest.
        part: Of the rung's time.
        gain: What those batches took sequentially / what they took.
        predicted_gain: The same, both as predicted.
    """

    plan: str
    digest: str
    part: float
    gain: float
    predicted_gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyRung:
    """A rung of a workload; lists have a value a repeat.

    Attributes:
        rung, book: Its name, and the digest of its plan book.
        tokens_per_s, energy_per_token_j: Energies are None without a counter.
        gains: Time of the sequential rung / this one's, with the same batches.
        energy_ratios: Energy / that of the sequential rung, with the same batches.
        iteration_tokens, prompt_part, decode_context: What an iteration had: tokens, those of prompts as a part of
            them, and keys of a decode token; means.
        planned_part: Part of the iterations that did not run sequentially.
        predicted_gain: Time that the profile predicts for these batches sequentially / under the book.
        plans: Every plan that ran, those that took the most time first.
        energy_dropped: Why energies that were measured are not told; None if none was dropped.
    """

    rung: str
    book: str
    tokens_per_s: Sequence[float]
    energy_per_token_j: Sequence[float] | None
    gains: Sequence[float]
    energy_ratios: Sequence[float] | None
    iteration_tokens: float
    prompt_part: float
    decode_context: float
    planned_part: float
    predicted_gain: float
    plans: Sequence[PlanGain] = ()
    energy_dropped: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyWorkload:
    """All rungs of a workload, which may have been measured after others.

    Attributes:
        workload, created_utc, git_revision: Of these figures; the revision is None outside a repository.
        num_turns, turn_s: Turns of each rung in a repeat, and about the seconds of one.
        has_same_batches: Whether all rungs had the same batches. If not, gains are of batches that weigh the same: as
            they are predicted to take sequentially, corrected by what sequential turns took.
        serial_tokens_per_s, optimal_tokens_per_s: Bounds; None if they were not measured.
        rungs: What each is worth.
    """

    workload: str
    created_utc: str
    git_revision: str | None
    num_turns: int
    turn_s: float
    has_same_batches: bool
    serial_tokens_per_s: float | None
    optimal_tokens_per_s: float | None
    rungs: Sequence[SteadyRung]


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyDocument:
    """What `steady.py` writes."""

    model: str
    options: Mapping[str, Any]
    machine: Mapping[str, Any]
    software: Mapping[str, Any]
    workloads: Sequence[SteadyWorkload]
    benchmark: str = "steady"
    version: int = STEADY_VERSION


def without_impossible_energies(rungs: Sequence[SteadyRung], power_limit_w: float | None) -> list[SteadyRung]:
    """The rungs of a workload without energies whose mean power the card cannot have drawn.

    Args:
        rungs: The sequential one among them: without its energy no other one has a ratio to it.
        power_limit_w: Of the card; None if unknown.
    """
    reasons = {rung.rung: _impossible(rung, power_limit_w) for rung in rungs}
    found = []
    for rung in rungs:
        reason = reasons[rung.rung]
        if reason is not None:
            rung = replace(rung, energy_per_token_j=None, energy_ratios=None, energy_dropped=reason)
        elif reasons.get(SEQUENTIAL) is not None:
            rung = replace(rung, energy_ratios=None, energy_dropped=f"{SEQUENTIAL} rung: {reasons[SEQUENTIAL]}")
        found.append(rung)
    return found


def _impossible(rung: SteadyRung, power_limit_w: float | None) -> str | None:
    pairs = zip(rung.energy_per_token_j or (), rung.tokens_per_s, strict=False)
    return next(filter(None, (impossible_power(*pair, power_limit_w) for pair in pairs)), None)


def with_workload(document: SteadyDocument, new: SteadyWorkload) -> SteadyDocument:
    """With a workload, instead of the same one if that is there; constant lengths first, short before long ones."""
    kept = [each for each in document.workloads if each.workload != new.workload]
    return replace(document, workloads=sorted([*kept, new], key=lambda each: _place(each.workload)))


def _place(workload: str) -> tuple[bool, list[int], str]:
    lengths = workload.split("/")
    is_constant = all(length.isdecimal() for length in lengths)
    return (not is_constant, [int(length) for length in lengths] if is_constant else [], workload)


def table(workloads: Sequence[SteadyWorkload]) -> str:
    """For people: a block a workload, a line a rung."""
    lines = []
    for workload in workloads:
        bound = workload.serial_tokens_per_s
        lines.append(workload.workload if bound is None else f"{workload.workload}; serial bound {bound:,.0f} tokens/s")
        lines.append(
            f"  {'rung':<14}{'tokens/s':>10}{'gain':>8}{'(least to most)':>18}{'predicted':>11}{'energy':>9}"
            f"{'mJ/token':>10}{'planned':>9}{'tokens':>8}{'prompt':>8}{'keys':>8}"
        )
        for rung in workload.rungs:
            energy = "-" if rung.energy_per_token_j is None else f"{fmean(rung.energy_per_token_j) * 1e3:.1f}"
            ratio = "-" if rung.energy_ratios is None else f"{fmean(rung.energy_ratios):.3f}"
            lines.append(
                f"  {rung.rung:<14}{fmean(rung.tokens_per_s):>10,.0f}{fmean(rung.gains):>8.3f}{_span(rung.gains):>18}"
                f"{rung.predicted_gain:>11.3f}"
                f"{ratio:>9}{energy:>10}{rung.planned_part:>9.0%}{rung.iteration_tokens:>8,.0f}{rung.prompt_part:>8.0%}"
                f"{rung.decode_context:>8,.0f}"
            )
            lines += [
                f"    {each.part:4.0%} of its time {each.gain:.3f} (predicted {each.predicted_gain:.3f}) {each.plan}"
                for each in rung.plans
                if len(rung.plans) > 1
            ]
    return "\n".join(lines)


def _span(values: Sequence[float]) -> str:
    return f"({min(values):.3f} to {max(values):.3f})"
