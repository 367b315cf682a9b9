"""Endless requests on one engine, on which rungs with the same limits take turns, each from the same initial state.

The first requests start at random positions within their completions. The keys of their earlier tokens are whatever
the cache holds; with random weights these are random numbers anyway. New requests always wait. Scheduling depends on
lengths alone, so all rungs compute the same batches. `steady.py` says which rungs take turns, `turns.py` computes their
metrics.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.rungs import Rung
from benchmarks.ladder.turns import Iteration, Turn, TurnMetrics, UnequalTurns, WatchedBook, metrics_of
from nanoflow.bench.provenance import settings_of
from nanoflow.config import EngineConfig
from nanoflow.device.energy import energy_of, gpu_power_limit_w
from nanoflow.engine.build import build_engine, resolve_model
from nanoflow.engine.engine import Engine
from nanoflow.engine.messages import StepOutput
from nanoflow.engine.own_book import book_facts
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import BatchShape
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook, StoredBook, load_book
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.table import Profile
from nanoflow.request import Request, SamplingParams
from nanoflow.simulate.iteration import IterationModel
from nanoflow.workload import Lengths, draw_lengths, under_way

# Lengths drawn from a workload, used in turn; and the number of requests that always wait.
_NUM_LENGTHS, _NUM_WAITING = 4096, 32
# Attempts at a turn, which is repeated if CUDA graphs were captured in it.
_MOST_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Length of turns.

    Attributes:
        settle_s, turn_s: Seconds before a turn counts, and that it counts. A turn is a number of iterations: as many as
            the sequential plan completes in this time.
        num_turns: Turns of each rung in a repeat.
    """

    settle_s: float
    turn_s: float
    num_turns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One repeat of all workloads on one engine.

    Attributes:
        engine: Options with the limits of all these rungs, without plans.
        rungs: Rungs that take turns.
        workloads: Workloads in order.
        clock: Length of turns.
        number: Number of the repeat; each repeat has other requests.
        profile: Profile for predictions; None for none.
    """

    engine: EngineConfig
    rungs: Sequence[Rung]
    workloads: Sequence[str]
    clock: Clock
    number: int
    profile: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Results of a workload in a repeat.

    Attributes:
        workload: Its name.
        settings: Options that each rung ran with.
        metrics: By rung; empty if the rungs cannot be compared.
        reason: Why they cannot be compared; None if they can.
    """

    workload: str
    settings: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, TurnMetrics]
    reason: str | None = None


def run_repeat(repeat: Repeat) -> Iterator[Found]:
    """Measure every workload of a repeat; each result is yielded as soon as it is complete.

    Raises:
        ConfigError, ModelError, PlanError: The engine cannot be built.
    """
    model = None if repeat.profile is None else IterationModel(Profile.load(repeat.profile))
    # The sequential rung, with which the others are compared on the same batches.
    base = next((rung.name for rung in repeat.rungs if rung.book is None), None)
    with engine_of(repeat.engine, repeat.rungs) as (engine, books):
        settings = {rung.name: _settings(rung, engine, repeat.engine, books[rung.name]) for rung in repeat.rungs}
        for workload in repeat.workloads:
            lengths = draw_lengths(workload, _NUM_LENGTHS, repeat.engine.seed)
            turns = measure(engine, books, lengths, repeat.clock, (repeat.engine.seed, repeat.number))
            found = Found(workload=workload, settings=settings, metrics={})
            try:
                yield replace(
                    found,
                    metrics=metrics_of(
                        turns,
                        books,
                        base,
                        predicted_s=None if model is None else _predicted(model),
                        power_limit_w=gpu_power_limit_w(engine.facts.device),
                    ),
                )
            except UnequalTurns as reason:
                yield replace(found, reason=str(reason))


def _predicted(model: IterationModel) -> Callable[[PipelinePlan, BatchShape], float]:
    return lambda plan, shape: model.iteration_s(shape, plan)


def _settings(rung: Rung, engine: Engine, config: EngineConfig, book: PlanBook) -> dict[str, Any]:
    """Settings of a rung, with its own book: the engine has the plans of all rungs."""
    own = book_facts(book)
    return settings_of(rung.on(config), replace(engine.facts, book=own, plan=str(own)))


@contextmanager
def engine_of(config: EngineConfig, rungs: Sequence[Rung]) -> Iterator[tuple[Engine, dict[str, PlanBook]]]:
    """An engine with the plans of all rungs, and the book of each. CUDA graphs are captured when turns need them."""
    stored = {rung.name: StoredBook(entries=()) if rung.book is None else load_book(rung.book) for rung in rungs}
    entries = tuple(entry for book in stored.values() for entry in book.entries)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "books.json"
        path.write_bytes(StoredBook(entries=entries).to_json())
        engine = build_engine(replace(config, plan=str(path)), prepares_plans=False)
    with closing(engine):
        fallback = _fallback(engine, config)
        yield engine, {name: PlanBook(fallback=fallback, entries=book.entries) for name, book in stored.items()}


def _fallback(engine: Engine, config: EngineConfig) -> PipelinePlan:
    """The sequential plan of the engine, whose graph may be fused or not."""
    graph = build_graph(resolve_model(config)[0], config.max_model_len)
    plans = [sequential_plan(each, engine.facts.max_batch_tokens) for each in (graph, fuse_swiglu(graph))]
    assert engine.facts.book is not None
    wanted = engine.facts.book.plans[0].digest
    return next(plan for plan in plans if plan.digest == wanted)


def measure(
    engine: Engine, books: Mapping[str, PlanBook], lengths: Sequence[Lengths], clock: Clock, seed: tuple[int, int]
) -> list[Turn]:
    """Run the turns of every rung; the engine has no requests afterwards."""
    turns = list[Turn]()
    sequential = PlanBook(fallback=next(iter(books.values())).fallback)
    with energy_of(engine.facts.device) as energy:
        for place in range(clock.num_turns):
            begin = partial(_Run, engine, lengths, (*seed, place))
            counts = counts_of(begin, sequential, clock)
            # The order is reversed in every second turn, so that a linear drift affects all rungs equally.
            for rung in books if (seed[-1] + place) % 2 == 0 else reversed(list(books)):
                turns.append(take_turn(begin, rung, books[rung], counts))
    return [replace(turn, energy_j=energy.used_j(turn.start_s, turn.stop_s)) for turn in turns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Iterations of a turn: those before it counts, and those that count."""

    num_settling: int
    num_counted: int


def counts_of(begin: Callable[[PlanBook], _Run], book: PlanBook, clock: Clock) -> Counts:
    """As many iterations as this book completes in the time of a turn, at least one."""
    with closing(begin(book)) as run:
        return Counts(num_settling=run.during(clock.settle_s), num_counted=max(run.during(clock.turn_s), 1))


def take_turn(begin: Callable[[PlanBook], _Run], rung: str, book: PlanBook, counts: Counts) -> Turn:
    """Run one turn. It starts again if CUDA graphs were captured meanwhile, which takes time only once."""
    for _ in range(_MOST_ATTEMPTS):
        with closing(begin(book)) as run:
            run.iterations(counts.num_settling)
            num_prepared, start_s = run.num_prepared, time.monotonic()
            turn = Turn(
                rung=rung,
                start_s=start_s,
                iterations=run.iterations(counts.num_counted),
                stop_s=time.monotonic(),
            )
            if run.num_prepared == num_prepared:
                break
    return turn


class _Run:
    """Endless requests on an engine; the same seed gives the same requests.

    Args:
        engine: Without requests.
        lengths: Lengths of requests. The first requests are drawn from them; new ones take them in order.
        seed: Seed of the draw, of the index of the first new request, and of prompts.
        book: Plans that the engine runs.
    """

    def __init__(self, engine: Engine, lengths: Sequence[Lengths], seed: tuple[int, ...], book: PlanBook) -> None:
        facts = engine.facts
        # Batches whose iterations have not ended, in the order in which their plans were chosen; `_step` removes them.
        self._shapes: deque[BatchShape] = deque()
        engine.use_book(WatchedBook(fallback=book.fallback, entries=book.entries, shapes=self._shapes))
        self._engine = engine
        self._rng = np.random.default_rng(seed)
        self._new = itertools.islice(itertools.cycle(lengths), int(self._rng.integers(len(lengths))), None)
        self._num_requests = 0
        num_keys = facts.num_pages * facts.page_size
        draw = int(self._rng.integers(1 << 31))
        for length in under_way(lengths, num_keys, facts.max_num_seqs, facts.max_batch_tokens, draw):
            self._add(length)
        # Requests that were not admitted at once would arrive later without a prompt to compute, unlike real ones.
        running = set(self._step()[0].scheduled)
        engine.abort(request_id for request_id in range(self._num_requests) if request_id not in running)

    @property
    def num_prepared(self) -> int:
        """Batches so far for which a CUDA graph had to be captured."""
        return self._engine.stats().num_prepared

    def during(self, time_s: float) -> int:
        """Number of iterations that end within some seconds."""
        count, stop_s = 0, time.monotonic() + time_s
        while time.monotonic() < stop_s:
            _, shape = self._step()
            count += shape is not None
        return count

    def iterations(self, count: int) -> list[Iteration]:
        """Run until this number of iterations has ended."""
        ended, last_s = list[Iteration](), time.monotonic()
        while len(ended) < count:
            step, shape = self._step()
            if shape is not None and step.stats.plan_digest is not None:
                now_s = time.monotonic()
                ended.append(Iteration(shape=shape, plan=step.stats.plan_digest, seconds=now_s - last_s))
                last_s = now_s
        return ended

    def close(self) -> None:
        """Abort all requests."""
        self._engine.abort(range(self._num_requests))
        while self._engine.has_work:
            self._engine.step()

    def _step(self) -> tuple[StepOutput, BatchShape | None]:
        """A step of the engine, and the batch of the iteration that ended in it, if any; adds new requests before."""
        for _ in range(self._engine.stats().num_waiting, _NUM_WAITING):
            self._add(next(self._new))
        step = self._engine.step()
        return step, self._shapes.popleft() if step.stats.iteration_tokens else None

    def _add(self, length: Lengths) -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length.num_output_tokens, detokenize=False)
        request = Request(
            request_id=self._num_requests,
            prompt_token_ids=self._rng.integers(self._engine.facts.vocab_size, size=length.num_prompt_tokens).tolist(),
            params=params,
            seed=0,
            max_tokens=length.num_output_tokens,
        )
        self._num_requests += 1
        self._engine.add(request, length.num_computed)
