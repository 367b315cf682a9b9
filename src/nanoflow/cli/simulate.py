"""`nanoflow simulate`: predict one iteration, a whole serving run, or the number of GPUs needed; needs no GPU.

This file has options and output. `simulate/iteration.py` predicts iterations, `simulate/serving.py` whole runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import ConfigError, option

if TYPE_CHECKING:
    from nanoflow.plan.book import BookLimits, StoredBook
    from nanoflow.profile.table import Profile
    from nanoflow.run_metrics import Distribution
    from nanoflow.simulate.iteration import IterationModel
    from nanoflow.simulate.serving import SimulatedRun
    from nanoflow.workload import Lengths

_TEACH = """\
Predict what GPUs would do, from a profile of one of them (or an estimate: nanoflow
profile --estimate). With --batch: one iteration of that batch. Else a whole serving
run: the real scheduler on a simulated clock, requests of a workload in, throughput,
latencies and joules out, on as many GPUs as --gpus says. With --find-gpus the other
way round: how many GPUs keep the latency below --max-normalized-latency-ms?"""

_EXAMPLES = """\
  nanoflow simulate profile.json --batch 2048 --decodes 1024 --context 768
  nanoflow simulate profile.json --workload 512/512 --num-requests 1000 --plan plans.json
  nanoflow simulate profile.json --workload trace:lengths.csv --num-requests 20000 --request-rate 100 --gpus 64
  nanoflow simulate profile.json --workload trace:lengths.csv --num-requests 5000 --request-rate 100 --find-gpus"""


# Limits if neither the user nor the book gives any.
_BUDGET, _REQUESTS = 2048, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateConfig:
    """What to simulate."""

    plan: str | None = option(None, "Plan or plan book of nanoflow search; every batch runs sequentially if not given")
    workload: str = option("512/512", "Prompt tokens/output tokens of every request, or trace:FILE.csv to draw lengths")
    num_requests: int = option(1000, "Requests")
    request_rate: float = option(math.inf, "Requests/s, Poisson arrivals; inf: all at once")
    gpus: int | None = option(None, "GPUs in all; as many as the profile's model is spread over if not given")
    max_batch_tokens: int | None = option(None, f"Token budget of an iteration; the book's, or {_BUDGET}, if not given")
    max_num_seqs: int | None = option(
        None, f"Most requests that run at once on a replica; the book's, or {_REQUESTS}, if not given"
    )
    gpu_memory_utilization: float = option(0.9, "Part of a GPU's memory for weights and KV cache")
    seed: int = option(0, "Seed of lengths and arrivals")
    find_gpus: bool = option(False, "Find the fewest GPUs that meet the limit")
    max_normalized_latency_ms: float = option(200.0, "The limit: latency an output token")
    percentile: int = option(90, "Percentile of requests that the limit is for: 50, 90 or 99")
    max_gpus: int = option(4096, "Most GPUs to try")
    batch: int | None = option(None, "Predict one iteration of a batch of this number of tokens instead")
    decodes: int | None = option(None, "Decodes in that batch; half of it if not given")
    context: float = option(1024.0, "Keys that each of these decodes sees")

    def __post_init__(self) -> None:
        positive = ("num_requests", "request_rate", "max_batch_tokens", "max_num_seqs", "max_gpus", "context")
        for name in (*positive, "max_normalized_latency_ms"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.percentile not in (50, 90, 99):
            raise ConfigError(f"percentile must be 50, 90 or 99, got {self.percentile}")
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"batch must be positive, got {self.batch}")
        if self.decodes is not None and not (self.batch is not None and 0 <= self.decodes <= self.batch):
            raise ConfigError("decodes needs --batch and may not exceed it")
        if self.find_gpus and math.isinf(self.request_rate):
            raise ConfigError("find_gpus needs a request_rate: with all requests at once latency has no meaning")


_OPTIONS = OptionGroup(kind=SimulateConfig, title="what to simulate")


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow simulate`."""
    parser = add_command(commands, "simulate", "predict iterations and serving runs without a GPU", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} PROFILE [options]"
    parser.add_argument("profile", metavar="PROFILE", type=Path, help="File written by nanoflow profile")
    parser.add_argument("--json", metavar="FILE", type=Path, help="File for the result")
    _OPTIONS.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulate and print."""
    from nanoflow.plan.book import load_book
    from nanoflow.profile.table import Profile

    config = _OPTIONS.read(args)
    profile = Profile.load(args.profile)
    book = None if config.plan is None else load_book(Path(config.plan))
    limits = _limits(config, book)
    config = dataclasses.replace(config, max_batch_tokens=limits.max_batch_tokens, max_num_seqs=limits.max_num_seqs)
    model = _model(profile, book, max(limits.max_batch_tokens, config.batch or 0))
    if config.batch is not None:
        print("\n".join(_iteration(model, config)))
        return 0
    simulation = _Simulation.make(profile, model, config, limits)
    if config.find_gpus:
        return _find(simulation, config)
    gpus = config.gpus or profile.setup.num_gpus
    if gpus % profile.setup.num_gpus:
        raise ConfigError(f"gpus must be a multiple of the {profile.setup.num_gpus} of the profile, got {gpus}")
    result = simulation.run(gpus // profile.setup.num_gpus, show_progress=sys.stderr.isatty())
    print("\n".join(_describe(profile, config, result)))
    if args.json is not None:
        args.json.write_text(json.dumps(_document(profile, config, result), indent=2) + "\n", encoding="utf-8")
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Simulation:
    """All inputs of a simulation but the number of replicas."""

    profile: Profile
    model: IterationModel
    config: SimulateConfig
    limits: BookLimits
    lengths: list[Lengths]
    arrivals_s: list[float]

    @staticmethod
    def make(profile: Profile, model: IterationModel, config: SimulateConfig, limits: BookLimits) -> _Simulation:
        from nanoflow.workload import draw_arrivals, draw_lengths

        lengths = draw_lengths(config.workload, config.num_requests, config.seed)
        arrivals_s = draw_arrivals(config.num_requests, config.request_rate, config.seed)
        return _Simulation(
            profile=profile, model=model, config=config, limits=limits, lengths=lengths, arrivals_s=arrivals_s
        )

    def run(self, num_replicas: int, *, show_progress: bool) -> SimulatedRun:
        """Simulate all requests on this many replicas."""
        from tqdm import tqdm

        from nanoflow.simulate.serving import Cluster, limits_for, simulate

        config, setup = self.config, self.profile.setup
        limits = limits_for(
            self.profile,
            self.model.graph,
            self.lengths,
            max_batch_tokens=self.limits.max_batch_tokens,
            max_num_seqs=self.limits.max_num_seqs,
            gpu_memory_utilization=config.gpu_memory_utilization,
        )
        with tqdm(total=len(self.lengths), desc="Simulating", unit="request", disable=not show_progress) as bar:
            cluster = Cluster(
                limits=limits,
                iterations=self.model,
                num_replicas=num_replicas,
                gpus_per_replica=setup.num_gpus,
                static_power_w=setup.static_power_w or 0.0,
                on_progress=lambda finished: _advance(bar, finished),
            )
            return simulate(cluster, self.lengths, self.arrivals_s)


def _advance(bar: object, finished: int) -> None:
    bar.update(finished - bar.n)  # type: ignore[attr-defined]


def _limits(config: SimulateConfig, book: StoredBook | None) -> BookLimits:
    """Each limit from the options, else from the book, else a default."""
    from nanoflow.plan.book import BookLimits

    usual = BookLimits(max_batch_tokens=_BUDGET, max_num_seqs=_REQUESTS)
    known = usual if book is None or book.limits is None else book.limits
    return BookLimits(
        max_batch_tokens=config.max_batch_tokens or known.max_batch_tokens,
        max_num_seqs=config.max_num_seqs or known.max_num_seqs,
    )


def _model(profile: Profile, book: StoredBook | None, num_tokens: int) -> IterationModel:
    """The model of iterations of up to `num_tokens` tokens under the plans of a book."""
    from nanoflow.plan.sequential import sequential_plan
    from nanoflow.simulate.iteration import IterationModel, graphs_of

    if book is None:
        return IterationModel(profile)
    graph = graphs_of(profile)[0]
    return IterationModel(profile, book.with_fallback(sequential_plan(graph, num_tokens), graph))


def _iteration(model: IterationModel, config: SimulateConfig) -> Iterator[str]:
    from nanoflow.search.shapes import batch_of

    assert config.batch is not None
    decodes = config.batch // 2 if config.decodes is None else config.decodes
    shape = batch_of(config.batch, decodes, config.context, config.context)
    prediction = model.predict(shape)
    energy = prediction.energy_per_token_j
    yield f"{config.batch:,} tokens, {decodes:,} of them decodes with {config.context:,.0f} keys each"
    yield f"  plan        {prediction.simulation.timeline.name}"
    yield f"  layer       {prediction.makespan_s * 1e6:,.1f} us"
    yield f"  iteration   {prediction.iteration_s * 1e3:,.2f} ms"
    yield f"  throughput  {prediction.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
    yield f"  energy      {'not known' if energy is None else f'{energy * 1e3:,.1f} mJ/token'}"


def _find(simulation: _Simulation, config: SimulateConfig) -> int:
    """Try growing numbers of replicas and print the first that is enough; returns 1 if none is, else 0."""
    from nanoflow.simulate.serving import least_replicas

    per_replica = simulation.profile.setup.num_gpus

    def is_enough(num_replicas: int) -> bool:
        result = simulation.run(num_replicas, show_progress=sys.stderr.isatty())
        latency_ms = _percentile(config)(result.metrics.normalized_latency_s) * 1e3
        met = latency_ms <= config.max_normalized_latency_ms
        print(
            f"{num_replicas * per_replica:>6,} GPUs: {latency_ms:,.1f} ms/token for {config.percentile} % of requests"
            f"{'' if met else ', too slow'}",
            flush=True,
        )
        return met

    replicas = least_replicas(is_enough, max(config.max_gpus // per_replica, 1))
    if replicas is None:
        print(f"{config.max_gpus} GPUs are not enough for {config.max_normalized_latency_ms:g} ms/token")
        return 1
    print(
        f"{replicas * per_replica:,} GPUs serve {config.request_rate:g} requests/s at "
        f"{config.max_normalized_latency_ms:g} ms/token ({simulation.profile.setup.gpu})"
    )
    return 0


def _percentile(config: SimulateConfig) -> Callable[[Distribution | None], float]:
    def value(distribution: Distribution | None) -> float:
        return math.inf if distribution is None else float(getattr(distribution, f"p{config.percentile}"))

    return value


def _describe(profile: Profile, config: SimulateConfig, result: SimulatedRun) -> Iterator[str]:
    metrics = result.metrics
    kind = "measured" if profile.setup.is_measured else "estimated"
    rate = "at once" if math.isinf(config.request_rate) else f"at {config.request_rate:g} requests/s"
    gpus = f"{result.num_gpus:,} x {profile.setup.gpu}"
    yield f"{profile.model} on {gpus} ({kind} profile), {result.num_replicas:,} replicas"
    yield f"{config.workload}, {metrics.num_requests:,} requests {rate}"
    yield f"  duration      {metrics.duration_s:,.1f} s, {result.num_iterations:,} iterations"
    yield f"  throughput    {metrics.total_tokens_per_s:,.0f} tokens/s, {result.tokens_per_s_per_gpu:,.0f} a GPU"
    yield f"  requests      {metrics.requests_per_s:,.2f} /s"
    rows = {"TTFT": metrics.ttft_s, "TPOT": metrics.tpot_s, "latency/token": metrics.normalized_latency_s}
    for name, found in rows.items():
        if found is not None:
            shown = (found.mean, found.p50, found.p90, found.p99)
            mean, p50, p90, p99 = (f"{value * 1e3:,.1f}" for value in shown)
            yield f"  {name:<14}mean {mean} ms, p50 {p50}, p90 {p90}, p99 {p99}"
    energy = metrics.energy_per_token_j
    yield f"  energy        {'not known' if energy is None else f'{energy * 1e3:,.1f} mJ/token'}"
    yield f"  batch         {result.mean_batch_tokens:,.0f} tokens on average"
    yield f"  KV cache      {result.peak_page_share:.0%} at most, {result.num_preemptions:,} preemptions"


def _document(profile: Profile, config: SimulateConfig, result: SimulatedRun) -> dict[str, object]:
    """The result and its inputs as JSON; infinite rates are texts, which JSON lacks as numbers."""
    options = dataclasses.asdict(config)
    options["request_rate"] = str(config.request_rate) if math.isinf(config.request_rate) else config.request_rate
    return {
        "simulation": options,
        "model": profile.model,
        "setup": dataclasses.asdict(profile.setup),
        "result": dataclasses.asdict(result),
    }
