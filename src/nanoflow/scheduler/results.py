"""What the scheduler tells: which tokens of an iteration count, and which requests were admitted or preempted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanoflow.batch import Bool, Int32, Int64
from nanoflow.outputs import Finished, FinishReason
from nanoflow.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What of an iteration's result counts: N tokens. Dropped are those of requests that have left in the meantime.

    Attributes:
        request_ids: int64 [N]; a request stands here once for each of its tokens, which are in order.
        token_ids: int32 [N].
        places: int32 [N], where in `DenseBatch.sampled` (and so in `SampledTokens`) each token stood.
        finished: Requests that ended with this iteration; one that ended by an error has no token for it here.
        scored, pooled: For each of `DenseBatch.prompt_scores`, and each of its `poolings` that is the last of its
            prompt, the request that it is for; None if it has left.
        num_rejected: Draws that did not count as the draft before them was wrong, or its request had ended.
    """

    request_ids: Int64
    token_ids: Int32
    places: Int32
    finished: dict[int, Finished]
    scored: tuple[int | None, ...] = ()
    pooled: tuple[int | None, ...] = ()
    num_rejected: int = 0


def owners(places: Sequence[int], request_ids: Int64, is_alive: Bool) -> tuple[int | None, ...]:
    """The requests at these places of a batch; None for those that have left it."""
    return tuple(int(request_ids[place]) if is_alive[place] else None for place in places)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerEvents:
    """What happened to requests.

    Attributes:
        scheduled: Requests admitted for the first time, in order, and how many tokens each found in the cache.
        preempted: Requests preempted, once each time.
    """

    scheduled: dict[int, int] = field(default_factory=dict)
    preempted: list[int] = field(default_factory=list)


def end_of(request: Request, token_id: int, *, is_stop: bool) -> Finished:
    """Why a request ended with this token: a stop token, or its length."""
    if not is_stop:
        return Finished(reason=FinishReason.LENGTH)
    is_own = token_id in (request.params.stop_token_ids or ())
    is_eos = not request.params.ignore_eos and token_id in request.eos_token_ids
    return Finished(reason=FinishReason.STOP, stop_token_id=token_id if is_own and not is_eos else None)
