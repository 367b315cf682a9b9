"""Rungs that take turns on one engine in its steady state: its first requests, turns, and what each rung is worth.

No engine is known here; `steady.py` drives one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from benchmarks.ladder import SEQUENTIAL
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanBook
from nanoflow.plan.plan import PipelinePlan

STEADY_VERSION = 1
# Batches of a rung that are predicted: they are much alike.
_MOST_PREDICTED = 64


@dataclass(slots=True)
class Watched:
    """A plan book that notes which batches it was asked for."""

    book: PlanBook
    shapes: list[BatchShape] = field(default_factory=list)

    @property
    def plans(self) -> tuple[PipelinePlan, ...]:
        """Of the book."""
        return self.book.plans

    def choose(self, shape: BatchShape) -> PipelinePlan:
        """What the book chooses."""
        self.shapes.append(shape)
        return self.book.choose(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A rung's turn, without the time in which it settled.

    Attributes:
        rung: Whose.
        start_s, stop_s: From the end of an iteration to that of another one.
        num_iterations, num_planned: In between, and those of them that did not run sequentially.
        num_tokens, num_prompt_tokens: That the model worked through, and those of them that are of prompts.
        shapes: Batches of those iterations, give or take one.
        energy_j: None without a counter.
    """

    rung: str
    start_s: float
    stop_s: float
    num_iterations: int
    num_planned: int
    num_tokens: int
    num_prompt_tokens: int
    shapes: Sequence[BatchShape]
    energy_j: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Rate."""
        return self.num_tokens / (self.stop_s - self.start_s)

    @property
    def energy_per_token_j(self) -> float | None:
        """None without a counter."""
        return None if self.energy_j is None else self.energy_j / self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyRung:
    """A rung of a workload; lists have a value a turn.

    Attributes:
        rung, book: Its name, and the digest of its plan book.
        tokens_per_s, energy_per_token_j: Energies are None without a counter.
        ratios: Rate / that of the sequential turn of the same round.
        weighed_ratio: The same of all turns together, with batches instead of tokens, each counted as the time that it
            is predicted to take sequentially: what it is without what the rungs' batches differ by.
        iteration_tokens, prompt_part, decode_context: What an iteration had: tokens, those of prompts as a part of
            them, and keys of a decode token; means.
        planned_part: Part of the iterations that did not run sequentially.
        predicted_ratio: Time that the profile predicts for the batches of these turns sequentially / under the book.
    """

    rung: str
    book: str
    tokens_per_s: Sequence[float]
    energy_per_token_j: Sequence[float] | None
    ratios: Sequence[float]
    weighed_ratio: float
    iteration_tokens: float
    prompt_part: float
    decode_context: float
    planned_part: float
    predicted_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyWorkload:
    """All rungs of a workload, and its bounds in tokens/s (None if they were not measured)."""

    workload: str
    created_utc: str
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


def order_of_turns(rungs: Sequence[str], num_rounds: int) -> Iterator[str]:
    """Every rung once a round, forwards and backwards in turn, so that what drifts evenly tells for none."""
    for turn in range(num_rounds):
        yield from rungs if turn % 2 == 0 else reversed(rungs)


def rungs_of(
    turns: Sequence[Turn], books: Mapping[str, PlanBook], predicted_s: Callable[[str, BatchShape], float]
) -> list[SteadyRung]:
    """What each rung is worth.

    Args:
        turns: Of all rungs, each as often as any other, the sequential one among them.
        books: By rung.
        predicted_s: Time of a batch under the book of a rung.
    """
    by_rung = {rung: [turn for turn in turns if turn.rung == rung] for rung in books}
    base = _Batches.of(SEQUENTIAL, by_rung[SEQUENTIAL], predicted_s)
    return [
        _rung(found, by_rung[SEQUENTIAL], books[rung].digest, _Batches.of(rung, found, predicted_s), base)
        for rung, found in by_rung.items()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batches:
    """Of a rung's turns: what one is predicted to take sequentially and under the book, and what one took; means."""

    sequential_s: float
    planned_s: float
    measured_s: float

    @staticmethod
    def of(rung: str, turns: Sequence[Turn], predicted_s: Callable[[str, BatchShape], float]) -> _Batches:
        shapes = [shape for turn in turns for shape in turn.shapes]
        some = shapes[:: -(-len(shapes) // _MOST_PREDICTED)]
        return _Batches(
            sequential_s=fmean(predicted_s(SEQUENTIAL, shape) for shape in some),
            planned_s=fmean(predicted_s(rung, shape) for shape in some),
            measured_s=sum(turn.stop_s - turn.start_s for turn in turns) / sum(turn.num_iterations for turn in turns),
        )


def _rung(
    turns: Sequence[Turn], sequential: Sequence[Turn], book: str, batches: _Batches, base: _Batches
) -> SteadyRung:
    shapes = [shape for turn in turns for shape in turn.shapes]
    energies_j = [turn.energy_per_token_j for turn in turns if turn.energy_per_token_j is not None]
    num_iterations, num_tokens = sum(turn.num_iterations for turn in turns), sum(turn.num_tokens for turn in turns)
    num_decodes = sum(shape.num_decode_tokens for shape in shapes)
    return SteadyRung(
        rung=turns[0].rung,
        book=book,
        tokens_per_s=[turn.tokens_per_s for turn in turns],
        energy_per_token_j=energies_j if len(energies_j) == len(turns) else None,
        ratios=[turn.tokens_per_s / base.tokens_per_s for turn, base in zip(turns, sequential, strict=True)],
        weighed_ratio=batches.sequential_s / batches.measured_s / (base.sequential_s / base.measured_s),
        iteration_tokens=num_tokens / num_iterations,
        prompt_part=sum(turn.num_prompt_tokens for turn in turns) / num_tokens,
        decode_context=sum(shape.decode_context for shape in shapes) / num_decodes if num_decodes else 0.0,
        planned_part=sum(turn.num_planned for turn in turns) / num_iterations,
        predicted_ratio=batches.sequential_s / batches.planned_s,
    )


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
            f"  {'rung':<14}{'tokens/s':>10}{'(least to most)':>20}{'ratio':>8}{'(least to most)':>18}{'weighed':>9}"
            f"{'predicted':>11}{'mJ/token':>10}{'planned':>9}{'tokens':>8}{'prompt':>8}{'keys':>8}"
        )
        for rung in workload.rungs:
            energy = "-" if rung.energy_per_token_j is None else f"{fmean(rung.energy_per_token_j) * 1e3:.1f}"
            rates, ratios = rung.tokens_per_s, rung.ratios
            lines.append(
                f"  {rung.rung:<14}{fmean(rates):>10,.0f}{f'({min(rates):,.0f} to {max(rates):,.0f})':>20}"
                f"{fmean(ratios):>8.3f}{f'({min(ratios):.3f} to {max(ratios):.3f})':>18}"
                f"{rung.weighed_ratio:>9.3f}{rung.predicted_ratio:>11.3f}"
                f"{energy:>10}{rung.planned_part:>9.0%}{rung.iteration_tokens:>8,.0f}{rung.prompt_part:>8.0%}"
                f"{rung.decode_context:>8,.0f}"
            )
    return "\n".join(lines)
