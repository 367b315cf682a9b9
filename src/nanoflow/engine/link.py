"""A front end's end of the socket to the engine, read in its event loop. The engine's end is in `channel.py`.

The event loop watches the socket's file descriptor and messages go to a callback. A future and a task for each message,
as in zmq.asyncio, would cost more than the message.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from zmq.constants import DEALER, FD, NOBLOCK, ROUTING_ID
from zmq.error import Again
from zmq.sugar.context import Context

from nanoflow.engine.channel import routing_id
from nanoflow.engine.messages import FromEngine, ToEngine
from nanoflow.engine.wire import WireError, decode_from_engine, encode

# How long messages are read before other tasks of the event loop get their turn.
_SLICE_S = 0.002

Take = Callable[[FromEngine | WireError], None]


class EngineLink:
    """The socket of one front end. To be used only in the event loop that it was made in.

    Args:
        path: Path of the engine's socket; see `place.py`. The engine may start later.
        front_end: Number of the front end; 0 for the one that started the engine.
    """

    def __init__(self, path: str, front_end: int = 0) -> None:
        self._context = Context()
        self._socket = self._context.socket(DEALER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(ROUTING_ID, routing_id(front_end))
        self._socket.connect(f"ipc://{path}")
        self._waiting: deque[FromEngine | WireError] = deque()
        self._take: Take = self._keep
        self._loop = asyncio.get_running_loop()
        self._arrival: asyncio.Future[None] | None = None
        self._fd: int = self._socket.getsockopt(FD)
        self._loop.add_reader(self._fd, self._drain)
        self._is_draining = False

    def send(self, message: ToEngine) -> None:
        """Send without waiting; does nothing once the link is closed."""
        if not self._socket.closed:
            self._socket.send(encode(message))
            # The descriptor becomes readable once for each change, and sending may have consumed that: read again.
            self._drain_soon()

    async def receive(self) -> FromEngine | WireError:
        """Wait for the next message. Not to be used after `listen`."""
        while not self._waiting:
            self._arrival = self._loop.create_future()
            await self._arrival
        return self._waiting.popleft()

    def listen(self, take: Take) -> None:
        """Call `take` with every message from now on, those that wait first; with a `WireError` for invalid bytes."""
        self._take = take
        while self._waiting:
            take(self._waiting.popleft())

    def close(self) -> None:
        """Close the socket; messages that are on their way are lost."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._context.destroy(linger=0)

    def _keep(self, message: FromEngine | WireError) -> None:
        self._waiting.append(message)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _drain_soon(self) -> None:
        if not self._is_draining:
            self._is_draining = True
            self._loop.call_soon(self._drain_again)

    def _drain_again(self) -> None:
        self._is_draining = False
        self._drain()

    def _drain(self) -> None:
        """Read the messages that have arrived; after `_SLICE_S`, let other tasks run before reading on."""
        end_s = time.perf_counter() + _SLICE_S
        while not self._socket.closed:
            try:
                received = self._socket.recv(NOBLOCK)
            except Again:
                return
            try:
                message: FromEngine | WireError = decode_from_engine(received)
            except WireError as error:
                message = error
            self._take(message)
            if time.perf_counter() >= end_s:
                self._drain_soon()
                return
