"""Background requests beside interactive ones on a simulated clock: what each class gets, alone and together.

There are always so many background requests, as if their number had no end: a new one comes when one has ended, for as
long as interactive ones come.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanoflow.config import ConfigError
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime, fit_iteration_time
from nanoflow.priorities import BATCH
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.simulate.arrivals import OTHER, Asked
from nanoflow.simulate.replica import Iterations
from nanoflow.simulate.serving import Cluster, Simulated, simulate_arrivals
from nanoflow.two_classes import TwoClasses, interactive_of, tokens_per_s
from nanoflow.workload import Lengths

# Part of the time in which interactive requests come that is not measured: background requests start together.
_RAMP_UP = 0.25
# A device is saturated with so many times the interactive requests: enough for loads above one in so many.
_MOST_TIMES = 20


class WithBackground:
    """Interactive requests at given times, and background ones that are always there.

    Args:
        lengths, arrivals_s: Of the interactive requests, in increasing order of arrival.
        background: Lengths of the background requests, the first to come first.
        num_at_once: Background requests that are there at any time.
        until_s: Later none comes any more.
    """

    def __init__(
        self,
        lengths: Sequence[Lengths],
        arrivals_s: Sequence[float],
        background: Sequence[Lengths],
        *,
        num_at_once: int,
        until_s: float,
    ) -> None:
        self._coming = deque(enumerate(zip(lengths, arrivals_s, strict=True)))
        self._num_interactive, self._until_s = len(lengths), until_s
        self._later = deque(enumerate(background, start=len(lengths)))
        self._ready: deque[tuple[float, int, Lengths]] = deque()
        self.num_requests = len(lengths) + len(background)
        for _ in range(num_at_once):
            self._begin(0.0)

    @property
    def is_exhausted(self) -> bool:
        """Whether all background requests have come."""
        return not self._later

    @property
    def next_s(self) -> float | None:
        """See `Arrivals`."""
        ready = [self._ready[0][0]] if self._ready else []
        coming = [self._coming[0][1][1]] if self._coming else []
        return min([*ready, *coming], default=None)

    def take(self) -> Asked:
        """See `Arrivals`."""
        if self._ready and self._ready[0][0] == self.next_s:
            arrival_s, request_id, length = self._ready.popleft()
            return _asked(request_id, length, arrival_s, is_background=True)
        request_id, (length, arrival_s) = self._coming.popleft()
        return _asked(request_id, length, arrival_s, is_background=False)

    def finish(self, request_id: int, now_s: float) -> None:
        """See `Arrivals`."""
        if request_id >= self._num_interactive and now_s < self._until_s:
            self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        if self._later:
            request_id, length = self._later.popleft()
            self._ready.append((now_s, request_id, length))


def _asked(request_id: int, length: Lengths, arrival_s: float, *, is_background: bool) -> Asked:
    return Asked(
        request_id=request_id,
        prompt_token_ids=[OTHER] * length.num_prompt_tokens,
        num_output_tokens=length.num_output_tokens,
        arrival_s=arrival_s,
        priority=BATCH if is_background else 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is asked for.

    Attributes:
        lengths, arrivals_s: Of interactive requests.
        background: Lengths of the background requests, as many as it takes until the last interactive one has come.
    """

    lengths: Sequence[Lengths]
    arrivals_s: Sequence[float]
    background: Sequence[Lengths]


def simulate_two_classes(cluster: Cluster, work: Work) -> tuple[TwoClasses, Simulated]:
    """Simulate each class alone, and both together.

    The load is the tokens/s of the interactive requests as a part of those that the device makes of requests of their
    lengths when there are always more of them, within the same bound on background requests.

    Returns:
        The comparison, and the run with both.

    Raises:
        ConfigError: There are no requests, all come at once, or the background requests are too few.
    """
    if not work.lengths or not work.background or not math.isfinite(work.arrivals_s[-1]) or not work.arrivals_s[-1]:
        raise ConfigError("background requests need interactive ones beside them, with a finite request_rate")
    until_s, count = work.arrivals_s[-1], len(work.lengths)
    _, batch_alone_tokens_per_s = _run(cluster, replace(work, lengths=(), arrivals_s=()), until_s)
    alone, _ = _run(cluster, replace(work, background=()), until_s)
    filling = [*work.lengths] * _MOST_TIMES + [*work.lengths] * (cluster.limits.max_num_seqs // count + 1)
    _, saturated_tokens_per_s = _run(cluster, Work(lengths=(), arrivals_s=(), background=filling), until_s)
    together, batch_tokens_per_s = _run(cluster, work, until_s)
    num_tokens = sum(each.num_prompt_tokens + each.num_output_tokens for each in work.lengths)
    found = TwoClasses(
        load=num_tokens / until_s / saturated_tokens_per_s,
        alone=interactive_of(alone.records),
        together=interactive_of(together.records[:count]),
        batch_alone_tokens_per_s=batch_alone_tokens_per_s,
        batch_tokens_per_s=batch_tokens_per_s,
        max_ttft_s=cluster.pace.max_ttft_s,
        max_itl_s=cluster.pace.max_itl_s,
    )
    return found, together


def _run(cluster: Cluster, work: Work, until_s: float) -> tuple[Simulated, float]:
    """A run, and the tokens/s of its background requests behind the start, as long as they come."""
    num_at_once = cluster.limits.max_num_seqs * cluster.num_replicas if work.background else 0
    arrivals = WithBackground(work.lengths, work.arrivals_s, work.background, num_at_once=num_at_once, until_s=until_s)
    simulated = simulate_arrivals(cluster, arrivals)
    if not work.background:
        return simulated, 0.0
    if arrivals.is_exhausted:
        raise ConfigError(
            f"{len(work.background)} batch_requests end before the interactive ones: more are needed for "
            f"{until_s:,.0f} s"
        )
    rate = tokens_per_s(simulated.records[len(work.lengths) :], _RAMP_UP * until_s, until_s)
    return simulated, rate


def predicted_pace(
    iterations: Iterations, limits: SchedulerLimits, *, max_itl_s: float | None, max_ttft_s: float | None
) -> Pace:
    """The pace of an engine on this device: bounds, and an estimate that is fitted to some iterations as it does."""
    if max_itl_s is None and max_ttft_s is None:
        return Pace()
    return Pace(max_itl_s=max_itl_s, max_ttft_s=max_ttft_s, iteration_time=_estimate(iterations, limits))


def _estimate(iterations: Iterations, limits: SchedulerLimits) -> IterationTime:
    most = min(limits.max_num_seqs, limits.max_batch_tokens)
    sizes = (1, most // 8, most // 2, most)
    room = limits.max_batch_tokens
    shapes = [
        _shape(num_decodes, keys, chunk, before)
        for num_decodes, keys in itertools.product(sizes, (1, limits.max_model_len // 4, limits.max_model_len // 2))
        for chunk, before in ((0, 0), (room // 4, 0), (room - num_decodes, 0), (room // 8, limits.max_model_len // 2))
        if 0 < num_decodes + chunk <= room
    ]
    return fit_iteration_time([(shape, iterations.cost(shape).time_s) for shape in shapes])


def _shape(num_decodes: int, keys: int, chunk: int, before: int) -> BatchShape:
    """Equal decodes, and the beginning of a prompt or a chunk after some computed tokens."""
    return BatchShape(
        num_tokens=num_decodes + chunk,
        num_decode_tokens=num_decodes,
        decode_context=num_decodes * keys,
        prefill_context=chunk * before + chunk * (chunk + 1) // 2,
        prefill_kv_tokens=before + chunk if chunk else 0,
        num_sampled=num_decodes + (chunk > 0),
    )
