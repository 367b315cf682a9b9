"""Several front ends on one engine: which requests are whose, and which part of an iteration's output each is sent.

Each front end numbers its own requests. In the engine, the front end's number is put in the high bits of the id, so
that ids are unique; it is removed from what is sent back. Front end 0, which started the engine, has the same ids in
both, so a server with one front end has no extra work. `channel.py` has the sockets.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from nanoflow.engine.messages import EngineStats, Heartbeat, StepOutput
from nanoflow.request import Request

T = TypeVar("T")

# Request ids are int64. The low bits are for 2^40 requests of a front end, the rest for more front ends than can start.
_ID_BITS = 40
_ID_MASK = (1 << _ID_BITS) - 1
# How often a front end is sent the engine's state while none of its requests is in an iteration.
STATS_INTERVAL_S = 0.1


class FrontEnds:
    """The front ends that have joined, and their requests that have not ended.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_s: dict[int, float] = {}
        self._living: defaultdict[int, set[int]] = defaultdict(set)
        self._left: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        """The front ends by number."""
        return iter(tuple(self._told_s))

    def join(self, front_end: int) -> None:
        """Add a front end; nothing changes if it has joined already."""
        self._told_s.setdefault(front_end, -STATS_INTERVAL_S)

    def leave(self, front_end: int) -> list[int]:
        """Remove a front end for good; return the engine's ids of its requests that have not ended."""
        self._left.add(front_end)
        self._told_s.pop(front_end, None)
        return sorted(self._living.pop(front_end, ()))

    def has_left(self, front_end: int) -> bool:
        """True if a front end was removed. Messages that it sent before may still arrive."""
        return front_end in self._left

    def own(self, front_end: int, request: Request) -> Request:
        """Register a front end's request; return it with the engine's id."""
        engine_id = _engine_id(front_end, request.request_id)
        self._living[front_end].add(engine_id)
        return request if front_end == 0 else dataclasses.replace(request, request_id=engine_id)

    def disown(self, front_end: int, request_ids: Iterable[int]) -> list[int]:
        """Unregister requests of a front end; return the engine's ids of them."""
        engine_ids = [_engine_id(front_end, request_id) for request_id in request_ids]
        self._living[front_end].difference_update(engine_ids)
        return engine_ids

    def parts(self, step: StepOutput) -> dict[int, StepOutput | Heartbeat]:
        """What to send to each front end after an iteration: its part of the output, or now and then the state alone.

        The counts of the iteration itself are in exactly one part, so that sums over the front ends are right.
        """
        for engine_id in step.finished:
            self._living[engine_id >> _ID_BITS].discard(engine_id)
        parts: dict[int, StepOutput | Heartbeat] = {}
        if len(self._told_s) == 1 and 0 in self._told_s:
            parts[0] = step
        else:
            parts |= split(step, self._told_s)
            if not parts and step.stats.iteration_tokens and self._told_s:
                parts[min(self._told_s)] = StepOutput(stats=step.stats)
        now_s = self._clock()
        for front_end, told_s in self._told_s.items():
            if front_end in parts or now_s - told_s >= STATS_INTERVAL_S:
                self._told_s[front_end] = now_s
                parts.setdefault(front_end, Heartbeat(stats=_uncounted(step.stats)))
        return parts


def split(step: StepOutput, front_ends: Container[int] | None = None) -> dict[int, StepOutput]:
    """Split a step by front end, with the front ends' own ids; only the first part has the counts of the iteration.

    Args:
        step: The output for all front ends.
        front_ends: The front ends that have joined; the parts of others are left out. None keeps all parts.
    """
    engine_ids = np.array(step.request_ids, dtype=np.int64)
    token_ids = np.array(step.token_ids, dtype=np.int64)
    owners, request_ids = engine_ids >> _ID_BITS, engine_ids & _ID_MASK
    finished, logprobs = _by_owner(step.finished), _by_owner(step.logprobs)
    prompt_logprobs, pooled = _by_owner(step.prompt_logprobs), _by_owner(step.pooled)
    scheduled = _by_owner(step.scheduled)
    preempted = _by_owner(dict.fromkeys(step.preempted))
    with_tokens = np.flatnonzero(np.bincount(owners)).tolist()
    concerned = sorted({*with_tokens, *finished, *logprobs, *prompt_logprobs, *pooled, *scheduled, *preempted})
    stats, parts = step.stats, {}
    for front_end in concerned:
        if front_ends is not None and front_end not in front_ends:
            continue
        is_its = owners == front_end
        parts[front_end] = StepOutput(
            request_ids=request_ids[is_its].tolist(),
            token_ids=token_ids[is_its].tolist(),
            finished=finished.get(front_end, {}),
            logprobs=logprobs.get(front_end, {}),
            prompt_logprobs=prompt_logprobs.get(front_end, {}),
            pooled=pooled.get(front_end, {}),
            scheduled=scheduled.get(front_end, {}),
            preempted=list(preempted.get(front_end, ())),
            stats=stats,
        )
        stats = _uncounted(step.stats)
    return parts


def _by_owner(values: Mapping[int, T]) -> dict[int, dict[int, T]]:
    found: defaultdict[int, dict[int, T]] = defaultdict(dict)
    for engine_id, value in values.items():
        found[engine_id >> _ID_BITS][engine_id & _ID_MASK] = value
    return found


def _engine_id(front_end: int, request_id: int) -> int:
    return front_end << _ID_BITS | request_id


def _uncounted(stats: EngineStats) -> EngineStats:
    """The state after an iteration, without the counts of the iteration itself."""
    return dataclasses.replace(
        stats, iteration_tokens=0, prefill_tokens=0, prefill_ends=0, rejected_tokens=0, plan_digest=None
    )
