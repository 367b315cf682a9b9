"""Rungs that take turns on one engine in its steady state: its first requests, turns, and what each rung is worth.

No engine is known here; `steady.py` drives one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.ladder import SEQUENTIAL
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanBook
from nanoflow.plan.plan import PipelinePlan

STEADY_VERSION = 1
# Turns whose prompt tokens are off the usual by this part of their tokens hardly differ.
_HARDLY = 0.01


@dataclass(frozen=True, slots=True)
class Watched:
    """A plan book that notes which batches it was asked for, the latest last."""

    book: PlanBook
    shapes: deque[BatchShape]

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
        rung, repeat: Whose, and of which repeat.
        start_s, stop_s: From the end of an iteration to that of another one.
        shapes: Batches of the iterations in between.
        num_planned: Of them, those that did not run sequentially.
        energy_j: None without a counter.
    """

    rung: str
    repeat: int
    start_s: float
    stop_s: float
    shapes: Sequence[BatchShape]
    num_planned: int
    energy_j: float | None = None

    @property
    def num_tokens(self) -> int:
        """That the model worked through."""
        return sum(shape.num_tokens for shape in self.shapes)

    @property
    def num_prompt_tokens(self) -> int:
        """Those of them that are of prompts."""
        return sum(shape.num_tokens - shape.num_decode_tokens for shape in self.shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyRung:
    """A rung of a workload; lists have a value a repeat.

    Attributes:
        rung, book: Its name, and the digest of its plan book.
        tokens_per_s, energy_per_token_j: Energies are None without a counter.
        ratios: Rate / that of the sequential rung in the same repeat.
        weighed_ratios: The same with batches instead of tokens, each counted as what it takes sequentially (`Weight`):
            what the rungs' batches differ by is left out.
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
    weighed_ratios: Sequence[float]
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


def order_of_turns(rungs: Sequence[str], num_rounds: int) -> Iterator[tuple[int, str]]:
    """Every rung once a round, forwards and backwards in turn, so that what drifts evenly tells for none."""
    for turn in range(num_rounds):
        yield from ((turn, rung) for rung in (rungs if turn % 2 == 0 else reversed(rungs)))


def rungs_of(
    turns: Sequence[Turn], books: Mapping[str, PlanBook], predicted_s: Callable[[str, BatchShape], float]
) -> list[SteadyRung]:
    """What each rung is worth.

    Args:
        turns: Of all rungs in each repeat, the sequential one among them.
        books: By rung.
        predicted_s: Time of a batch under the book of a rung.
    """
    repeats = sorted({turn.repeat for turn in turns})
    weight = Weight.of([turn for turn in turns if turn.rung == SEQUENTIAL], partial(predicted_s, SEQUENTIAL))
    found = {
        rung: [
            _Repeat.of([turn for turn in turns if (turn.rung, turn.repeat) == (rung, repeat)], weight, predicted_s)
            for repeat in repeats
        ]
        for rung in books
    }
    return [_rung(rung, book.digest, found[rung], found[SEQUENTIAL]) for rung, book in books.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What batches take sequentially: as predicted, corrected by what sequential turns took.

    seconds = scale x predicted + prompt x (prompt tokens - usual x predicted), where `usual` are the prompt tokens that
    those turns had for each second predicted, so that turns of the usual mix are scaled alone.
    """

    predicted_s: Callable[[BatchShape], float]
    scale: float
    prompt: float
    usual: float

    @staticmethod
    def of(turns: Sequence[Turn], predicted_s: Callable[[BatchShape], float]) -> Weight:
        """The least squares over sequential turns; `prompt` shrinks to 0 where their mix hardly differs."""
        times_s = np.array([turn.stop_s - turn.start_s for turn in turns])
        predictions_s = np.array([sum(map(predicted_s, turn.shapes)) for turn in turns])
        prompts = np.array([turn.num_prompt_tokens for turn in turns], float)
        scale, usual = times_s.sum() / predictions_s.sum(), prompts.sum() / predictions_s.sum()
        more = prompts - usual * predictions_s
        hardly = _HARDLY * sum(turn.num_tokens for turn in turns) / len(turns)
        prompt = (more * (times_s - scale * predictions_s)).sum() / ((more**2).sum() + len(turns) * hardly**2)
        return Weight(predicted_s=predicted_s, scale=float(scale), prompt=float(prompt), usual=float(usual))

    def seconds(self, turn: Turn) -> float:
        """Of all batches of a turn."""
        predicted_s = sum(map(self.predicted_s, turn.shapes))
        return self.scale * predicted_s + self.prompt * (turn.num_prompt_tokens - self.usual * predicted_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repeat:
    """All turns of a rung in a repeat: sums, what its batches weigh, and are predicted to take in both ways."""

    num_s: float
    num_iterations: int
    num_planned: int
    num_tokens: int
    num_prompt_tokens: int
    num_decodes: int
    num_keys: int
    energy_j: float | None
    weight_s: float
    sequential_s: float
    planned_s: float

    @staticmethod
    def of(turns: Sequence[Turn], weight: Weight, predicted_s: Callable[[str, BatchShape], float]) -> _Repeat:
        shapes = [shape for turn in turns for shape in turn.shapes]
        energies_j = [turn.energy_j for turn in turns if turn.energy_j is not None]
        return _Repeat(
            num_s=sum(turn.stop_s - turn.start_s for turn in turns),
            num_iterations=len(shapes),
            num_planned=sum(turn.num_planned for turn in turns),
            num_tokens=sum(turn.num_tokens for turn in turns),
            num_prompt_tokens=sum(turn.num_prompt_tokens for turn in turns),
            num_decodes=sum(shape.num_decode_tokens for shape in shapes),
            num_keys=sum(shape.decode_context for shape in shapes),
            energy_j=sum(energies_j) if len(energies_j) == len(turns) else None,
            weight_s=sum(map(weight.seconds, turns)),
            sequential_s=sum(predicted_s(SEQUENTIAL, shape) for shape in shapes),
            planned_s=sum(predicted_s(turns[0].rung, shape) for shape in shapes),
        )

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.num_s

    @property
    def weighed_rate(self) -> float:
        """Work, in seconds that it takes sequentially, a second."""
        return self.weight_s / self.num_s


def _rung(rung: str, book: str, repeats: Sequence[_Repeat], sequential: Sequence[_Repeat]) -> SteadyRung:
    energies_j = [each.energy_j / each.num_tokens for each in repeats if each.energy_j is not None]
    num_iterations, num_tokens = sum(each.num_iterations for each in repeats), sum(each.num_tokens for each in repeats)
    num_decodes = sum(each.num_decodes for each in repeats)
    pairs = list(zip(repeats, sequential, strict=True))
    return SteadyRung(
        rung=rung,
        book=book,
        tokens_per_s=[each.tokens_per_s for each in repeats],
        energy_per_token_j=energies_j if len(energies_j) == len(repeats) else None,
        ratios=[each.tokens_per_s / base.tokens_per_s for each, base in pairs],
        weighed_ratios=[each.weighed_rate / base.weighed_rate for each, base in pairs],
        iteration_tokens=num_tokens / num_iterations,
        prompt_part=sum(each.num_prompt_tokens for each in repeats) / num_tokens,
        decode_context=sum(each.num_keys for each in repeats) / num_decodes if num_decodes else 0.0,
        planned_part=sum(each.num_planned for each in repeats) / num_iterations,
        predicted_ratio=sum(each.sequential_s for each in repeats) / sum(each.planned_s for each in repeats),
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
            f"  {'rung':<14}{'tokens/s':>10}{'ratio':>8}{'(least to most)':>18}{'weighed':>9}{'(least to most)':>18}"
            f"{'predicted':>11}{'mJ/token':>10}{'planned':>9}{'tokens':>8}{'prompt':>8}{'keys':>8}"
        )
        for rung in workload.rungs:
            energy = "-" if rung.energy_per_token_j is None else f"{fmean(rung.energy_per_token_j) * 1e3:.1f}"
            lines.append(
                f"  {rung.rung:<14}{fmean(rung.tokens_per_s):>10,.0f}{fmean(rung.ratios):>8.3f}{_span(rung.ratios):>18}"
                f"{fmean(rung.weighed_ratios):>9.3f}{_span(rung.weighed_ratios):>18}{rung.predicted_ratio:>11.3f}"
                f"{energy:>10}{rung.planned_part:>9.0%}{rung.iteration_tokens:>8,.0f}{rung.prompt_part:>8.0%}"
                f"{rung.decode_context:>8,.0f}"
            )
    return "\n".join(lines)


def _span(values: Sequence[float]) -> str:
    return f"({min(values):.3f} to {max(values):.3f})"
