"""Call the application's own routes from inside the process: no socket, the same checks, the same answers.

Batches use it, so that a line of a file is read, checked, generated and answered by the code that serves HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
from starlette.types import Message

from nanoflow.batch_files.lines import Answer
from nanoflow.priorities import Priority
from nanoflow.server.app import Application
from nanoflow.server.door import REQUEST_ID, request_id_of
from nanoflow.server.priority_fields import DEFAULT_PRIORITY

_HOST = b"localhost"


class InsideCalls:
    """Makes calls to an application, behind the checks of `door.py`: who may make them was decided elsewhere.

    Args:
        app: The application.
        headers: Headers of every call, such as those of who has sent a batch.
        priority: Of calls whose body names none.
    """

    def __init__(self, app: Application, headers: Mapping[str, str] | None = None, *, priority: Priority = 0) -> None:
        self._app, self._priority = app, priority
        self._headers = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]

    async def post(self, path: str, body: bytes) -> Answer:
        """The answer to a JSON body. Cancelling it drops the request in the engine.

        Args:
            path: Path of the route, such as "/v1/completions".
            body: The body; its answer must not be a stream.
        """
        request_id = request_id_of(())
        headers = [
            (b"host", _HOST),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (REQUEST_ID.encode(), request_id.encode()),
            *self._headers,
        ]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "app": self._app,
            "client": None,
            "server": None,
            DEFAULT_PRIORITY: self._priority,
        }
        reply = _Reply(body)
        try:
            await self._app.inside(scope, reply.receive, reply.send)
        except Exception:
            # The application logs a failure of its own, answers with 500 and raises it again, for the HTTP server.
            if not reply.pieces:
                raise
        return Answer(status_code=reply.status, request_id=request_id, body=msgspec.Raw(b"".join(reply.pieces)))


class _Reply:
    """The body of one call, and what it is answered with."""

    def __init__(self, body: bytes) -> None:
        self.status = 500
        self.pieces: list[bytes] = []
        self._body: bytes | None = body

    async def receive(self) -> Message:
        """The body, then nothing: who waits for the end of the call is cancelled when it is answered."""
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Keep what is answered."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.pieces.append(message.get("body", b""))
