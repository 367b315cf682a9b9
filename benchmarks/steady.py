"""The rungs of the ablation ladder in turn, with the same batches, in the steady state of a workload.

A run of all requests at once begins with prompts and ends with decodes alone; a server with enough to do is always in
the middle, where requests come as others leave. So the first requests are here anywhere in their completions, the keys
of what they have behind them being what the cache holds (random numbers, if weights are), new ones always
wait. Rungs take turns on one engine, each from the same beginning: what is scheduled depends on lengths alone, so all
have the very same batches, and neither that prompts come in bursts, nor which card it is, nor its temperature can tell
for one of them. From the root of the repository:

    python -m benchmarks.steady --profile benchmarks/results/profile_llama-3-8b_h200.json --json steady.json

Books of the rungs (books/MODEL_RUNG.json, as of `benchmarks.ablation`) are made first, for these workloads and this
token budget, if they are not there: minutes that need no GPU; with --prepare nothing else is done. What the document
has of other workloads stays. Exit status 1 if a workload could not be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.ablation import ENGINE, check_length, is_short_enough, read_engine, read_rungs
from benchmarks.ladder import SEQUENTIAL
from benchmarks.rungs import Task, label, make_books, write_json
from benchmarks.steady_document import (
    SteadyDocument,
    SteadyWorkload,
    table,
    with_workload,
    without_impossible_energies,
)
from benchmarks.turns import Iteration, Turn, UnequalTurns, Watched, rungs_of
from nanoflow.bench.config import ThroughputConfig
from nanoflow.bench.machine import detect_machine, detect_software, git_revision
from nanoflow.bench.offline import power_limit_of
from nanoflow.bench.provenance import require_clean
from nanoflow.bench.rates import measure_bounds
from nanoflow.bench.workload import Lengths, draw_lengths, under_way
from nanoflow.cli.options import CommandParser
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.device.energy import energy_of
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.engine.messages import StepOutput
from nanoflow.graph.operation import BatchShape
from nanoflow.models.presets import preset_name
from nanoflow.plan.book import PlanBook, StoredBook
from nanoflow.request import Request, SamplingParams
from nanoflow.search.iteration import IterationModel

WORKLOADS = ("512/512", "1024/512", "512/1024", "1000/1000", "2048/128", "8000/1000")
# Lengths that a trace's requests are drawn from, and requests that always wait.
_NUM_LENGTHS, _NUM_WAITING = 4096, 32
# How often a turn is begun again because CUDA graphs were captured in it.
_MOST_ATTEMPTS = 3
# Requests of each workload that plans are searched for.
_NUM_SIMULATED = 1500
_SAME = ("max_batch_tokens", "max_num_seqs", "gpu_memory_utilization", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """About the seconds before a turn counts, and that it counts, by the sequential rung; and how often."""

    settle_s: float
    turn_s: float
    num_turns: int
    num_repeats: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every workload; print and write the document as it grows."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        require_clean(None if args.prepare else args.json, allows_dirty=args.allow_dirty)
        task = read_task(args)
        document = read_document(args.json, task)
        lengths = {
            label(config.workload): draw_lengths(config.workload, _NUM_LENGTHS, task.engine.seed)
            for config in task.workloads
        }
        make_books(task)
        books = {rung: task.book(rung) for rung in task.rungs}
    except ValueError as error:
        parser.error(str(error))
    if args.prepare:
        return 0
    bounds = {name: measure_bounds(task.engine, drawn) for name, drawn in lengths.items()} if args.bounds else {}
    clock = Clock(settle_s=args.settle, turn_s=args.turn, num_turns=args.turns, num_repeats=args.repeats)
    model, is_complete = IterationModel(task.profile), True
    with engine_of(task.engine, books) as engine:
        for name, drawn in lengths.items():
            try:
                turns = measure(engine, books, drawn, clock, task.engine.seed)
                rungs = rungs_of(turns, books, lambda rung, shape: model.iteration_s(shape, books[rung].choose(shape)))
            except UnequalTurns as reason:
                print(f"{name}: {reason}", file=sys.stderr)
                is_complete = False
                continue
            found = SteadyWorkload(
                workload=name,
                created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
                git_revision=args.git_revision or git_revision(),
                num_turns=clock.num_turns,
                turn_s=clock.turn_s,
                has_same_batches=True,
                serial_tokens_per_s=bounds[name].serial_tokens_per_s if bounds else None,
                optimal_tokens_per_s=bounds[name].optimal_tokens_per_s if bounds else None,
                rungs=without_impossible_energies(rungs, power_limit_of(engine.facts.device)),
            )
            print(table([found]), flush=True)
            document = with_workload(document, found)
            if args.json is not None:
                write_json(args.json, document)
    return 0 if is_complete else 1


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.steady", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True, help="file written by nanoflow profile; names the model")
    parser.add_argument(
        "--workloads",
        nargs="+",
        metavar="WORKLOAD",
        help=f"IN/OUT or trace:FILE.csv (default: {' '.join(WORKLOADS)}, those that the model is long enough for)",
    )
    parser.add_argument(
        "--rungs", nargs="+", metavar="RUNG", help="as of benchmarks.ablation, the sequential one always (default: all)"
    )
    parser.add_argument(
        "--json-folder", type=Path, default=Path("benchmarks/results/ladder"), metavar="DIR", help="where the books are"
    )
    parser.add_argument("--prepare", action="store_true", help="only make the books that are not there")
    parser.add_argument("--json", type=Path, help="file to write the document to")
    parser.add_argument("--turn", type=float, default=2.0, metavar="SECONDS", help="of a turn (default: 2)")
    parser.add_argument("--settle", type=float, default=0.5, metavar="SECONDS", help="before it counts (default: 0.5)")
    parser.add_argument("--turns", type=int, default=1, help="turns of each rung in a repeat (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="how often to measure (default: 3)")
    parser.add_argument("--git-revision", metavar="TEXT", help="of the sources, where they are a copy without git")
    parser.add_argument("--allow-dirty", action="store_true", help="write a record of sources without a revision")
    parser.add_argument(
        "--bounds",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure what was possible: sum of parts alone (serial bound) and optimal throughput",
    )
    ENGINE.add_to(parser)
    return parser


def read_task(args: argparse.Namespace) -> Task:
    """Model, engine, workloads, rungs and where the books are; ConfigError if that makes no sense."""
    profile, engine = read_engine(args)
    if min(args.turn, args.turns, args.repeats) <= 0 or args.settle < 0:
        raise ConfigError("--turn, --turns and --repeats must be positive, --settle must not be negative")
    if preset_name(engine.model) is not None:
        engine = replace(engine, load_format="random")
    for workload in args.workloads or ():
        check_length(workload, profile)
    workloads = args.workloads or [text for text in WORKLOADS if is_short_enough(text, profile)]
    return Task(
        profile=profile,
        engine=engine,
        workloads=tuple(ThroughputConfig(workload=text, num_requests=_NUM_SIMULATED) for text in workloads),
        rungs=read_rungs(args.rungs and [SEQUENTIAL, *args.rungs], profile),
        folder=args.json_folder,
        is_forced=False,
        git_revision=None,
    )


def read_document(path: Path | None, task: Task) -> SteadyDocument:
    """The document so far, or an empty one; ConfigError if what is there was measured with other options."""
    blank = SteadyDocument(
        model=task.engine.model,
        options={name: getattr(task.engine, name) for name in _SAME},
        machine=dataclasses.asdict(detect_machine()),
        software=dataclasses.asdict(detect_software()),
        workloads=(),
    )
    if path is None or not path.exists():
        return blank
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=SteadyDocument)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no such document: {error}") from None
    if (stored.model, stored.options) != (blank.model, json.loads(json.dumps(blank.options))):
        raise ConfigError(f"{path} is of {stored.model} with {stored.options}: name another file")
    return replace(blank, workloads=stored.workloads)


@contextmanager
def engine_of(config: EngineConfig, books: Mapping[str, PlanBook]) -> Iterator[Engine]:
    """An engine that has the plans of all books; the few that the turns meet are prepared then."""
    entries = tuple(entry for book in books.values() for entry in book.entries)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "books.json"
        path.write_bytes(StoredBook(entries=entries).to_json())
        config = replace(config, plan=str(path))
        engine = build_engine(config, show_progress=sys.stderr.isatty(), prepares_plans=False)
    with closing(engine):
        yield engine


def measure(
    engine: Engine, books: Mapping[str, PlanBook], lengths: Sequence[Lengths], clock: Clock, seed: int
) -> list[Turn]:
    """Give every rung its turns, and leave the engine empty."""
    turns = list[Turn]()
    with energy_of(engine.facts.device) as energy:
        for place in range(clock.num_turns * clock.num_repeats):
            begin = partial(_Run, engine, lengths, (seed, place))
            counts = counts_of(begin, books[SEQUENTIAL], clock)
            # Forwards and backwards in turn, so that what drifts evenly tells for none.
            for rung in books if place % 2 == 0 else reversed(list(books)):
                turns.append(take_turn(begin, rung, books[rung], place // clock.num_turns, counts))
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


def take_turn(begin: Callable[[PlanBook], _Run], rung: str, book: PlanBook, repeat: int, counts: Counts) -> Turn:
    """Settle, then count; from the beginning again if graphs were captured meanwhile, which takes time only once."""
    for _ in range(_MOST_ATTEMPTS):
        with closing(begin(book)) as run:
            run.iterations(counts.num_settling)
            num_prepared, start_s = run.num_prepared, time.monotonic()
            turn = Turn(
                rung=rung,
                repeat=repeat,
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

    def __init__(self, engine: Engine, lengths: Sequence[Lengths], seed: tuple[int, int], book: PlanBook) -> None:
        facts = engine.facts
        # Batches whose iterations have not ended; `_step` ends them in the order in which they were planned.
        self._shapes: deque[BatchShape] = deque()
        engine.use_book(Watched(book, self._shapes))
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


if __name__ == "__main__":
    sys.exit(main())
