"""Turns of rungs with the same batches on one engine, and the metrics of each rung computed from them.

This file knows no engine; `steady_engine.py` drives one.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanoflow.bench.offline import impossible_power
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanBook
from nanoflow.plan.plan import PipelinePlan

# Predicted seconds of a batch under a plan.
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
    """An iteration that ended: its batch, the digest of its plan, and seconds since the end of the one before."""

    shape: BatchShape
    plan: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The part of a rung's turn that counts.

    Attributes:
        rung: Name of the rung.
        start_s, stop_s: Ends of the iteration before the first one and of the last one, on a monotonic clock.
        iterations: All iterations between them.
        energy_j: Joules of the card between them; None without a counter.
    """

    rung: str
    start_s: float
    stop_s: float
    iterations: Sequence[Iteration]
    energy_j: float | None = None

    @property
    def seconds(self) -> float:
        """Its length in seconds."""
        return self.stop_s - self.start_s

    @property
    def shapes(self) -> list[BatchShape]:
        """Batches of its iterations."""
        return [iteration.shape for iteration in self.iterations]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanGain:
    """Gain of one plan of a rung's book on the batches that it ran.

    Attributes:
        plan, digest: Its name and digest.
        part: Time of these batches / time of all batches of the rung.
        gain: Time of these batches on the sequential rung / their time here; None if no sequential rung has the same
            limits.
        predicted_gain: The same ratio of predicted times; None without a profile.
    """

    plan: str
    digest: str
    part: float
    gain: float | None
    predicted_gain: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnMetrics:
    """Metrics of a rung in a repeat; names that whole runs have too mean the same (`run_metrics.RunMetrics`).

    Attributes:
        total_tokens_per_s: Prompt and output tokens that the model computed.
        energy_per_token_j: Joules; None without a counter, or if the energy is above what the card can use.
        energy_dropped: Why an energy that was measured is left out; None if none was.
        plan_iterations: Number of iterations by the digest of their plan.
        duration_s: Seconds of all turns.
        iteration_tokens, prompt_part, decode_context: Means over iterations: tokens, prompt tokens / all tokens, and
            keys of a decode token.
        gain: Time of the sequential rung / time of this one on the same batches; None if no sequential rung has the
            same limits.
        energy_ratio: Energy a token / that of the sequential rung on the same batches; None likewise.
        predicted_gain: Predicted time of these batches under the sequential plan / under the book; None without a
            profile.
        plans: Every plan that ran, in descending order of its time.
        num_failed, num_short: Always 0: requests are endless.
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
) -> dict[str, TurnMetrics]:
    """Metrics of every rung of one engine in a repeat.

    Args:
        turns: Turns of all rungs. Those of each rung have the same order and the same batches.
        books: The book of each rung.
        base: The sequential rung, with which the others are compared; None if there is none.
        predicted_s: See `Predicted`; None for no predictions.
        power_limit_w: Power limit of the card; a mean power above it is an error of the counter. None if unknown.

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
    """Joules a token, and the reason if they were measured and are left out."""
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
    """Predicts the gain of a book on batches."""

    book: PlanBook
    predicted_s: Predicted | None

    def predicted(self, shapes: Sequence[BatchShape]) -> float | None:
        """Predicted time of these batches under the sequential plan / under the book."""
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
) -> TurnMetrics:
    shapes = [shape for turn in own for shape in turn.shapes]
    num_tokens, seconds = _num_tokens(own), sum(turn.seconds for turn in own)
    num_decodes = sum(shape.num_decode_tokens for shape in shapes)
    return TurnMetrics(
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
    """The gain of each plan of a rung on the batches that it ran."""
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
