"""Turns that rungs take on one engine in its steady state, and what each rung is worth by them.

No engine is known here; `steady.py` drives one, and what it writes is `steady_document.py`'s.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.ladder import SEQUENTIAL
from benchmarks.steady_document import PlanGain, SteadyRung
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanBook
from nanoflow.plan.plan import PipelinePlan

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
class Iteration:
    """One that ended: its batch, the digest of its plan, and the time since the one before ended."""

    shape: BatchShape
    plan: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A rung's turn, without the time in which it settled.

    Attributes:
        rung, repeat: Whose, and of which repeat.
        start_s, stop_s: From the end of an iteration to that of another one.
        iterations: In between.
        energy_j: None without a counter.
    """

    rung: str
    repeat: int
    start_s: float
    stop_s: float
    iterations: Sequence[Iteration]
    energy_j: float | None = None

    @property
    def shapes(self) -> list[BatchShape]:
        """Of its iterations."""
        return [iteration.shape for iteration in self.iterations]

    @property
    def num_tokens(self) -> int:
        """That the model worked through."""
        return sum(shape.num_tokens for shape in self.shapes)

    @property
    def num_prompt_tokens(self) -> int:
        """Those of them that are of prompts."""
        return sum(shape.num_tokens - shape.num_decode_tokens for shape in self.shapes)


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
    by_rung = {rung: [turn for turn in turns if turn.rung == rung] for rung in books}
    names = {plan.digest: plan.name for book in books.values() for plan in (book.fallback, *book.plans)}
    weight = Weight.of(by_rung[SEQUENTIAL], partial(predicted_s, SEQUENTIAL))
    repeats = {
        rung: [
            _Repeat.of(
                [turn for turn in own if turn.repeat == repeat], books[rung].fallback.digest, weight, predicted_s
            )
            for repeat in sorted({turn.repeat for turn in turns})
        ]
        for rung, own in by_rung.items()
    }
    return [
        _rung(
            rung,
            book.digest,
            repeats[rung],
            repeats[SEQUENTIAL],
            _plans(by_rung[rung], names, weight, partial(predicted_s, rung)),
        )
        for rung, book in books.items()
    ]


def _plans(
    turns: Sequence[Turn], names: Mapping[str, str], weight: Weight, predicted_s: Callable[[BatchShape], float]
) -> list[PlanGain]:
    """What each plan of a rung is worth, among them any whose iteration was under way when its turn began."""
    ran: dict[str, list[Iteration]] = defaultdict(list)
    for turn in turns:
        for iteration in turn.iterations:
            ran[iteration.plan].append(iteration)
    times_s = {digest: sum(each.seconds for each in iterations) for digest, iterations in ran.items()}
    found = []
    for digest in sorted(ran, key=lambda digest: -times_s[digest]):
        shapes = [each.shape for each in ran[digest]]
        gain = PlanGain(
            plan=names[digest],
            digest=digest,
            part=times_s[digest] / sum(times_s.values()),
            gain=weight.seconds(shapes) / times_s[digest],
            predicted_gain=sum(map(weight.predicted_s, shapes)) / sum(map(predicted_s, shapes)),
        )
        found.append(gain)
    return found


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

    def seconds(self, shapes: Sequence[BatchShape]) -> float:
        """Of all of these batches."""
        predicted_s = sum(map(self.predicted_s, shapes))
        num_prompt_tokens = sum(shape.num_tokens - shape.num_decode_tokens for shape in shapes)
        return self.scale * predicted_s + self.prompt * (num_prompt_tokens - self.usual * predicted_s)


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
    def of(
        turns: Sequence[Turn], sequential: str, weight: Weight, predicted_s: Callable[[str, BatchShape], float]
    ) -> _Repeat:
        shapes = [shape for turn in turns for shape in turn.shapes]
        energies_j = [turn.energy_j for turn in turns if turn.energy_j is not None]
        return _Repeat(
            num_s=sum(turn.stop_s - turn.start_s for turn in turns),
            num_iterations=len(shapes),
            num_planned=sum(each.plan != sequential for turn in turns for each in turn.iterations),
            num_tokens=sum(turn.num_tokens for turn in turns),
            num_prompt_tokens=sum(turn.num_prompt_tokens for turn in turns),
            num_decodes=sum(shape.num_decode_tokens for shape in shapes),
            num_keys=sum(shape.decode_context for shape in shapes),
            energy_j=sum(energies_j) if len(energies_j) == len(turns) else None,
            weight_s=weight.seconds(shapes),
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

    @property
    def weighed_energy_j(self) -> float | None:
        """Of work that takes a second sequentially."""
        return None if self.energy_j is None else self.energy_j / self.weight_s


def _rung(
    rung: str, book: str, repeats: Sequence[_Repeat], sequential: Sequence[_Repeat], plans: Sequence[PlanGain]
) -> SteadyRung:
    energies_j = [each.energy_j / each.num_tokens for each in repeats if each.energy_j is not None]
    num_iterations, num_tokens = sum(each.num_iterations for each in repeats), sum(each.num_tokens for each in repeats)
    num_decodes = sum(each.num_decodes for each in repeats)
    pairs = list(zip(repeats, sequential, strict=True))
    ratios_j = [
        each.weighed_energy_j / base.weighed_energy_j
        for each, base in pairs
        if each.weighed_energy_j is not None and base.weighed_energy_j is not None
    ]
    return SteadyRung(
        rung=rung,
        book=book,
        tokens_per_s=[each.tokens_per_s for each in repeats],
        energy_per_token_j=energies_j if len(energies_j) == len(repeats) else None,
        ratios=[each.tokens_per_s / base.tokens_per_s for each, base in pairs],
        weighed_ratios=[each.weighed_rate / base.weighed_rate for each, base in pairs],
        weighed_energy_ratios=ratios_j if len(ratios_j) == len(pairs) else None,
        iteration_tokens=num_tokens / num_iterations,
        prompt_part=sum(each.num_prompt_tokens for each in repeats) / num_tokens,
        decode_context=sum(each.num_keys for each in repeats) / num_decodes if num_decodes else 0.0,
        planned_part=sum(each.num_planned for each in repeats) / num_iterations,
        predicted_ratio=sum(each.sequential_s for each in repeats) / sum(each.planned_s for each in repeats),
        plans=plans,
    )
