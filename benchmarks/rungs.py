"""The rungs of the ablation ladder: the plan book of each, made from a profile, and what is predicted under it.

Books and predictions are files, made once. Which rungs there are is `ladder.py`'s, who runs them `ablation.py`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from benchmarks.ladder import NANO_BATCHES, SEARCHED, SEQUENTIAL, Prediction, options_of
from benchmarks.targets import is_trace, record_paths
from nanoflow.bench import simulation
from nanoflow.bench.batches import batches_of
from nanoflow.bench.config import ThroughputConfig
from nanoflow.bench.simulation import Cluster, SimulatedRun, limits_for, simulate
from nanoflow.bench.workload import Lengths, draw_lengths
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.cost.interference import Interference
from nanoflow.cost.table import CostTable, Profile
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape
from nanoflow.models.presets import preset_name
from nanoflow.plan.book import BookLimits, MadeFor, PlanBook, PlanEntry, StoredBook, load_book
from nanoflow.plan.plan import Mechanism, PipelinePlan
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.search.allocate import Allocation, divisions
from nanoflow.search.books import covering_cells, search_book
from nanoflow.search.emit import emit
from nanoflow.search.inside import carrying_runs, inside_plan
from nanoflow.search.iteration import IterationModel, graphs_of
from nanoflow.search.problem import groups_of, make_problem
from nanoflow.search.shapes import entry_of, ranked
from nanoflow.search.structure import Effort, solve_structure

# Products come in tiles of so many tokens: batches of two tiles and more are cut, and between them.
_TILE = 128
# As the search has them (`search/search.py`).
_MAX_STAGES, _NUM_NODES, _TIME_LIMIT_S = 3, 300, 60.0

Iterations = Sequence[tuple[BatchShape, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to do: every rung on every workload, all files in one folder."""

    profile: Profile
    engine: EngineConfig
    workloads: tuple[ThroughputConfig, ...]
    rungs: tuple[str, ...]
    folder: Path
    is_forced: bool
    git_revision: str | None

    @property
    def model(self) -> str:
        """Its name in file names."""
        return preset_name(self.engine.model) or Path(self.engine.model).name

    @property
    def own_limits(self) -> BookLimits:
        """Token budget and requests at once; ConfigError if the engine would choose them."""
        tokens, seqs = self.engine.max_batch_tokens, self.engine.max_num_seqs
        if tokens is None or seqs is None:
            raise ConfigError("rungs are compared within the same limits: give max_batch_tokens and max_num_seqs")
        return BookLimits(max_batch_tokens=tokens, max_num_seqs=seqs)

    @property
    def graph(self) -> OpGraph:
        """The model as the engine runs it."""
        return graphs_of(self.profile)[0]

    @property
    def profile_digest(self) -> str:
        """Twelve hexadecimal digits that name its content."""
        return hashlib.sha256(self.profile.to_json()).hexdigest()[:12]

    @property
    def predictions_path(self) -> Path:
        """Where predictions are kept."""
        return self.folder / f"predictions_{self.model}.json"

    def book_path(self, rung: str) -> Path | None:
        """The rung's plan book; the sequential one has none."""
        return None if rung == SEQUENTIAL else self.folder / "books" / f"{self.model}_{rung}.json"

    def book(self, rung: str) -> PlanBook:
        """The book as the engine will have it; PlanError if it is not there or does not fit."""
        path, fallback = self.book_path(rung), sequential_plan(self.graph, self.own_limits.max_batch_tokens)
        return PlanBook(fallback=fallback) if path is None else load_book(path).with_fallback(fallback, self.graph)

    def record_path(self, config: ThroughputConfig, rung: str) -> Path:
        """Where the record of a run is."""
        (path,) = record_paths(self.folder, self.engine.model, [config.workload])
        return path.with_name(f"{path.stem.removeprefix('throughput_')}_{rung}.json")

    def limits(self, lengths: Sequence[Lengths]) -> SchedulerLimits:
        """Of the engine, for requests of these lengths."""
        return limits_for(
            self.profile,
            self.graph,
            lengths,
            max_batch_tokens=self.own_limits.max_batch_tokens,
            max_num_seqs=self.own_limits.max_num_seqs,
            gpu_memory_utilization=self.engine.gpu_memory_utilization,
        )

    def options(self, config: ThroughputConfig) -> dict[str, object]:
        """What a record of this run says of its options."""
        return options_of({"workload": dataclasses.asdict(config), "config": dataclasses.asdict(self.engine)})


def make_books(task: Task) -> None:
    """The books that are not there yet; one for all workloads of the task."""
    missing = [(rung, path) for rung in task.rungs if (path := task.book_path(rung)) and not path.exists()]
    is_searched = any(rung != NANO_BATCHES for rung, _ in missing)
    iterations = [each for config in task.workloads for each in iterations_of(task, config)] if is_searched else []
    setup, budget = task.profile.setup, task.own_limits.max_batch_tokens
    made_for = MadeFor(model=task.profile.model, gpu=setup.gpu, num_gpus=setup.num_gpus)
    for rung, path in missing:
        book = StoredBook(entries=tuple(entries_of(task.profile, rung, iterations, budget)), made_for=made_for)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(book.to_json())
        print(f"{path}: {len(book.plans)} plans in {len(book.entries)} ranges", flush=True)


def iterations_of(task: Task, config: ThroughputConfig) -> list[tuple[BatchShape, float]]:
    """Every iteration of a workload, sequentially, and what it takes."""
    lengths = draw_lengths(config.workload, config.num_requests, config.seed)
    return batches_of(IterationModel(task.profile), lengths, task.limits(lengths), config.seed)


def simulated(task: Task, config: ThroughputConfig, iterations: simulation.Iterations) -> SimulatedRun:
    """A whole run of a workload, with the engine's options."""
    lengths = draw_lengths(config.workload, config.num_requests, config.seed)
    cluster = Cluster(
        limits=task.limits(lengths),
        iterations=iterations,
        num_replicas=1,
        static_power_w=task.profile.setup.static_power_w or 0.0,
    )
    return simulate(cluster, lengths, [0.0] * len(lengths))


def predict(task: Task) -> None:
    """Simulate every rung on every workload, unless that is known of this very book and profile."""
    known = load_predictions(task)
    for rung in task.rungs:
        book = task.book(rung)
        for config in task.workloads:
            wanted = Prediction(
                workload=label(config.workload),
                rung=rung,
                book=book.digest,
                profile=task.profile_digest,
                options=task.options(config),
            )
            if wanted.key in known and known[wanted.key].profile == wanted.profile:
                continue
            run = simulated(task, config, IterationModel(task.profile, book)).metrics
            known[wanted.key] = replace(
                wanted, total_tokens_per_s=run.total_tokens_per_s, energy_per_token_j=run.energy_per_token_j
            )
            print(f"predicted: {label(config.workload)}, {rung}: {run.total_tokens_per_s:,.0f} tok/s", flush=True)
        write_json(task.predictions_path, list(known.values()))


def load_predictions(task: Task) -> dict[str, Prediction]:
    """Those that are stored, by their key."""
    path = task.predictions_path
    stored = msgspec.json.decode(path.read_bytes(), type=list[Prediction]) if path.exists() else []
    return {each.key: each for each in stored}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def label(workload: str) -> str:
    """The workload without the folder of its trace."""
    return f"trace:{Path(workload.removeprefix('trace:')).name}" if is_trace(workload) else workload


def entries_of(profile: Profile, rung: str, iterations: Iterations, max_batch_tokens: int) -> Iterator[PlanEntry]:
    """The plans of a rung.

    Args:
        profile: What operations take.
        rung: Its name; of a mechanism, if it is no other one.
        iterations: Every iteration of the runs, sequential, with the time it takes; not needed for nano-batches.
        max_batch_tokens: The token budget.
    """
    if rung == NANO_BATCHES:
        yield from nano_batches(graphs_of(profile)[0], max_batch_tokens)
    elif rung == SEARCHED:
        found = search_book(profile, iterations, max_batch_tokens=max_batch_tokens, time_limit_s=_TIME_LIMIT_S)
        yield from (each.entry for each in found if each.entry is not None)
    else:
        yield from forced(profile, Mechanism(rung), iterations, max_batch_tokens)


def nano_batches(graph: OpGraph, max_batch_tokens: int) -> Iterator[PlanEntry]:
    """Every batch of two tiles or more cut near the middle; a plan for sizes that differ by an eighth at most."""
    smallest, size = 2 * _TILE, 2 * _TILE
    while smallest <= max_batch_tokens:
        size = min(size, max_batch_tokens)
        plan = nanobatch_plan(graph, size, [middle_of(size)], f"nano-batches of {middle_of(size)}")
        yield PlanEntry(plan=plan, min_tokens=smallest, max_tokens=size)
        smallest, size = size + 1, size + max(size // 8 // _TILE, 1) * _TILE


def middle_of(num_tokens: int) -> int:
    """The end of a tile that is nearest to the middle."""
    return max(round(num_tokens / 2 / _TILE), 1) * _TILE


def forced(
    profile: Profile,
    mechanism: Mechanism,
    iterations: Iterations,
    max_batch_tokens: int,
) -> Iterator[PlanEntry]:
    """In each cell the plan of a mechanism that is predicted to win most, or to lose least."""
    model = IterationModel(profile)
    plans: dict[str, PipelinePlan] = {}
    for cell in covering_cells(iterations, max_batch_tokens):
        plans |= {plan.digest: plan for plan in plans_of(profile, mechanism, cell.middle)}
        best = ranked(plans.values(), cell, model.iteration_s)
        if best:
            yield entry_of(best[0][1], cell)


def plans_of(profile: Profile, mechanism: Mechanism, shape: BatchShape) -> Iterator[PipelinePlan]:
    """A plan for each way to divide the device in two once, as a quick search has them (`search/search.py`).

    On plain streams a share is a result of the measurement, not a way to divide; here it stands for one.
    """
    graph = graphs_of(profile)[0]
    middle = middle_of(shape.num_tokens)
    if not 0.2 <= middle / shape.num_tokens <= 0.8:
        return
    if mechanism is Mechanism.INSIDE:
        shares = Interference(profile, graph).inside.shares
        for share, carrying in itertools.product(shares, carrying_runs(graph)):
            yield inside_plan(graph, shape.num_tokens, middle, share, carrying)
        return
    splits = {group.name: (middle,) for group in groups_of(graph)}
    problem = make_problem(graph, CostTable(profile, graph), shape, splits)
    for division in divisions(problem, Interference(_only(profile, mechanism), graph)):
        effort = Effort(num_nodes=_NUM_NODES, time_limit_s=_TIME_LIMIT_S)
        schedule = solve_structure(division.problem, max_stages=_MAX_STAGES, effort=effort)
        if schedule is not None:
            allocation = Allocation(mechanism=mechanism, schedule=schedule, shares=division.shares)
            name = f"{mechanism}{division.name.removeprefix(division.mechanism)}, 2 nano-batches at {middle}"
            yield emit(division.problem, allocation, name)


def _only(profile: Profile, mechanism: Mechanism) -> Profile:
    """The profile with pairs of one mechanism; those of streams pass for partitions, which divide the device."""
    pairs = tuple(pair for pair in profile.pairs if pair.mechanism is mechanism)
    if mechanism is not Mechanism.STREAM:
        return replace(profile, pairs=pairs)
    return replace(
        profile,
        pairs=tuple(replace(pair, mechanism=Mechanism.PARTITION) for pair in pairs),
        points=tuple(point for point in profile.points if point.mechanism is Mechanism.WHOLE),
    )
