"""Correct uvicorn's protocols: clients that half-close, HTTP/1.0, and bytes that are no HTTP.

`on_the_wire` makes a subclass of any of uvicorn's protocol classes. `connections.py` bounds connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import Message

from nanoflow.server.errors import ApiError

# Every answer begins with these bytes, whatever its status.
HEAD = b"HTTP/1.1 "
# When each of these bytes is sent to a client that has closed its side, in seconds after the byte before. A client that
# has disconnected resets the connection after one byte, which sending the next byte shows.
PROBES_S = (0.0, 0.1, 0.4, 2.0, 2.0, 10.0, 10.0, 60.0, 60.0)


def on_the_wire(base: Any) -> Any:
    """Make a subclass of a uvicorn protocol class with the corrections of this file.

    A client that closes its side after sending its request (`nc -N`, `shutdown(SHUT_WR)`) gets its whole answer. To the
    server such a client looks like one that has disconnected. So the first bytes of the answer, which are always the
    same, are sent one by one: if the client has disconnected, the connection breaks, and the call is cancelled. With
    TLS the two cases cannot be told apart: there the end of input ends the call.

    Args:
        base: `HttpToolsProtocol` or `H11Protocol`, or a subclass of one.
    """

    class Protocol(base):  # type: ignore[misc]
        """The class that `on_the_wire` makes."""

        _has_ended = False

        def eof_received(self) -> bool:
            """Keep the connection open for the answer to a whole request."""
            cycle = self.cycle
            if cycle is None or cycle.response_complete or cycle.more_body or self.scheme == "https":
                return False
            self._has_ended = True
            _find_out(self)
            return True

        def on_response_complete(self) -> None:
            """Answer the next waiting request; close after the last one of a client that sends no more."""
            super().on_response_complete()
            if self._has_ended and self.cycle.response_complete:
                self.transport.close()
            elif self._has_ended:
                _find_out(self)

        def connection_lost(self, exc: Exception | None) -> None:
            """Mark the request that is being answered as disconnected; the base class marks the latest one."""
            super().connection_lost(exc)
            cycle = _answered_cycle(self)
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            self._started_cycle = cycle
            super()._start_asgi_task(cycle, app)

        def on_headers_complete(self) -> None:
            """Prepare the answer to a request. In HTTP/1.0, one of unknown length ends with the connection."""
            super().on_headers_complete()
            if self.scope.get("http_version") == "1.0" and hasattr(self.cycle, "chunked_encoding"):
                self.cycle.send = until_close(self.cycle)

        def send_400_response(self, msg: str) -> None:
            """Refuse bytes that are no HTTP."""
            _refuse_bytes(self, msg)

    return Protocol


def _answered_cycle(protocol: Any) -> Any:
    """The request that is being answered; later ones may be waiting."""
    return getattr(protocol, "_started_cycle", protocol.cycle)


def _find_out(protocol: Any) -> None:
    """Probe whether a client that sends no more is still there, unless its answer has begun, which shows it."""
    cycle = _answered_cycle(protocol)
    if cycle is None or cycle.response_started or isinstance(cycle.transport, ProbedTransport):
        return
    probed = cycle.transport = ProbedTransport(protocol.transport)
    probed.probe_later(asyncio.get_running_loop())


def _refuse_bytes(protocol: Any, reason: str) -> None:
    """Answer bytes that are no HTTP with an error; if another answer is due first, drop the rest of the input."""
    cycle = protocol.cycle
    if cycle is not None and not cycle.response_complete and not cycle.more_body:
        cycle.keep_alive = False
        return
    protocol.transport.write(refusal(reason))
    protocol.transport.close()


def until_close(cycle: Any) -> Callable[[Message], Awaitable[None]]:
    """`send` of a cycle of uvicorn's httptools protocol without chunked encoding, which HTTP/1.0 does not have.

    Args:
        cycle: The request's cycle; its connection is closed after the answer.
    """
    send, has_length = cycle.send, False

    async def send_plainly(message: Message) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plainly


class ProbedTransport:
    """A transport that sends the first bytes of an answer one by one, to find out whether the client is still there.

    Args:
        transport: The transport to write to; all other methods are its own.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._num_sent = 0
        self._has_begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write data, without the bytes that were sent already."""
        if not self._has_begun:
            self._has_begun, data = True, data[self._num_sent :]
        self._transport.write(data)

    def probe_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send the next byte at its time, until the answer begins or the connection breaks."""
        if self._num_sent < len(PROBES_S):
            loop.call_later(PROBES_S[self._num_sent], self._probe, loop)

    def _probe(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._has_begun or self._transport.is_closing():
            return
        self._transport.write(HEAD[self._num_sent : self._num_sent + 1])
        self._num_sent += 1
        self.probe_later(loop)


def refusal(message: str) -> bytes:
    """A whole answer with status 400."""
    body = msgspec.json.encode(ApiError(400, message, code="invalid_http").body())
    head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body
