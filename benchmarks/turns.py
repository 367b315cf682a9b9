"""Turns that rungs take with the same batches on one engine, and what each rung is worth by them.

No engine is known here; `steady.py` drives one, and what it writes is `steady_document.py`'s.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.ladder import SEQUENTIAL
from benchmarks.steady_document import PlanGain, SteadyRung
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanBook
from nanoflow.plan.plan import PipelinePlan

# Time of a batch under the book of a rung, in seconds.
Predicted = Callable[[str, BatchShape], float]


class UnequalTurns(Exception):
    """Rungs cannot be compared; the message says why."""


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
    def seconds(self) -> float:
        """How long it took."""
        return self.stop_s - self.start_s

    @property
    def shapes(self) -> list[BatchShape]:
        """Of its iterations."""
        return [iteration.shape for iteration in self.iterations]


def rungs_of(turns: Sequence[Turn], books: Mapping[str, PlanBook], predicted_s: Predicted) -> list[SteadyRung]:
    """What each rung is worth.

    Args:
        turns: Those of each rung in the same order and with the same batches, the sequential rung among them.
        books: By rung.
        predicted_s: See `Predicted`.

    Raises:
        UnequalTurns: A rung had other batches than the sequential one.
    """
    by_rung = {rung: [turn for turn in turns if turn.rung == rung] for rung in books}
    base = by_rung[SEQUENTIAL]
    for rung, own in by_rung.items():
        if [(turn.repeat, turn.shapes) for turn in own] != [(turn.repeat, turn.shapes) for turn in base]:
            raise UnequalTurns(f"the rung {rung} had other batches than the sequential one")
    names = {plan.digest: plan.name for book in books.values() for plan in (book.fallback, *book.plans)}
    return [_rung(rung, book, by_rung[rung], base, predicted_s, names) for rung, book in books.items()]


def _rung(
    rung: str,
    book: PlanBook,
    own: Sequence[Turn],
    base: Sequence[Turn],
    predicted_s: Predicted,
    names: Mapping[str, str],
) -> SteadyRung:
    repeats = [_Repeat.of(own, base, repeat) for repeat in sorted({turn.repeat for turn in own})]
    shapes = [shape for turn in own for shape in turn.shapes]
    num_tokens = sum(shape.num_tokens for shape in shapes)
    num_decodes = sum(shape.num_decode_tokens for shape in shapes)
    is_metered = all(turn.energy_j is not None for turn in (*own, *base))
    num_planned = sum(each.plan != book.fallback.digest for turn in own for each in turn.iterations)
    return SteadyRung(
        rung=rung,
        book=book.digest,
        tokens_per_s=[each.num_tokens / each.own_s for each in repeats],
        energy_per_token_j=[each.own_j / each.num_tokens for each in repeats] if is_metered else None,
        gains=[each.base_s / each.own_s for each in repeats],
        energy_ratios=[each.own_j / each.base_j for each in repeats] if is_metered else None,
        iteration_tokens=num_tokens / len(shapes),
        prompt_part=1.0 - num_decodes / num_tokens,
        decode_context=sum(shape.decode_context for shape in shapes) / num_decodes if num_decodes else 0.0,
        planned_part=num_planned / len(shapes),
        predicted_gain=_predicted_gain(rung, shapes, predicted_s),
        plans=_plans(rung, own, base, predicted_s, names),
    )


def _predicted_gain(rung: str, shapes: Sequence[BatchShape], predicted_s: Predicted) -> float:
    sequential_s = sum(predicted_s(SEQUENTIAL, shape) for shape in shapes)
    return sequential_s / sum(predicted_s(rung, shape) for shape in shapes)


def _plans(
    rung: str, own: Sequence[Turn], base: Sequence[Turn], predicted_s: Predicted, names: Mapping[str, str]
) -> list[PlanGain]:
    """What each plan of a rung is worth on the batches that it ran."""
    ran: dict[str, list[tuple[Iteration, Iteration]]] = defaultdict(list)
    for turn, sequential in zip(own, base, strict=True):
        for pair in zip(turn.iterations, sequential.iterations, strict=True):
            ran[pair[0].plan].append(pair)
    times_s = {digest: sum(each.seconds for each, _ in pairs) for digest, pairs in ran.items()}
    return [
        PlanGain(
            plan=names[digest],
            digest=digest,
            part=times_s[digest] / sum(times_s.values()),
            gain=sum(sequential.seconds for _, sequential in ran[digest]) / times_s[digest],
            predicted_gain=_predicted_gain(rung, [each.shape for each, _ in ran[digest]], predicted_s),
        )
        for digest in sorted(ran, key=lambda digest: -times_s[digest])
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repeat:
    """All turns of a rung in a repeat, and those of the sequential one: seconds, joules (0 if unknown) and tokens."""

    own_s: float
    base_s: float
    own_j: float
    base_j: float
    num_tokens: int

    @staticmethod
    def of(own: Sequence[Turn], base: Sequence[Turn], repeat: int) -> _Repeat:
        own, base = ([turn for turn in turns if turn.repeat == repeat] for turns in (own, base))
        return _Repeat(
            own_s=sum(turn.seconds for turn in own),
            base_s=sum(turn.seconds for turn in base),
            own_j=sum(turn.energy_j or 0.0 for turn in own),
            base_j=sum(turn.energy_j or 0.0 for turn in base),
            num_tokens=sum(shape.num_tokens for turn in own for shape in turn.shapes),
        )
