"""A burst of calls is let in a few at a time, so that nobody waits until all of them have been taken in.

To take in a call costs most of a millisecond. A thousand that arrive together would keep everything else waiting for a
second: tokens of running streams, and /health.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

CALLS_A_TURN = 8


class Turnstile:
    """Lets so many on in each turn of the event loop, in the order they came.

    Args:
        num_a_turn: How many.
    """

    def __init__(self, num_a_turn: int) -> None:
        self._num_a_turn = self._num_left = num_a_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_planned = False

    async def pass_through(self) -> None:
        """Go on in this turn of the event loop, or in the first that has room."""
        self._plan()
        if self._num_left and not self._waiting:
            self._num_left -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _plan(self) -> None:
        if not self._is_planned:
            self._is_planned = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._is_planned, self._num_left = False, self._num_a_turn
        while self._waiting and self._num_left:
            turn = self._waiting.popleft()
            if not turn.done():  # else its call was cancelled
                turn.set_result(None)
                self._num_left -= 1
        if self._waiting:
            self._plan()


class TurnstileMiddleware:
    """POST requests, which are those that cost something, go through a turnstile.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turnstile = Turnstile(CALLS_A_TURN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request in its turn."""
        if scope["type"] == "http" and scope["method"] == "POST":
            await self._turnstile.pass_through()
        await self._app(scope, receive, send)
