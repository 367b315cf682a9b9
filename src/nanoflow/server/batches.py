"""/v1/batches: make, look up, list and cancel batches. `batch_worker.py` runs them, `batch_store.py` keeps them."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from nanoflow.batch_files.lines import URLS
from nanoflow.server.batch_store import MAX_ROWS, Batch, BatchStore, error_list, is_disk_full, new_id
from nanoflow.server.bodies import BodyRoute
from nanoflow.server.body import RequestBody, Text
from nanoflow.server.errors import ERROR_RESPONSES, ApiError, json_response
from nanoflow.server.service import Service

T = TypeVar("T")

MAX_PAGE = 100
_OFF = "files and batches are off: start the server with --batch-dir FOLDER to turn them on"
_TIMES = (*("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"),)
_WINDOW = re.compile(r"[1-9][0-9]{0,3}[mhd]")
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]


class BatchBody(RequestBody):
    """Body of POST /v1/batches."""

    input_file_id: Text = Field(min_length=1, max_length=100, description="A file that was uploaded for batches")
    endpoint: Text = Field(description=f"Where all its requests go: {' or '.join(URLS)}")
    completion_window: Text = Field("24h", description="Accepted; a batch runs until it is done")
    metadata: dict[Text, Text] | None = Field(None, max_length=16, description="Up to 16 texts, which are kept with it")
    output_expires_after: dict[str, Any] | None = Field(None, description="Accepted; files stay until they are deleted")


def batches_router(service: Service, store: BatchStore) -> APIRouter:
    """The routes of batches."""
    router = APIRouter(tags=["batches"], responses=ERROR_RESPONSES, route_class=BodyRoute)

    @router.post("/v1/batches")
    async def create_batch(body: BatchBody, request: Request) -> Response:
        """Run the requests of an uploaded file in the background."""
        batch = await beside(_created, service, store, body, owner_of(service, request))
        return json_response(shown(batch))

    @router.get("/v1/batches")
    async def list_batches(request: Request, after: str | None = None, limit: Limit = 20) -> Response:
        """Batches, the newest first."""
        found = await beside(store.batches, owner_of(service, request), after, limit + 1)
        return json_response(page([shown(batch) for batch in found], limit))

    @router.get("/v1/batches/{batch_id}")
    async def retrieve_batch(batch_id: str, request: Request) -> Response:
        """A batch as it is now."""
        return json_response(shown(_known(await beside(store.batch, batch_id, owner_of(service, request)), batch_id)))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, request: Request) -> Response:
        """Drop the requests of a batch that have no answer yet; answers so far become its files."""
        batch = _known(await beside(store.cancel, batch_id, owner_of(service, request)), batch_id)
        return json_response(shown(batch))

    return router


def batches_off_router() -> APIRouter:
    """Answers calls of files and batches where they are off."""
    router = APIRouter(include_in_schema=False)
    methods = ["GET", "POST", "DELETE"]

    async def say_off(request: Request) -> Response:
        raise ApiError(404, _OFF, code="batches_off")

    for path in ("/v1/files", "/v1/files/{rest:path}", "/v1/batches", "/v1/batches/{rest:path}"):
        router.add_api_route(path, say_off, methods=methods)
    return router


async def beside(work: Callable[..., T], *args: Any) -> T:
    """Run something that waits for the disk in a thread; ApiError (507) if the disk is full."""
    with disk_errors():
        return await asyncio.to_thread(work, *args)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns the failure of a full disk into an ApiError (507)."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if not is_disk_full(error):
            raise
        raise ApiError(507, "the server's disk is full", code="no_room") from None


def owner_of(service: Service, request: Request) -> str:
    """Whose files and batches a caller sees: those of its API key; all, if the server has no keys."""
    if not service.config.api_key:
        return ""
    _, _, token = request.headers.get("authorization", "").strip().partition(" ")
    return hashlib.sha256(token.strip().encode()).hexdigest()


def page(items: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page of a list, of which one item more than `limit` was looked up."""
    data = items[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(items) > limit,
    }


def shown(batch: Batch) -> dict[str, Any]:
    """A batch as OpenAI's API has it."""
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": error_list(batch),
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        **{f"{name}_at": batch.times.get(f"{name}_at") for name in _TIMES},
        "expires_at": None,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
    }


def _created(service: Service, store: BatchStore, body: BatchBody, owner: str) -> Batch:
    if body.endpoint not in URLS:
        message = f"endpoint must be {' or '.join(URLS)}, got {body.endpoint[:100]!r}"
        raise ApiError(400, message, param="endpoint")
    if not _WINDOW.fullmatch(body.completion_window):
        message = f"completion_window must be a time such as '24h', got {body.completion_window[:20]!r}"
        raise ApiError(400, message, param="completion_window")
    if any(len(name) > 64 or len(text) > 512 for name, text in (body.metadata or {}).items()):
        raise ApiError(400, "metadata: names have at most 64 characters, and texts 512", param="metadata")
    file = store.file(body.input_file_id, owner)
    if file is None or file.purpose != "batch":
        what = "there is no such file" if file is None else f"it has the purpose {file.purpose!r}, not 'batch'"
        raise ApiError(400, f"input_file_id {body.input_file_id!r}: {what}", param="input_file_id")
    _, num_batches, num_open = store.counts()
    if num_open >= service.config.max_open_batches or num_batches >= MAX_ROWS:
        message = f"the server has {num_open} batches that have not ended and {num_batches} in all; try again later"
        raise ApiError(429, message, code="too_many_batches")
    batch = Batch(
        id=new_id("batch_"),
        owner=owner,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        created_at=int(time.time()),
        metadata=body.metadata,
    )
    store.save(batch)
    return batch


def _known(batch: Batch | None, batch_id: str) -> Batch:
    if batch is None:
        raise ApiError(404, f"there is no batch {batch_id[:100]!r}", code="batch_not_found")
    return batch
