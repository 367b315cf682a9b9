"""Whole runs of workloads, simulated under any limits: what the search for limits asks (`search/limits.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import BookLimits
from nanoflow.profile.host_link import NO_COPIES, Copies
from nanoflow.profile.interference import lane_of
from nanoflow.profile.table import Cost, Profile
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.search.limits import OverlapBound, Run
from nanoflow.simulate.batches import steady_batches_of
from nanoflow.simulate.iteration import IterationModel, Recorded
from nanoflow.simulate.replica import Iterations
from nanoflow.simulate.serving import Cluster, SimulatedRun, limits_for, simulate
from nanoflow.workload import Lengths, draw_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gained:
    """Iterations that are so much faster than a model says."""

    model: Iterations
    gain: Callable[[BatchShape], float]

    def cost(self, shape: BatchShape) -> Cost:
        """See `Iterations`."""
        cost = self.model.cost(shape)
        return Cost(time_s=cost.time_s / self.gain(shape), energy_j=cost.energy_j)


@dataclass(frozen=True, slots=True, kw_only=True)
class _AtOnce:
    """The run of a workload without plans, and each of its iterations with its seconds."""

    run: Run
    iterations: tuple[tuple[BatchShape, float], ...]


class SimulatedWorkloads:
    """Workloads, each a run of its own, all requests at once.

    Args:
        profile: What operations take.
        workloads: As `draw_lengths` reads them.
        num_requests: Of each.
        seed: Of the lengths.
        gpu_memory_utilization: Part of the memory for weights and KV cache.
        copies: Of KV pages, beside every iteration.

    Raises:
        ConfigError: A workload cannot be read.
    """

    def __init__(
        self,
        profile: Profile,
        workloads: Sequence[str],
        *,
        num_requests: int,
        seed: int,
        gpu_memory_utilization: float,
        copies: Copies = NO_COPIES,
    ) -> None:
        self._profile, self._seed, self._utilization = profile, seed, gpu_memory_utilization
        self._model = IterationModel(profile, copies=copies)
        self._lengths = [draw_lengths(workload, num_requests, seed) for workload in workloads]
        resource_of = {op.name: lane_of(op) for op in self._model.graph.layer}
        self._bound = OverlapBound(profile, resource_of)
        self._known: dict[tuple[int, BookLimits], _AtOnce] = {}

    def sequential(self, limits: BookLimits) -> tuple[Run, ...]:
        """The run of each workload without plans.

        Raises:
            ConfigError: The memory cannot hold the longest request.
        """
        return tuple(self._at_once(place, limits).run for place in range(len(self._lengths)))

    def batches(self, limits: BookLimits) -> list[tuple[BatchShape, float]]:
        """Every iteration of all workloads without plans, and its seconds.

        Of each workload those of two runs, which have between them what an engine meets: all requests at once, and
        the steady state (`steady_batches_of`).
        """
        found: list[tuple[BatchShape, float]] = []
        for place, lengths in enumerate(self._lengths):
            found += self._at_once(place, limits).iterations
            found += steady_batches_of(self._model, lengths, self._limits(lengths, limits), self._seed)
        return found

    def rates(self, limits: BookLimits, gain: Callable[[BatchShape], float]) -> tuple[float, ...]:
        """Tokens a second and GPU of each workload if each batch is so much faster than without plans."""
        iterations = _Gained(model=self._model, gain=gain)
        return tuple(self._run(lengths, limits, iterations).tokens_per_s_per_gpu for lengths in self._lengths)

    def _at_once(self, place: int, limits: BookLimits) -> _AtOnce:
        """The run of one workload without plans; it is kept, as plans are searched for its iterations."""
        key = (place, limits)
        if key not in self._known:
            recorded = Recorded(self._model)
            run = self._run(self._lengths[place], limits, recorded)
            # One iteration follows the other, as all requests are there from the start.
            saved_s = sum(self._bound.saved_s(self._model.busy_s(shape)) for shape, _ in recorded.iterations)
            duration_s = run.metrics.duration_s
            found = Run(
                tokens_per_s=run.tokens_per_s_per_gpu,
                peak_requests=run.peak_requests,
                bound_tokens_per_s=run.tokens_per_s_per_gpu * duration_s / max(duration_s - saved_s, saved_s),
            )
            self._known[key] = _AtOnce(run=found, iterations=tuple(recorded.iterations))
        return self._known[key]

    def _run(self, lengths: Sequence[Lengths], limits: BookLimits, iterations: Iterations) -> SimulatedRun:
        cluster = Cluster(
            limits=self._limits(lengths, limits),
            iterations=iterations,
            num_replicas=1,
            gpus_per_replica=self._profile.setup.num_gpus,
        )
        return simulate(cluster, lengths, [0.0] * len(lengths))

    def _limits(self, lengths: Sequence[Lengths], limits: BookLimits) -> SchedulerLimits:
        return limits_for(
            self._profile,
            self._model.graph,
            lengths,
            max_batch_tokens=limits.max_batch_tokens,
            max_num_seqs=limits.max_num_seqs,
            gpu_memory_utilization=self._utilization,
        )
