"""Admit a burst of calls a few at a time, so that other work need not wait until all of them have been admitted.

Admitting a call costs most of a millisecond. A thousand calls that arrive together would delay running streams and
/health by a second.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

CALLS_A_TURN = 8


class Turnstile:
    """Lets a bounded number of calls pass in each turn of the event loop, in order of arrival.

    Args:
        num_a_turn: How many pass in a turn.
    """

    def __init__(self, num_a_turn: int) -> None:
        self._num_a_turn = self._num_left = num_a_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_planned = False

    async def pass_through(self) -> None:
        """Wait for the first turn of the event loop that has room; return at once if this one has."""
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
            if not turn.done():  # otherwise its call was cancelled
                turn.set_result(None)
                self._num_left -= 1
        if self._waiting:
            self._plan()


class TurnstileMiddleware:
    """Puts POST requests, which are the ones that cost something, through a turnstile.

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
