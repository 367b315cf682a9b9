"""Server-sent events, and calls that end when their client goes away.

Routes hand over a generator of chunks; this file encodes them, sends them and watches the connection. It waits for
`http.disconnect` beside the work instead of asking now and then, so that a call that waits in the queue ends too. Knows
nothing of what the chunks say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from nanoflow.server.errors import ClientDisconnectedError, as_api_error

T = TypeVar("T")
Chunks = AsyncGenerator[Any, None]

DONE = b"data: [DONE]\n\n"

# For the OpenAPI document: each event carries a chunk in JSON, the last one says [DONE].
EVENT_STREAM_CONTENT: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
            "required": ["data"],
        }
    }
}


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work of a call whose body has been read; cancel it as soon as the client has gone.

    Raises:
        ClientDisconnectedError: The client has gone.
        ApiError: Whatever else went wrong.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return _result(task)
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def _result(task: asyncio.Future[T]) -> T:
    """What the work gave. Its errors become answers here: past the routes they would cost the client its connection."""
    try:
        return task.result()
    except Exception as problem:
        raise as_api_error(problem) from problem


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def open_stream(receive: Receive, chunks: Chunks) -> Response:
    """Answer with a stream of events, once its first chunk is there: what fails before that still has a status code.

    Raises:
        ClientDisconnectedError: The client has gone.
        ApiError: The first chunk could not be made.
    """
    try:
        first = await while_connected(receive, anext(chunks))
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(first, chunks)


class EventStream(Response):
    """Chunks as server-sent events; closes their generator when they end or the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, first: Any, chunks: Chunks) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        async with aclosing(self._chunks):
            with suppress(ClientDisconnectedError):
                await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _send_event(send, self._first)
        try:
            async for chunk in self._chunks:
                await _send_event(send, chunk)
        except Exception as problem:  # the status is sent: the error becomes an event
            await _send_event(send, as_api_error(problem).body())
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _send_event(send: Send, chunk: Any) -> None:
    body = b"data: " + msgspec.json.encode(chunk) + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
