"""One replica (the GPUs that share a model) on a simulated clock, with the real scheduler.

It is driven as `engine/engine.py` drives a device with asynchronous scheduling: batch i + 1 is formed while i runs, and
the tokens of i are committed when it is done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.graph.operation import BatchShape
from nanoflow.profile.table import Cost
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.scheduler import Scheduler
from nanoflow.workload import Lengths

# Batches on the device beside the one that is formed.
_MAX_IN_FLIGHT = 1


class Iterations(Protocol):
    """What an iteration takes; `IterationModel` is one."""

    def cost(self, shape: BatchShape) -> Cost:
        """Time of a batch of this shape, and its energy on one GPU."""
        ...


@dataclass(slots=True)
class Times:
    """When what happened to each request, in seconds of the simulated clock; NaN: not yet."""

    first_token_s: np.ndarray
    last_token_s: np.ndarray
    finished_s: np.ndarray
    num_tokens: np.ndarray
    gaps: list[tuple[np.ndarray, np.ndarray]]

    @staticmethod
    def of(num_requests: int) -> Times:
        """Of so many requests, to none of which anything has happened."""
        nothing = np.full(num_requests, np.nan)
        return Times(nothing, nothing.copy(), nothing.copy(), np.zeros(num_requests, np.int64), [])

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

    def __init__(self, limits: SchedulerLimits, pace: Pace, iterations: Iterations, times: Times) -> None:
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
