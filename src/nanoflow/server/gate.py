"""The gate at the application's door: whether calls are let in, and how many of them are inside.

It is open while the engine runs. Who starts and ends the engine closes it with a reason (`serve.py`, `front_end.py`):
then calls are refused at once with status 503 and Retry-After, and /health says the same, so that balancers go
elsewhere, while those inside go on. Models, version and metrics are answered all the time. What calls do inside is not
known here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from nanoflow.server.errors import ApiError

# How long a client may wait before it asks again while the server stops: what answers then is another server.
DRAINING_RETRY_S = 5
_FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_HEALTH = "/health"


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Why calls are not let in.

    Attributes:
        message, code: For the client, in words and as a word for programs.
        retry_after_s: When to ask again.
    """

    message: str
    code: str
    retry_after_s: int


DRAINING = Closed(
    message="the server is stopping: it ends what runs and takes nothing new",
    code="draining",
    retry_after_s=DRAINING_RETRY_S,
)


def restarting(retry_after_s: float) -> Closed:
    """The gate while the engine is started again, which takes about so long."""
    return Closed(
        message="the engine has ended and is being started again: ask again later",
        code="engine_restarting",
        retry_after_s=max(1, round(retry_after_s)),
    )


class Gate:
    """Lets calls in or refuses them. Belongs to one event loop; open at first.

    Attributes:
        closed: Why it is closed; None while it is open.
        num_inside: Calls that were let in and have not been answered to their end.
    """

    def __init__(self) -> None:
        self.closed: Closed | None = None
        self.num_inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def close(self, reason: Closed) -> None:
        """Refuse calls from now on; one that is closed for good (draining) stays so."""
        if self.closed is not DRAINING:
            self.closed = reason

    def open(self) -> None:
        """Let calls in again, unless it is closed for good."""
        if self.closed is not DRAINING:
            self.closed = None

    async def empty(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()

    def enter(self) -> None:
        """A call goes in."""
        self.num_inside += 1
        self._empty.clear()

    def leave(self) -> None:
        """A call has been answered, or given up."""
        self.num_inside -= 1
        if self.num_inside == 0:
            self._empty.set()


class GateMiddleware:
    """Requests that cost something go through a gate.

    Args:
        app: The application behind it.
        gate: Who is let in.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        is_http = scope["type"] == "http"
        is_call = is_http and scope["method"] not in _FREE_METHODS
        closed = self._gate.closed
        if closed is not None and (is_call or (is_http and scope["path"] == _HEALTH)):
            await _refuse(closed, scope, receive, send)
        elif is_call:
            self._gate.enter()
            try:
                await self._app(scope, receive, send)
            finally:
                self._gate.leave()
        else:
            await self._app(scope, receive, send)


async def _refuse(closed: Closed, scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"retry-after": str(closed.retry_after_s)}
    if closed is DRAINING:
        headers["connection"] = "close"  # the next request finds another server
    answer = ApiError(503, closed.message, code=closed.code).response(headers)
    await answer(scope, receive, send)
