"""Server-sent events, and calls that end when their client goes away.

Routes pass a generator of events, encoded with `event` or `EventTemplate`; this file sends them and watches the
connection. It waits for `http.disconnect` while the work runs, so that a call that still waits in a queue ends too.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from nanoflow.server.errors import ApiError, ClientDisconnectedError, as_api_error

T = TypeVar("T")
Events = AsyncGenerator[bytes, None]

DONE = b"data: [DONE]\n\n"

# For the OpenAPI document: each event has a chunk in JSON, and the last one is [DONE].
EVENT_STREAM_CONTENT: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
            "required": ["data"],
        }
    }
}


def event(chunk: Any) -> bytes:
    """A chunk in JSON as one server-sent event."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def named_event(value: Mapping[str, Any]) -> bytes:
    """An object in JSON as one server-sent event, with its `type` as the event's name."""
    return b"event: " + str(value["type"]).encode() + b"\n" + event(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a stream ends.

    Attributes:
        failed: The events for a failure after the status was sent.
        last: What is sent at the very end.
    """

    failed: Callable[[ApiError], bytes]
    last: bytes = b""


_WITH_DONE = Ending(failed=lambda problem: event(problem.body()), last=DONE)


class EventTemplate:
    """Events that differ in one text only: the constant rest is encoded once.

    Args:
        make: Makes a chunk that contains the given text once.
    """

    __slots__ = ("_head", "_tail")

    def __init__(self, make: Callable[[str], Any]) -> None:
        mark = uuid.uuid4().hex
        self._head, self._tail = event(make(mark)).split(msgspec.json.encode(mark))

    def fill(self, text: str) -> bytes:
        """The event with this text; equal to `event(make(text))`."""
        return b"".join((self._head, msgspec.json.encode(text), self._tail))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], deadline_s: float | None = None) -> T:
    """Run a call whose body has been read; cancel it when the client disconnects or the deadline passes.

    Args:
        receive: Receives messages of the connection.
        work: The call; it is closed in any case.
        deadline_s: Deadline on the event loop's clock; None for none.

    Raises:
        ClientDisconnectedError: The client has disconnected.
        ApiError: The deadline has passed (504), or the call failed.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        timeout_s = None if deadline_s is None else max(deadline_s - asyncio.get_running_loop().time(), 0.0)
        await asyncio.wait((task, watch), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            if not watch.done():
                raise ApiError(504, "the call took longer than this server lets a call take", code="timeout")
            raise ClientDisconnectedError
        return _result(task)
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def _result(task: asyncio.Future[T]) -> T:
    """The result of the call. Its errors become an ApiError here; otherwise the connection would be closed."""
    try:
        return task.result()
    except Exception as problem:
        raise as_api_error(problem) from problem


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def open_stream(
    receive: Receive, events: Events, deadline_s: float | None = None, ending: Ending = _WITH_DONE
) -> Response:
    """Answer with a stream of events once the first event is made: a failure before that still gets a status code.

    Args:
        receive: Receives messages of the connection.
        events: Yields one or more whole events at a time, which are sent together.
        deadline_s: When the stream must have ended, on the event loop's clock; None for no limit.
        ending: How it ends; as OpenAI's completions do, if not given.

    Raises:
        ClientDisconnectedError: The client has disconnected.
        ApiError: The first event could not be made.
    """
    try:
        first = await while_connected(receive, anext(events), deadline_s)
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, deadline_s, ending)


class EventStream(Response):
    """Server-sent events; their generator is closed when they end or the client disconnects."""

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, events: Events, deadline_s: float | None = None, ending: Ending = _WITH_DONE
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._deadline_s = deadline_s
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        async with aclosing(self._events):
            with suppress(ClientDisconnectedError):
                try:
                    await while_connected(receive, self._send_all(send), self._deadline_s)
                except ApiError as problem:  # the deadline has passed
                    await send({"type": "http.response.body", "body": self._ending.failed(problem), "more_body": True})
                    await send({"type": "http.response.body", "body": self._ending.last, "more_body": False})

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for events in self._events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
        except Exception as problem:  # the status is sent: the error becomes an event
            body = self._ending.failed(as_api_error(problem))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": self._ending.last, "more_body": False})
