"""A whole serving run without a GPU: the real scheduler, a simulated clock, iterations that take what a model predicts.

`simulate` runs any number of replicas (`replica.py`) behind one queue. What an iteration takes is predicted by
`iteration.py`.
"""

from __future__ import annotations

import heapq
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nanoflow.config import ConfigError
from nanoflow.graph.graph import OpGraph
from nanoflow.kvcache.sizes import Demand, longest_sequence
from nanoflow.kvcache.tier_counts import TierCounts, total
from nanoflow.profile.table import Profile
from nanoflow.run_metrics import RequestRecord, RunMetrics, measure
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.policies import Policies
from nanoflow.simulate.arrivals import Arrivals, Independent
from nanoflow.simulate.link import BelowDevice
from nanoflow.simulate.replica import Iterations, SimulatedEngine, Times
from nanoflow.workload import Lengths

_DTYPE_BYTES = 2


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
        num_loads: Loads of pages from below the device; 0 without.
        tiers: What each tier of the KV cache did, over all replicas.
    """

    metrics: RunMetrics
    num_replicas: int
    num_gpus: int
    num_iterations: int
    mean_batch_tokens: float
    num_preemptions: int
    peak_page_share: float
    peak_requests: int
    num_loads: int
    tiers: Mapping[str, TierCounts]

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
    weights = graph.parameter_bytes(_DTYPE_BYTES) / setup.num_gpus
    longest = max(length.num_prompt_tokens + length.num_output_tokens for length in lengths)
    page_size = profile.page_size
    demand = Demand(
        max_num_seqs=max_num_seqs, max_model_len=longest, max_batch_tokens=max_batch_tokens, page_size=page_size
    )
    groups = [(group.window, group.bytes_per_token(_DTYPE_BYTES) * page_size) for group in graph.kv_groups]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal replicas behind one queue: a request goes to the one with the fewest outstanding tokens.

    With a `Pace` that has a bound and an estimate of iterations its schedulers bound their time as an engine does.

    Attributes:
        limits: Of each scheduler.
        iterations: What a batch takes.
        num_replicas, gpus_per_replica: How many there are.
        static_power_w: Of an idle GPU.
        pace, policies: Of each scheduler; the policies of an engine if not given.
        below: What is below the KV pages of each GPU.
        max_tokens: Most tokens that requests allow. None: as many as they get, and the scheduler knows that.
        on_progress: Is told how many requests have finished.
    """

    limits: SchedulerLimits
    iterations: Iterations
    num_replicas: int
    gpus_per_replica: int = 1
    static_power_w: float = 0.0
    pace: Pace = field(default_factory=Pace)
    policies: Policies | None = None
    below: BelowDevice = field(default_factory=BelowDevice)
    max_tokens: int | None = None
    on_progress: Callable[[int], None] = field(default=lambda _finished: None)


def simulate(cluster: Cluster, lengths: Sequence[Lengths], arrivals_s: Sequence[float]) -> SimulatedRun:
    """Run requests with these lengths, arriving at these times in increasing order, until all have finished.

    Raises:
        ConfigError: There is no request or no replica.
    """
    has_keys = cluster.below.num_slots > 0
    return simulate_arrivals(cluster, Independent(lengths, arrivals_s, has_keys=has_keys)).run


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A simulated run and what happened to each request.

    Attributes:
        run: The run.
        records: Of each request that has come, in the order of their ids.
        num_cached: Tokens of each prompt that were in the KV cache, by id.
        duration_s: From the first arrival to the last token.
    """

    run: SimulatedRun
    records: Sequence[RequestRecord]
    num_cached: Mapping[int, int]
    duration_s: float


def simulate_arrivals(cluster: Cluster, arrivals: Arrivals) -> Simulated:
    """Run requests as they come until all have finished.

    Raises:
        ConfigError: There is no request or no replica.
    """
    num_requests = arrivals.num_requests
    if num_requests < 1 or cluster.num_replicas < 1:
        raise ConfigError(f"there must be requests and replicas, got {num_requests} and {cluster.num_replicas}")
    times = Times.of(num_requests)
    engines = [_engine(cluster, times) for _ in range(cluster.num_replicas)]
    busy: list[tuple[float, int]] = []
    asked_of: dict[int, RequestRecord] = {}
    place_of: dict[int | None, int] = {}
    num_finished = 0
    while (next_s := arrivals.next_s) is not None or busy:
        # 1. A request arrives before anything else happens.
        if next_s is not None and (not busy or next_s <= busy[0][0]):
            asked = arrivals.take()
            asked_of[asked.request_id] = RequestRecord(
                num_prompt_tokens=len(asked.prompt_token_ids),
                num_requested_tokens=asked.num_output_tokens,
                arrival_s=asked.arrival_s,
            )
            fewest = min(range(len(engines)), key=lambda place: engines[place].num_outstanding_tokens)
            place = fewest if asked.thread is None else place_of.setdefault(asked.thread, fewest)
            was_busy = engines[place].is_busy
            engines[place].add(asked)
            if not was_busy:
                heapq.heappush(busy, (engines[place].now_s, place))
            continue
        # 2. The replica whose clock is behind all others makes a step.
        _, place = heapq.heappop(busy)
        for request_id in engines[place].step():
            num_finished += 1
            arrivals.finish(request_id, engines[place].now_s)
        if engines[place].is_busy:
            heapq.heappush(busy, (engines[place].now_s, place))
        cluster.on_progress(num_finished)
    return _result(cluster, engines, times, dict(sorted(asked_of.items())))


def _engine(cluster: Cluster, times: Times) -> SimulatedEngine:
    return SimulatedEngine(
        cluster.limits,
        cluster.pace,
        cluster.iterations,
        times,
        below=cluster.below,
        policies=cluster.policies,
        max_tokens=cluster.max_tokens,
    )


def _result(
    cluster: Cluster, engines: Sequence[SimulatedEngine], times: Times, asked: Mapping[int, RequestRecord]
) -> Simulated:
    gaps_s = times.gaps_s()
    records = [
        replace(
            record,
            num_output_tokens=int(times.num_tokens[request_id]),
            first_token_s=float(times.first_token_s[request_id]),
            finished_s=float(times.finished_s[request_id]),
            gaps_s=gaps_s[request_id],
        )
        for request_id, record in asked.items()
    ]
    duration_s = max(engine.now_s for engine in engines) - min(record.arrival_s for record in asked.values())
    energies_j = [engine.energy_j for engine in engines if engine.energy_j is not None]
    energy_j = None
    if len(energies_j) == len(engines):
        idle_s = sum(duration_s - engine.busy_s for engine in engines)
        energy_j = (sum(energies_j) + max(idle_s, 0.0) * cluster.static_power_w) * cluster.gpus_per_replica
    num_iterations = sum(engine.num_iterations for engine in engines)
    run = SimulatedRun(
        metrics=measure(records, duration_s, {}, energy_j=energy_j),
        num_replicas=len(engines),
        num_gpus=len(engines) * cluster.gpus_per_replica,
        num_iterations=num_iterations,
        mean_batch_tokens=sum(engine.num_batch_tokens for engine in engines) / num_iterations,
        num_preemptions=sum(engine.scheduler.num_preemptions for engine in engines),
        peak_page_share=max(engine.peak_page_share for engine in engines),
        peak_requests=max(engine.peak_requests for engine in engines),
        num_loads=sum(engine.copies.num_loads for engine in engines),
        tiers={name: total(engine.tiers[name] for engine in engines) for name in engines[0].tiers},
    )
    num_cached = dict(ChainMap(*(engine.num_cached for engine in engines)))
    return Simulated(run=run, records=records, num_cached=num_cached, duration_s=duration_s)


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
