"""The gate of the application: whether calls are admitted, and how many are running.

It is open while the engine runs. `serve.py` and `front_end.py` close it with a reason when the engine has died or the
server stops. Then new calls are refused at once with status 503 and Retry-After, and so is /health, so that load
balancers use other servers. Running calls continue. Models, version and metrics are always answered.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from nanoflow.server.errors import ApiError

# Retry-After while the server stops, in seconds: another server will answer.
DRAINING_RETRY_S = 5
_FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_HEALTH = "/health"


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Why calls are not admitted.

    Attributes:
        message, code: The reason for the client, as a sentence and as a word to be read by programs.
        retry_after_s: Seconds after which to try again.
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
    """The reason while the engine is started again, which takes about so many seconds."""
    return Closed(
        message="the engine has ended and is being started again: ask again later",
        code="engine_restarting",
        retry_after_s=max(1, round(retry_after_s)),
    )


class Gate:
    """Admits calls or refuses them. To be used in one event loop. It is open at first.

    Attributes:
        closed: Why it is closed; None while it is open.
        num_inside: Admitted calls whose answers have not ended.
    """

    def __init__(self) -> None:
        self.closed: Closed | None = None
        self.num_inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def close(self, reason: Closed) -> None:
        """Refuse calls from now on. A gate that is closed for good (draining) keeps its reason."""
        if self.closed is not DRAINING:
            self.closed = reason

    def open(self) -> None:
        """Admit calls again, unless the gate is closed for good."""
        if self.closed is not DRAINING:
            self.closed = None

    async def empty(self) -> None:
        """Wait until no admitted call is running."""
        await self._empty.wait()

    def enter(self) -> None:
        """Count an admitted call."""
        self.num_inside += 1
        self._empty.clear()

    def leave(self) -> None:
        """Count off a call that was answered or given up."""
        self.num_inside -= 1
        if self.num_inside == 0:
            self._empty.set()


class GateMiddleware:
    """Puts requests that cost something through a gate.

    Args:
        app: The application behind it.
        gate: Decides whether calls are admitted.
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
        headers["connection"] = "close"  # so that the next request can reach another server
    answer = ApiError(503, closed.message, code=closed.code).response(headers)
    await answer(scope, receive, send)
