"""Options of `nanoflow simulate`; `simulate.py` has the command."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanoflow.config import ConfigError, option

# Limits if neither the user nor the book gives any.
BUDGET, REQUESTS = 2048, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateConfig:
    """What to simulate."""

    plan: str | None = option(None, "Plan or plan book of nanoflow search; every batch runs sequentially if not given")
    workload: str = option(
        "512/512", "Prompt tokens/output tokens of every request, a mix of several, or trace:FILE.csv"
    )
    num_requests: int = option(1000, "Requests")
    request_rate: float = option(math.inf, "Requests/s, Poisson arrivals; inf: all at once")
    gpus: int | None = option(None, "GPUs in all; as many as the profile's model is spread over if not given")
    max_batch_tokens: int | None = option(None, f"Token budget of an iteration; the book's, or {BUDGET}, if not given")
    max_num_seqs: int | None = option(
        None, f"Most requests that run at once on a replica; the book's, or {REQUESTS}, if not given"
    )
    gpu_memory_utilization: float = option(0.9, "Part of a GPU's memory for weights and KV cache")
    seed: int = option(0, "Seed of lengths and arrivals")
    find_gpus: bool = option(False, "Find the fewest GPUs that meet the limit")
    max_normalized_latency_ms: float = option(200.0, "The limit: latency an output token")
    percentile: int = option(90, "Percentile of requests that the limit is for: 50, 90 or 99")
    max_gpus: int = option(4096, "Most GPUs to try")
    kv_host_gib: float = option(0.0, "Host memory below the KV cache of each replica, GiB; 0 for none")
    kv_disk_gib: float = option(0.0, "Disk below that, GiB; 0 for none")
    disk_gb_s: float = option(5.0, "Speed of that disk, GB/s of reads and as many of writes")
    max_tokens: int | None = option(
        None,
        "Most tokens that each request allows, while it ends after those of the workload, which the scheduler does not "
        "know; it does know them if this is not given",
    )
    batch_requests: int | None = option(
        None,
        "So many requests of priority batch beside those of the workload: compare both classes alone and together; "
        "enough of them for as long as the others come",
    )
    batch_workload: str = option("512/256", "Lengths of these, as of the workload")
    max_itl_ms: float | None = option(None, "Longest gap between tokens that the scheduler allows, as of an engine")
    max_ttft_ms: float | None = option(
        None, "Longest time to the first token that requests of priority batch may cause, as of an engine"
    )
    policies: bool = option(False, "Run with every choice of admission, preemption and queue, and compare them")
    batch: int | None = option(None, "Predict one iteration of a batch of this number of tokens instead")
    decodes: int | None = option(None, "Decodes in that batch; half of it if not given")
    context: float = option(1024.0, "Keys that each of these decodes sees")

    def __post_init__(self) -> None:
        positive = ("num_requests", "request_rate", "max_batch_tokens", "max_num_seqs", "max_gpus", "context")
        bounds = ("batch_requests", "max_itl_ms", "max_ttft_ms", "max_tokens", "max_normalized_latency_ms")
        for name in (*positive, "disk_gb_s", *bounds):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.kv_host_gib < math.inf or not 0 <= self.kv_disk_gib < math.inf:
            raise ConfigError(f"kv_host_gib and kv_disk_gib may not be below 0: {self.kv_host_gib}, {self.kv_disk_gib}")
        if self.kv_disk_gib and not self.kv_host_gib:
            raise ConfigError("kv_disk_gib needs kv_host_gib: pages go through host memory")
        if self.policies and self.find_gpus:
            raise ConfigError("policies and find_gpus: ask for one of them")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.percentile not in (50, 90, 99):
            raise ConfigError(f"percentile must be 50, 90 or 99, got {self.percentile}")
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"batch must be positive, got {self.batch}")
        if self.decodes is not None and not (self.batch is not None and 0 <= self.decodes <= self.batch):
            raise ConfigError("decodes needs --batch and may not exceed it")
        if self.batch_requests is not None and (self.policies or self.find_gpus or math.isinf(self.request_rate)):
            raise ConfigError("batch_requests needs a request_rate for the others, and no policies or find_gpus")
        if self.find_gpus and math.isinf(self.request_rate):
            raise ConfigError("find_gpus needs a request_rate: with all requests at once latency has no meaning")
