"""Routes about what the server does now, in JSON: load and caches (`/status`), a pipeline plan (`/plan`).

They are for the page (`page.py`) and for other programs that look every second. `/metrics` has the same counts and many
more, and takes longer to render.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Literal

from fastapi import APIRouter, Response
from typing_extensions import TypedDict

import nanoflow
from nanoflow.engine.book_facts import BookFacts
from nanoflow.plan.plan import Lane, NanoOperation, PipelinePlan
from nanoflow.server.errors import ERROR_RESPONSES, ApiError, json_response
from nanoflow.server.metrics import ServerMetrics
from nanoflow.server.service import Service


class TierState(TypedDict):
    """A tier of the KV cache: its bytes, and tokens that were looked for and found in it since the start."""

    used_bytes: int
    capacity_bytes: int
    queries: int
    hits: int


class PlanCount(TypedDict):
    """A plan of the book, and how many iterations it has run since the start."""

    name: str
    digest: str
    iterations: int


class StatusResponse(TypedDict):
    """What the server does now. Counts are since the start and of all front ends; two answers give rates.

    `time_s` is the clock for these rates. `iterations_s` are the seconds that all iterations took. `plan` is the digest
    of the plan of the last iteration, null before the first one. `tiers` are named device, host and disk.
    """

    object: Literal["status"]
    model: str
    version: str
    time_s: float
    num_running: int
    num_waiting: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    iterations: int
    iterations_s: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    kv_pages_in_use: int
    kv_pages: int
    tiers: dict[str, TierState]
    plan: str | None
    plans: list[PlanCount]


class LaneState(TypedDict):
    """A lane of a plan: how it gets its share of the device, and which."""

    name: str
    mechanism: str
    share: float


class NanoOperationState(TypedDict):
    """An operation on the tokens from `start` to `stop`, on a lane, for the layer that is `stage` behind.

    `resource` is what bounds it. `waits` are places in the list of those that must have ended first. Predicted times
    are in seconds, and null if nothing predicted them.
    """

    operation: str
    resource: str | None
    start: int
    stop: int
    lane: str
    stage: int
    waits: list[int]
    predicted_start_s: float | None
    predicted_end_s: float | None


class PlanResponse(TypedDict):
    """A pipeline plan: its nano-operations in the order in which they are issued."""

    object: Literal["plan"]
    name: str
    digest: str
    is_latest: bool
    num_tokens: int
    predicted_makespan_s: float | None
    lanes: list[LaneState]
    nano_operations: list[NanoOperationState]


def state_router(service: Service, metrics: ServerMetrics) -> APIRouter:
    """Routes about load, caches and plans."""
    router = APIRouter(tags=["status"], responses=ERROR_RESPONSES)

    @router.get("/status", response_model=StatusResponse)
    async def status() -> Response:
        """Load, caches and counts now, for programs that look every second."""
        return json_response(_status(service, metrics))

    @router.get("/plan", response_model=PlanResponse)
    async def plan(digest: str | None = None) -> Response:
        """The plan of the last iteration, or of the book the one with this digest."""
        book, latest = service.engine.facts.book, service.engine.stats.latest_plan
        if book is None or not book.contents:
            raise ApiError(404, "this engine runs no pipeline plans", code="plan_not_found")
        found = {plan.digest: plan for plan in book.contents}
        wanted = digest or latest or book.contents[0].digest
        if wanted not in found:
            message = f"no plan has the digest {wanted[:100]!r}; there are {', '.join(found)}"
            raise ApiError(404, message, param="digest", code="plan_not_found")
        return json_response(_plan(found[wanted], book, is_latest=wanted == latest))

    return router


def _status(service: Service, metrics: ServerMetrics) -> StatusResponse:
    stats, book = service.engine.stats, service.engine.facts.book
    prompt, generated = metrics.token_counts()
    iterations = metrics.plan_iterations()
    return {
        "object": "status",
        "model": service.model_name,
        "version": nanoflow.__version__,
        "time_s": time.monotonic(),
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "num_preemptions": stats.num_preemptions,
        "prompt_tokens": int(prompt),
        "generation_tokens": int(generated),
        "iterations": stats.iteration,
        "iterations_s": stats.iterations_s,
        "prefix_cache_queries": stats.prefix_cache_queries,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "kv_pages_in_use": stats.pages_in_use,
        "kv_pages": stats.num_pages,
        "tiers": {
            name: {
                "used_bytes": tier.used_bytes,
                "capacity_bytes": tier.capacity_bytes,
                "queries": tier.queries,
                "hits": tier.hits,
            }
            for name, tier in stats.tiers.items()
        },
        "plan": stats.latest_plan,
        "plans": [
            {"name": plan.name, "digest": plan.digest, "iterations": iterations.get(plan.digest, 0)}
            for plan in (book.plans if book is not None else ())
        ],
    }


def _plan(plan: PipelinePlan, book: BookFacts, *, is_latest: bool) -> PlanResponse:
    return {
        "object": "plan",
        "name": plan.name,
        "digest": plan.digest,
        "is_latest": is_latest,
        "num_tokens": plan.num_tokens,
        "predicted_makespan_s": plan.predicted_makespan_s,
        "lanes": [_lane(lane) for lane in plan.lanes],
        "nano_operations": [
            _nano(nano, waits, book.resources.get(nano.operation))
            for nano, waits in zip(plan.nano_operations, book.waits[plan.digest], strict=True)
        ],
    }


def _lane(lane: Lane) -> LaneState:
    return {"name": lane.name, "mechanism": lane.mechanism.value, "share": lane.share}


def _nano(nano: NanoOperation, waits: Iterable[int], resource: str | None) -> NanoOperationState:
    return {
        "operation": nano.operation,
        "resource": resource,
        "start": nano.start,
        "stop": nano.stop,
        "lane": nano.lane,
        "stage": nano.stage,
        "waits": list(waits),
        "predicted_start_s": nano.predicted_start_s,
        "predicted_end_s": nano.predicted_end_s,
    }
