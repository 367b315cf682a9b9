"""One replica (the GPUs that share a model) on a simulated clock, with the real scheduler.

It is driven as `engine/engine.py` drives a device with asynchronous scheduling: batch i + 1 is formed while i runs, and
the tokens of i are committed when it is done. Copies of KV pages go beside the batches (`link.py`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.graph.operation import BatchShape
from nanoflow.kvcache.tier_counts import TierCounts
from nanoflow.profile.table import Cost
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.policies import Policies
from nanoflow.scheduler.scheduler import Scheduler
from nanoflow.scheduler.tiers import counts_of_all
from nanoflow.simulate.arrivals import END, OTHER, Asked
from nanoflow.simulate.link import BelowDevice, SimulatedCopies

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
        limits, pace, policies: Of its scheduler; the policies of an engine if None.
        iterations: What a batch takes.
        times: Where it notes what happened, by request id.
        below: What is below its KV pages.
        max_tokens: Most tokens that requests allow, where the scheduler does not know when they end; else None.

    Attributes:
        now_s: Its clock.
        num_outstanding_tokens: Prompt and output tokens of requests that have not finished.
        num_cached: Tokens of prompts that it found in the KV cache, by request id.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        pace: Pace,
        iterations: Iterations,
        times: Times,
        *,
        below: BelowDevice,
        policies: Policies | None,
        max_tokens: int | None = None,
    ) -> None:
        self.now_s = 0.0
        self.copies = SimulatedCopies(below, limits.max_num_seqs, lambda: self.now_s)
        self.scheduler = Scheduler(
            limits=limits,
            pace=pace,
            make_tiers=self.copies.make_tiers,
            policies=policies,
            clock=lambda: self.now_s,
        )
        self._iterations, self._times, self._limits, self._max_tokens = iterations, times, limits, max_tokens
        self._page_bytes = below.page_bytes
        # Batches on the device, what they sample, how long they take and when they end.
        self._in_flight: deque[tuple[DenseBatch, SampledTokens, float, float]] = deque()
        self._free_at_s = 0.0
        self._owed: dict[int, Asked] = {}
        self._last_position = np.zeros(limits.max_num_seqs, dtype=np.int64)
        self.num_cached: dict[int, int] = {}
        self.num_outstanding_tokens = 0
        self.busy_s = 0.0
        self.energy_j: float | None = 0.0
        self.num_iterations = self.num_batch_tokens = self.peak_requests = 0
        self.peak_page_share = 0.0

    @property
    def is_busy(self) -> bool:
        """True while a step makes progress."""
        return self.scheduler.has_unfinished or bool(self._in_flight)

    @property
    def tiers(self) -> dict[str, TierCounts]:
        """What each tier of its KV cache has done."""
        reuse = self.scheduler.reuse_counts
        return counts_of_all(
            self.scheduler.tiers,
            self.scheduler.pools,
            self._page_bytes,
            queries=reuse.num_asked,
            hits=reuse.num_found,
        )

    def add(self, asked: Asked) -> None:
        """Take a request that arrives now."""
        if not self.is_busy:
            self._idle(asked.arrival_s)
        self._owed[asked.request_id] = asked
        self.num_outstanding_tokens += asked.num_tokens
        limits = self._limits
        request = asked.as_request(
            max_tokens=self._max_tokens, max_model_len=limits.max_model_len, page_size=limits.page_size
        )
        self.scheduler.add(request, asked.num_computed)

    def step(self) -> list[int]:
        """Form a batch and launch it; wait for the one before it, or for this one if nothing can be formed.

        Returns:
            The requests that have finished.
        """
        self.copies.collect()
        batch = self.scheduler.schedule()
        self.copies.issue(self._free_at_s)
        if batch is not None:
            self._launch(batch)
        elif not self._in_flight:
            self.now_s = self.copies.wait_s()
        if self._in_flight and (batch is None or len(self._in_flight) > _MAX_IN_FLIGHT):
            return self._commit(*self._in_flight.popleft())
        return []

    def _idle(self, until_s: float) -> None:
        """Let copies go on until then."""
        while (next_s := self.copies.idle(until_s)) is not None:
            self.now_s = next_s
        self.now_s = max(self.now_s, until_s)

    def _launch(self, batch: DenseBatch) -> None:
        cost = self._iterations.cost(batch.shape)
        start_s = max(self.now_s, self._free_at_s, self.copies.writable_s(batch.new_pages))
        time_s = cost.time_s + self.copies.slowdown_s()
        self._free_at_s = start_s + time_s
        self._in_flight.append((batch, self._sampled(batch), time_s, self._free_at_s))
        self.busy_s += time_s
        self.energy_j = None if self.energy_j is None or cost.energy_j is None else self.energy_j + cost.energy_j
        self.num_iterations += 1
        self.num_batch_tokens += batch.num_tokens
        pool = self.scheduler.fullest_pool
        self.peak_page_share = max(self.peak_page_share, pool.num_in_use / pool.num_pages)
        self.peak_requests = max(self.peak_requests, self.scheduler.num_running)

    def _sampled(self, batch: DenseBatch) -> SampledTokens:
        """The tokens that a batch draws."""
        for joined in batch.joined:
            self._last_position[joined.row] = self._owed[joined.seed].num_tokens - 1
        is_last = batch.drawn_positions == self._last_position[batch.rows[batch.sampled]]
        return SampledTokens(token_ids=np.where(is_last, END, OTHER).astype(np.int32))

    def _commit(self, batch: DenseBatch, sampled: SampledTokens, time_s: float, done_s: float) -> list[int]:
        self.now_s = max(self.now_s, done_s)
        self.scheduler.tiers.note_iteration(batch.num_tokens, time_s)
        committed = self.scheduler.commit(batch, sampled)
        self.num_cached.update(self.scheduler.drain_events().scheduled)
        self._times.note_tokens(committed.request_ids, self.now_s)
        finished = list(committed.finished)
        for request_id in finished:
            self._times.finished_s[request_id] = self.now_s
            self.num_outstanding_tokens -= self._owed.pop(request_id).num_tokens
        return finished
