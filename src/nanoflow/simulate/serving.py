"""A whole serving run without a GPU: the real scheduler, a simulated clock, iterations that take what a model predicts.

`SimulatedEngine` is one replica (the GPUs that share a model), driven as `engine/engine.py` drives a device with
asynchronous scheduling: batch i + 1 is formed while i runs, tokens of i are committed when it is done. `simulate` runs
any number of them behind one queue. What an iteration takes is `simulate/iteration.py`'s.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.config import ConfigError
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape
from nanoflow.kvcache.sizes import Demand, longest_sequence
from nanoflow.profile.table import Cost, Profile
from nanoflow.request import Request, SamplingParams
from nanoflow.run_metrics import RequestRecord, RunMetrics, measure
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.scheduler import Scheduler
from nanoflow.workload import Lengths

_DTYPE_BYTES = 2
# Greedy, of fixed length, never looked at.
_MAX_IN_FLIGHT = 1


class Iterations(Protocol):
    """What an iteration takes; `IterationModel` is one."""

    def cost(self, shape: BatchShape) -> Cost:
        """Time of a batch of this shape, and its energy on one GPU."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """What came out of a simulated run.

    Attributes:
        metrics: As of a measured run. Energy counts idle GPUs at their static power; None if it is not known.
        num_replicas, num_gpus: That were simulated.
        num_iterations: Of all replicas.
        mean_batch_tokens: Tokens of an iteration on average.
        num_preemptions: Of all replicas.
        peak_page_share: Largest part of the pages of any of a replica's pools in use.
        peak_requests: Most requests that had a row of one replica at once.
    """

    metrics: RunMetrics
    num_replicas: int
    num_gpus: int
    num_iterations: int
    mean_batch_tokens: float
    num_preemptions: int
    peak_page_share: float
    peak_requests: int

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Prompt and output tokens."""
        return self.metrics.total_tokens_per_s / self.num_gpus


def limits_for(
    profile: Profile,
    graph: OpGraph,
    lengths: Sequence[Lengths],
    *,
    max_batch_tokens: int,
    max_num_seqs: int,
    gpu_memory_utilization: float,
) -> SchedulerLimits:
    """The scheduler's limits on the GPUs of a profile: pages fill the memory that a GPU's part of the weights leaves.

    Args:
        profile, graph: Where and what; the graph as one GPU sees it.
        lengths: Of all requests; the longest sets the largest length.
        max_batch_tokens, max_num_seqs: Token budget and rows.
        gpu_memory_utilization: Part of the memory that may be used.

    Raises:
        ConfigError: The weights, or the longest request beside them, do not fit; with the numbers.
    """
    setup = profile.setup
    usable = setup.memory_bytes * gpu_memory_utilization
    weights = graph.num_parameters * _DTYPE_BYTES / setup.num_gpus
    longest = max(length.num_prompt_tokens + length.num_output_tokens for length in lengths)
    page_size = profile.page_size
    demand = Demand(
        max_num_seqs=max_num_seqs, max_model_len=longest, max_batch_tokens=max_batch_tokens, page_size=page_size
    )
    groups = [(group.window, group.elements_per_token * _DTYPE_BYTES * page_size) for group in graph.kv_groups]
    pools = demand.divide(min(int(usable - weights), demand.useful_bytes(groups)), groups)
    capacity = longest_sequence(pools, longest, page_size=page_size, max_batch_tokens=max_batch_tokens)
    if capacity < longest:
        raise ConfigError(
            f"{graph.name}: of {usable / 1e9:.1f} GB on each of {setup.num_gpus} GPUs the weights take "
            f"{weights / 1e9:.1f} GB, which leaves {capacity} tokens of KV cache for a request of {longest}"
        )
    return SchedulerLimits(
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=longest,
        num_pages=pools[0].num_pages,
        page_size=page_size,
        vocab_size=graph.vocab_size,
        group_pools=pools,
    )


@dataclass(slots=True)
class _Times:
    """When what happened to each request; NaN: not yet."""

    first_token_s: np.ndarray
    last_token_s: np.ndarray
    finished_s: np.ndarray
    num_tokens: np.ndarray
    gaps: list[tuple[np.ndarray, np.ndarray]]

    @staticmethod
    def of(num_requests: int) -> _Times:
        nothing = np.full(num_requests, np.nan)
        return _Times(nothing, nothing.copy(), nothing.copy(), np.zeros(num_requests, np.int64), [])

    def note_tokens(self, ids: np.ndarray, now_s: float) -> None:
        """Each of these requests gets a token now."""
        self.num_tokens[ids] += 1
        is_first = np.isnan(self.first_token_s[ids])
        new, old = ids[is_first], ids[~is_first]
        self.first_token_s[new] = now_s
        self.gaps.append((old, now_s - self.last_token_s[old]))
        self.last_token_s[ids] = now_s

    def gaps_s(self) -> list[tuple[float, ...]]:
        """Between the tokens of each request."""
        ids, gaps = (np.concatenate(parts) for parts in zip(*self.gaps, strict=True))
        by_request = np.argsort(ids, kind="stable")
        ends = np.cumsum(np.bincount(ids, minlength=len(self.num_tokens)))[:-1]
        return [tuple(part.tolist()) for part in np.split(gaps[by_request], ends)]


class SimulatedEngine:
    """One replica.

    Args:
        limits, pace: Of its scheduler.
        iterations: What a batch takes.
        times: Where it notes what happened, by request id.
    """

    def __init__(self, limits: SchedulerLimits, pace: Pace, iterations: Iterations, times: _Times) -> None:
        self._scheduler = Scheduler(limits=limits, pace=pace)
        self._iterations, self._times, self._limits = iterations, times, limits
        self._in_flight: deque[tuple[DenseBatch, float]] = deque()
        self._free_at_s = 0.0
        self._owed: dict[int, int] = {}
        self.now_s = 0.0
        self.busy_s = 0.0
        self.energy_j: float | None = 0.0
        self.num_iterations = self.num_batch_tokens = self.peak_requests = 0
        self.peak_page_share = 0.0

    @property
    def is_busy(self) -> bool:
        """True while a step makes progress."""
        return self._scheduler.has_unfinished or bool(self._in_flight)

    @property
    def num_outstanding_tokens(self) -> int:
        """Prompt and output tokens of requests that have not finished."""
        return sum(self._owed.values())

    @property
    def num_preemptions(self) -> int:
        """So far."""
        return self._scheduler.num_preemptions

    def add(self, request_id: int, length: Lengths, arrival_s: float) -> None:
        """Take a request that arrives now."""
        if not self.is_busy:
            self.now_s = max(self.now_s, arrival_s)
        self._owed[request_id] = length.num_prompt_tokens + length.num_output_tokens
        params = SamplingParams(temperature=0.0, max_tokens=length.num_output_tokens, ignore_eos=True)
        request = Request(
            request_id=request_id,
            prompt_token_ids=[0] * length.num_prompt_tokens,
            params=params,
            seed=0,
            max_tokens=length.num_output_tokens,
            arrival_s=arrival_s,
        )
        self._scheduler.add(request, length.num_computed)

    def step(self) -> None:
        """Form a batch and launch it; wait for the one before it, or for this one if nothing can be formed."""
        batch = self._scheduler.schedule()
        if batch is not None:
            self._launch(batch)
        if self._in_flight and (batch is None or len(self._in_flight) > _MAX_IN_FLIGHT):
            self._commit(*self._in_flight.popleft())

    def _launch(self, batch: DenseBatch) -> None:
        cost = self._iterations.cost(batch.shape)
        self._free_at_s = max(self.now_s, self._free_at_s) + cost.time_s
        self._in_flight.append((batch, self._free_at_s))
        self.busy_s += cost.time_s
        self.energy_j = None if self.energy_j is None or cost.energy_j is None else self.energy_j + cost.energy_j
        self.num_iterations += 1
        self.num_batch_tokens += batch.num_tokens
        pool = self._scheduler.fullest_pool
        self.peak_page_share = max(self.peak_page_share, pool.num_in_use / pool.num_pages)
        self.peak_requests = max(self.peak_requests, self._scheduler.num_running)

    def _commit(self, batch: DenseBatch, done_s: float) -> None:
        self.now_s = max(self.now_s, done_s)
        result = SampledTokens(token_ids=np.zeros(len(batch.sampled), np.int32))
        committed = self._scheduler.commit(batch, result)
        self._scheduler.drain_events()
        self._times.note_tokens(committed.request_ids, self.now_s)
        for request_id in committed.finished:
            self._times.finished_s[request_id] = self.now_s
            del self._owed[request_id]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal replicas behind one queue: a request goes to the one with the fewest outstanding tokens.

    With a `Pace` that has a bound and an estimate of iterations its schedulers bound their time as an engine does.
    """

    limits: SchedulerLimits
    iterations: Iterations
    num_replicas: int
    gpus_per_replica: int = 1
    static_power_w: float = 0.0
    pace: Pace = field(default_factory=Pace)
    on_progress: Callable[[int], None] = field(default=lambda _finished: None)


def simulate(cluster: Cluster, lengths: Sequence[Lengths], arrivals_s: Sequence[float]) -> SimulatedRun:
    """Run requests with these lengths, arriving at these times in increasing order, until all have finished.

    Raises:
        ConfigError: There is no request or no replica.
    """
    if not lengths or cluster.num_replicas < 1:
        raise ConfigError(f"there must be requests and replicas, got {len(lengths)} and {cluster.num_replicas}")
    times = _Times.of(len(lengths))
    engines = [
        SimulatedEngine(cluster.limits, cluster.pace, cluster.iterations, times) for _ in range(cluster.num_replicas)
    ]
    busy: list[tuple[float, int]] = []
    coming = deque(enumerate(arrivals_s))
    while coming or busy:
        # 1. A request arrives before anything else happens.
        if coming and (not busy or coming[0][1] <= busy[0][0]):
            request_id, arrival_s = coming.popleft()
            place = min(range(len(engines)), key=lambda place: engines[place].num_outstanding_tokens)
            was_busy = engines[place].is_busy
            engines[place].add(request_id, lengths[request_id], arrival_s)
            if not was_busy:
                heapq.heappush(busy, (engines[place].now_s, place))
            continue
        # 2. The replica whose clock is behind all others makes a step.
        _, place = heapq.heappop(busy)
        engines[place].step()
        if engines[place].is_busy:
            heapq.heappush(busy, (engines[place].now_s, place))
        cluster.on_progress(int(np.count_nonzero(~np.isnan(times.finished_s))))
    return _result(cluster, engines, times, lengths, arrivals_s)


def _result(
    cluster: Cluster,
    engines: Sequence[SimulatedEngine],
    times: _Times,
    lengths: Sequence[Lengths],
    arrivals_s: Sequence[float],
) -> SimulatedRun:
    gaps_s = times.gaps_s()
    records = [
        RequestRecord(
            num_prompt_tokens=length.num_prompt_tokens,
            num_requested_tokens=length.num_output_tokens,
            num_output_tokens=int(times.num_tokens[place]),
            arrival_s=arrivals_s[place],
            first_token_s=float(times.first_token_s[place]),
            finished_s=float(times.finished_s[place]),
            gaps_s=gaps_s[place],
        )
        for place, length in enumerate(lengths)
    ]
    duration_s = max(engine.now_s for engine in engines) - arrivals_s[0]
    energies_j = [engine.energy_j for engine in engines if engine.energy_j is not None]
    energy_j = None
    if len(energies_j) == len(engines):
        idle_s = sum(duration_s - engine.busy_s for engine in engines)
        energy_j = (sum(energies_j) + max(idle_s, 0.0) * cluster.static_power_w) * cluster.gpus_per_replica
    num_iterations = sum(engine.num_iterations for engine in engines)
    return SimulatedRun(
        metrics=measure(records, duration_s, {}, energy_j=energy_j),
        num_replicas=len(engines),
        num_gpus=len(engines) * cluster.gpus_per_replica,
        num_iterations=num_iterations,
        mean_batch_tokens=sum(engine.num_batch_tokens for engine in engines) / num_iterations,
        num_preemptions=sum(engine.num_preemptions for engine in engines),
        peak_page_share=max(engine.peak_page_share for engine in engines),
        peak_requests=max(engine.peak_requests for engine in engines),
    )


def least_replicas(is_enough: Callable[[int], bool], most: int) -> int | None:
    """The fewest replicas that are enough, by doubling and bisecting; None if even `most` are not."""
    low, high = 0, 1
    while not is_enough(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
