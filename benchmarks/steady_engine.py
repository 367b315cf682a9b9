"""Requests without end on an engine, which rungs with the same limits take turns on, each from the same beginning.

The first requests are anywhere in their completions, the keys of what they have behind them being what the cache holds
(random numbers, if weights are), and new ones always wait. What is scheduled depends on lengths alone, so all rungs
have the very same batches. What turns are worth is `turns.py`'s, which rungs take them `steady.py`'s.
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

from benchmarks.rungs import Rung
from benchmarks.turns import Iteration, SteadyMetrics, Turn, UnequalTurns, WatchedBook, metrics_of
from nanoflow.bench.provenance import settings_of
from nanoflow.config import EngineConfig
from nanoflow.device.energy import energy_of, gpu_power_limit_w
from nanoflow.engine.build import book_facts, build_engine, resolve_model
from nanoflow.engine.engine import Engine
from nanoflow.engine.messages import StepOutput
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

# Lengths that a trace's requests are drawn from, and requests that always wait.
_NUM_LENGTHS, _NUM_WAITING = 4096, 32
# How often a turn is begun again because CUDA graphs were captured in it.
_MOST_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """About the seconds before a turn counts, and that it counts, by the sequential plan; and turns in a repeat."""

    settle_s: float
    turn_s: float
    num_turns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One repeat of all workloads on one engine.

    Attributes:
        engine: With the limits that all rungs have, without plans.
        rungs: What takes turns.
        workloads: In turn.
        clock: How long.
        number: Of the repeat; each begins with other requests.
        profile: What operations take, for predictions; None without them.
    """

    engine: EngineConfig
    rungs: Sequence[Rung]
    workloads: Sequence[str]
    clock: Clock
    number: int
    profile: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of a workload.

    Attributes:
        workload: Its name.
        settings, metrics: By rung; empty if rungs cannot be compared.
        reason: Why they cannot.
    """

    workload: str
    settings: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, SteadyMetrics]
    reason: str | None = None


def run_repeat(repeat: Repeat) -> Iterator[Found]:
    """Every workload of a repeat, each as soon as it is there.

    Raises:
        ConfigError, ModelError, PlanError: The engine cannot be built.
    """
    model = None if repeat.profile is None else IterationModel(Profile.load(repeat.profile))
    # The sequential rung says what others are worth on the same batches.
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
    """Those of a rung: the engine has the plans of all of them."""
    own = book_facts(book)
    return settings_of(rung.on(config), replace(engine.facts, book=own, plan=str(own)))


@contextmanager
def engine_of(config: EngineConfig, rungs: Sequence[Rung]) -> Iterator[tuple[Engine, dict[str, PlanBook]]]:
    """An engine that has the plans of all rungs, prepared when turns meet them; and the book of each rung."""
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
    """The sequential plan that the engine was made with, whose operations may be fused."""
    graph = build_graph(resolve_model(config)[0], config.max_model_len)
    plans = [sequential_plan(each, engine.facts.max_batch_tokens) for each in (graph, fuse_swiglu(graph))]
    assert engine.facts.book is not None
    wanted = engine.facts.book.plans[0].digest
    return next(plan for plan in plans if plan.digest == wanted)


def measure(
    engine: Engine, books: Mapping[str, PlanBook], lengths: Sequence[Lengths], clock: Clock, seed: tuple[int, int]
) -> list[Turn]:
    """Give every rung its turns, and leave the engine empty."""
    turns = list[Turn]()
    sequential = PlanBook(fallback=next(iter(books.values())).fallback)
    with energy_of(engine.facts.device) as energy:
        for place in range(clock.num_turns):
            begin = partial(_Run, engine, lengths, (*seed, place))
            counts = counts_of(begin, sequential, clock)
            # Forwards and backwards in turn, so that what drifts evenly tells for none.
            for rung in books if (seed[-1] + place) % 2 == 0 else reversed(list(books)):
                turns.append(take_turn(begin, rung, books[rung], counts))
    return [replace(turn, energy_j=energy.used_j(turn.start_s, turn.stop_s)) for turn in turns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Iterations of a turn: before it counts, and that count."""

    num_settling: int
    num_counted: int


def counts_of(begin: Callable[[PlanBook], _Run], book: PlanBook, clock: Clock) -> Counts:
    """As many iterations as this book manages in the time of a turn, one at least."""
    with closing(begin(book)) as run:
        return Counts(num_settling=run.during(clock.settle_s), num_counted=max(run.during(clock.turn_s), 1))


def take_turn(begin: Callable[[PlanBook], _Run], rung: str, book: PlanBook, counts: Counts) -> Turn:
    """Settle, then count; from the beginning again if graphs were captured meanwhile, which takes time only once."""
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
    """Requests on an engine, without end, from the same beginning for the same seed.

    Args:
        engine: It is empty.
        lengths: What requests are drawn from, and new ones come in the order of.
        seed: Of the draw, of where in that order new ones begin, and of the prompts.
        book: What the engine runs.
    """

    def __init__(self, engine: Engine, lengths: Sequence[Lengths], seed: tuple[int, ...], book: PlanBook) -> None:
        facts = engine.facts
        # Batches whose iterations have not ended; `_step` ends them in the order in which they were planned.
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
        # Those that are not admitted with the others would come later without a prompt to compute, as nobody does.
        running = set(self._step()[0].scheduled)
        engine.abort(request_id for request_id in range(self._num_requests) if request_id not in running)

    @property
    def num_prepared(self) -> int:
        """Batches so far that had no CUDA graph."""
        return self._engine.stats().num_prepared

    def during(self, time_s: float) -> int:
        """Iterations that end within a time."""
        count, stop_s = 0, time.monotonic() + time_s
        while time.monotonic() < stop_s:
            _, shape = self._step()
            count += shape is not None
        return count

    def iterations(self, count: int) -> list[Iteration]:
        """The next so many."""
        ended, last_s = list[Iteration](), time.monotonic()
        while len(ended) < count:
            step, shape = self._step()
            if shape is not None and step.stats.plan_digest is not None:
                now_s = time.monotonic()
                ended.append(Iteration(shape=shape, plan=step.stats.plan_digest, seconds=now_s - last_s))
                last_s = now_s
        return ended

    def close(self) -> None:
        """Forget all requests."""
        self._engine.abort(range(self._num_requests))
        while self._engine.has_work:
            self._engine.step()

    def _step(self) -> tuple[StepOutput, BatchShape | None]:
        """A step of the engine, and the batch of the iteration that ended in it; new requests keep waiting."""
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
