"""Bound the length of each request body, and the memory of all bodies that are held at once.

A body whose stated length is too long is refused before it is read. A body without a stated length is counted while it
arrives. `json_shape.py` and `call_bounds.py` check the content.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoflow.bounds import ServerBounds
from nanoflow.server.connections import RETRY_AFTER_S
from nanoflow.server.errors import ApiError


class BodyBoundsMiddleware:
    """Reads the body of a request before the application sees the request.

    Args:
        app: The application to call; it receives the body in one piece.
        bounds: Bounds of one body, and of all bodies that are held.
        uploads: Paths whose bodies go to the disk while they arrive, and how long each may be.
    """

    def __init__(self, app: ASGIApp, bounds: ServerBounds, uploads: Mapping[str, int] | None = None) -> None:
        self._app = app
        self._bounds = bounds
        self._uploads = uploads or {}
        self._num_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it if its body exceeds the bounds."""
        stated = _stated_length(scope) if scope["type"] == "http" else 0
        if stated == 0:
            await self._app(scope, receive, send)
            return
        most = self._uploads.get(scope["path"])
        if most is not None:
            await self._pass_on(scope, receive, send, stated or 0, most)
            return
        body = _Body(self, stated or 0)
        try:
            try:
                self.check(stated or 0)
                self.hold(stated or 0)
                is_whole = await body.read(receive)
            except ApiError as problem:
                headers = {"retry-after": str(RETRY_AFTER_S)} if problem.status == 503 else None
                await problem.response(headers)(scope, receive, send)
                return
            if is_whole:
                await self._app(scope, body.replay(receive), send)
        finally:
            self._num_held -= body.num_held

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, stated: int, most: int) -> None:
        """Serve a request whose body is not held here, but counted."""
        num_read = 0

        async def counted() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > most:
                raise _too_long(most)
            return message

        if stated > most:
            await _too_long(most).response()(scope, receive, send)
        else:
            await self._app(scope, counted, send)

    def check(self, num_bytes: int) -> None:
        """Refuse a body that is too long (413)."""
        if num_bytes > self._bounds.max_body_bytes:
            raise _too_long(self._bounds.max_body_bytes)

    def hold(self, num_bytes: int) -> None:
        """Count bytes as held; refuse them if there would be too many (503)."""
        if self._num_held + num_bytes > self._bounds.max_bodies_bytes:
            raise ApiError(503, "the server holds as many request bodies as it may; try again soon", code="overloaded")
        self._num_held += num_bytes


class _Body:
    """The body of one request.

    Attributes:
        num_held: Bytes that are counted as held for it.
    """

    def __init__(self, bounds: BodyBoundsMiddleware, num_stated: int) -> None:
        self.num_held = 0
        self._bounds = bounds
        self._num_stated = num_stated
        self._content = b""

    async def read(self, receive: Receive) -> bool:
        """Read the whole body; False if the client disconnects before its end."""
        self.num_held = self._num_stated
        pieces, num_read, is_last = list[bytes](), 0, False
        while not is_last:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            piece = message.get("body", b"")
            num_read += len(piece)
            self._bounds.check(num_read)
            if num_read > self.num_held:
                self._bounds.hold(num_read - self.num_held)
                self.num_held = num_read
            pieces.append(piece)
            is_last = not message.get("more_body", False)
        self._content = b"".join(pieces)
        return True

    def replay(self, receive: Receive) -> Receive:
        """A `receive` for the application: first the body in one piece, then what `receive` gives."""
        first: list[Message] = [{"type": "http.request", "body": self._content, "more_body": False}]
        self._content = b""

        async def replayed() -> Message:
            return first.pop() if first else await receive()

        return replayed


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"the body may have at most {most} bytes")


def _stated_length(scope: Scope) -> int | None:
    """The length that a request states for its body; 0 if it has no body, None if it states no length."""
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:
        return None
    # The parser has refused anything but digits. A number with very many digits is replaced by the largest one.
    digits = headers.get(b"content-length", b"0").strip()
    return int(digits[:19]) if digits[:19].isdigit() else None
