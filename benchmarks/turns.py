"""Turns that rungs take with the same batches on one engine, and what each rung did by them.

No engine is known here; `steady_engine.py` drives one.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanoflow.bench.offline import impossible_power
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanBook
from nanoflow.plan.plan import PipelinePlan

# Time of a batch under a plan, in seconds.
Predicted = Callable[[PipelinePlan, BatchShape], float]


class UnequalTurns(Exception):
    """Rungs cannot be compared; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedBook(PlanBook):
    """A plan book that appends the shape of every batch it is asked for to `shapes`."""

    shapes: deque[BatchShape]

    def choose(self, shape: BatchShape) -> PipelinePlan:
        """The plan to run for a batch of this shape."""
        self.shapes.append(shape)
        return PlanBook.choose(self, shape)  # `super()` does not work in a dataclass with slots


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
        rung: Whose.
        start_s, stop_s: From the end of an iteration to that of another one.
        iterations: In between.
        energy_j: None without a counter.
    """

    rung: str
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanGain:
    """What a plan of a rung's book is worth on the batches that it ran.

    Attributes:
        plan, digest: Its name and digest.
        part: Of the rung's time.
        gain: What those batches took sequentially / what they took; None if no sequential rung has the same limits.
        predicted_gain: The same, both as predicted; None without a profile.
    """

    plan: str
    digest: str
    part: float
    gain: float | None
    predicted_gain: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyMetrics:
    """What a rung did in a repeat, under the names that whole runs have where the meaning is the same.

    Attributes:
        total_tokens_per_s: Tokens of prompts and outputs that the model worked through.
        energy_per_token_j: None without a counter, or if it was impossible.
        energy_dropped: Why an energy that was measured is not told.
        plan_iterations: Iterations by digest of their plan.
        duration_s: Of all turns.
        iteration_tokens, prompt_part, decode_context: What an iteration had: tokens, those of prompts as a part of
            them, and keys of a decode token; means.
        gain: Time of the sequential rung / this one's, with the very same batches; None if none has the same limits.
        energy_ratio: Energy / that of the sequential rung, with the very same batches; None likewise.
        predicted_gain: Time that a profile predicts for these batches sequentially / under the book; None without one.
        plans: Every plan that ran, those that took the most time first.
        num_failed, num_short: Requests without end neither fail nor come short.
    """

    total_tokens_per_s: float
    energy_per_token_j: float | None
    energy_dropped: str | None
    plan_iterations: Mapping[str, int]
    duration_s: float
    iteration_tokens: float
    prompt_part: float
    decode_context: float
    gain: float | None
    energy_ratio: float | None
    predicted_gain: float | None
    plans: Sequence[PlanGain]
    num_failed: int = 0
    num_short: int = 0


def metrics_of(
    turns: Sequence[Turn],
    books: Mapping[str, PlanBook],
    base: str | None,
    *,
    predicted_s: Predicted | None = None,
    power_limit_w: float | None = None,
) -> dict[str, SteadyMetrics]:
    """What each rung of one engine did in a repeat.

    Args:
        turns: Those of each rung in the same order and with the same batches.
        books: By rung.
        base: The sequential rung among them, which the others are compared with; None if there is none.
        predicted_s: See `Predicted`; None if nothing is predicted.
        power_limit_w: Of the card: an energy above it is an error of the counter. None if unknown.

    Raises:
        UnequalTurns: A rung had other batches than the first one.
    """
    by_rung = {rung: [turn for turn in turns if turn.rung == rung] for rung in books}
    first, *others = by_rung
    for rung in others:
        if [turn.shapes for turn in by_rung[rung]] != [turn.shapes for turn in by_rung[first]]:
            raise UnequalTurns(f"the rung {rung} had other batches than the rung {first}")
    names = {plan.digest: plan.name for book in books.values() for plan in (book.fallback, *book.plans)}
    beside = None if base is None else by_rung[base]
    energies = {rung: _energy(own, power_limit_w) for rung, own in by_rung.items()}
    found = {}
    for rung, own in by_rung.items():
        gain_of = _Gains(book=books[rung], predicted_s=predicted_s)
        found[rung] = _metrics(own, beside, energies[rung], None if base is None else energies[base][0], gain_of, names)
    return found


def _energy(own: Sequence[Turn], power_limit_w: float | None) -> tuple[float | None, str | None]:
    """Joules a token, and why they are not told though they were measured."""
    energies_j = [turn.energy_j for turn in own if turn.energy_j is not None]
    if len(energies_j) < len(own):
        return None, None
    num_tokens, seconds = _num_tokens(own), sum(turn.seconds for turn in own)
    per_token_j = sum(energies_j) / num_tokens
    reason = impossible_power(per_token_j, num_tokens / seconds, power_limit_w)
    return (per_token_j, None) if reason is None else (None, reason)


def _num_tokens(turns: Sequence[Turn]) -> int:
    return sum(shape.num_tokens for turn in turns for shape in turn.shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gains:
    """What is predicted of batches under a book."""

    book: PlanBook
    predicted_s: Predicted | None

    def predicted(self, shapes: Sequence[BatchShape]) -> float | None:
        """Time of these batches sequentially / under the book."""
        if self.predicted_s is None:
            return None
        sequential_s = sum(self.predicted_s(self.book.fallback, shape) for shape in shapes)
        return sequential_s / sum(self.predicted_s(self.book.choose(shape), shape) for shape in shapes)


def _metrics(
    own: Sequence[Turn],
    base: Sequence[Turn] | None,
    energy: tuple[float | None, str | None],
    base_energy_j: float | None,
    gains: _Gains,
    names: Mapping[str, str],
) -> SteadyMetrics:
    shapes = [shape for turn in own for shape in turn.shapes]
    num_tokens, seconds = _num_tokens(own), sum(turn.seconds for turn in own)
    num_decodes = sum(shape.num_decode_tokens for shape in shapes)
    return SteadyMetrics(
        total_tokens_per_s=num_tokens / seconds,
        energy_per_token_j=energy[0],
        energy_dropped=energy[1],
        plan_iterations=Counter(each.plan for turn in own for each in turn.iterations),
        duration_s=seconds,
        iteration_tokens=num_tokens / len(shapes),
        prompt_part=1.0 - num_decodes / num_tokens,
        decode_context=sum(shape.decode_context for shape in shapes) / num_decodes if num_decodes else 0.0,
        gain=None if base is None else sum(turn.seconds for turn in base) / seconds,
        energy_ratio=None if energy[0] is None or base_energy_j is None else energy[0] / base_energy_j,
        predicted_gain=gains.predicted(shapes),
        plans=_plans(own, base, gains, names),
    )


def _plans(own: Sequence[Turn], base: Sequence[Turn] | None, gains: _Gains, names: Mapping[str, str]) -> list[PlanGain]:
    """What each plan of a rung is worth on the batches that it ran."""
    ran: dict[str, list[tuple[Iteration, Iteration]]] = defaultdict(list)
    for turn, other in zip(own, base or own, strict=True):
        for pair in zip(turn.iterations, other.iterations, strict=True):
            ran[pair[0].plan].append(pair)
    times_s = {digest: sum(each.seconds for each, _ in pairs) for digest, pairs in ran.items()}
    return [
        PlanGain(
            plan=names[digest],
            digest=digest,
            part=times_s[digest] / sum(times_s.values()),
            gain=None if base is None else sum(other.seconds for _, other in ran[digest]) / times_s[digest],
            predicted_gain=gains.predicted([each.shape for each, _ in ran[digest]]),
        )
        for digest in sorted(ran, key=lambda digest: -times_s[digest])
    ]
