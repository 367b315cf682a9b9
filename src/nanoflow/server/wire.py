"""HTTP on the wire where uvicorn's protocols fall short: clients that half-close, HTTP/1.0, and bytes that are no HTTP.

`on_the_wire` adds to a protocol class of uvicorn; which that is, and what requests mean, is not known here. Limits on
connections are not kept here either.
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
# When one of them is sent to a client that has closed its side, in seconds after the one before. A client that has gone
# altogether resets the connection at the first, which the second finds out; so it is for one that goes later.
PROBES_S = (0.0, 0.1, 0.4, 2.0, 2.0, 10.0, 10.0, 60.0, 60.0)


def on_the_wire(base: Any) -> Any:
    """A protocol class of uvicorn's that also does what this file is about.

    A client that has sent its request and then closes its side (`nc -N`, `shutdown(SHUT_WR)`) gets its whole answer. To
    the server that looks as if it had gone, so the beginning of the answer, which is always the same, is sent byte by
    byte: if nobody is there, the connection breaks, and the call is cancelled. With TLS that cannot be told: there the
    end of input ends the call.

    Args:
        base: `HttpToolsProtocol` or `H11Protocol`, or a class on top of one.
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
            """Answer the next request that waits; behind the last one of a client that sends no more, close."""
            super().on_response_complete()
            if self._has_ended and self.cycle.response_complete:
                self.transport.close()
            elif self._has_ended:
                _find_out(self)

        def connection_lost(self, exc: Exception | None) -> None:
            """Tell the request that is answered; the base tells the one that came last."""
            super().connection_lost(exc)
            cycle = _answered_cycle(self)
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            self._started_cycle = cycle
            super()._start_asgi_task(cycle, app)

        def on_headers_complete(self) -> None:
            """Prepare the answer to a request; to HTTP/1.0 it ends with the connection if its length is not known."""
            super().on_headers_complete()
            if self.scope.get("http_version") == "1.0" and hasattr(self.cycle, "chunked_encoding"):
                self.cycle.send = until_close(self.cycle)

        def send_400_response(self, msg: str) -> None:
            """Refuse bytes that are no HTTP."""
            _refuse_bytes(self, msg)

    return Protocol


def _answered_cycle(protocol: Any) -> Any:
    """The request that is answered now: others may have come after it."""
    return getattr(protocol, "_started_cycle", protocol.cycle)


def _find_out(protocol: Any) -> None:
    """Find out whether a client that sends no more is still there, unless its answer has begun and does so."""
    cycle = _answered_cycle(protocol)
    if cycle is None or cycle.response_started or isinstance(cycle.transport, ProbedTransport):
        return
    probed = cycle.transport = ProbedTransport(protocol.transport)
    probed.probe_later(asyncio.get_running_loop())


def _refuse_bytes(protocol: Any, reason: str) -> None:
    """Answer bytes that are no HTTP with an error; where another answer is due first, drop the rest of the input."""
    cycle = protocol.cycle
    if cycle is not None and not cycle.response_complete and not cycle.more_body:
        cycle.keep_alive = False
        return
    protocol.transport.write(refusal(reason))
    protocol.transport.close()


def until_close(cycle: Any) -> Callable[[Message], Awaitable[None]]:
    """`send` of a cycle of uvicorn's httptools protocol, without chunks: HTTP/1.0 does not know them.

    Args:
        cycle: Whose connection is closed after the answer.
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
    """A transport to a client that may have gone: the beginning of its answer is sent byte by byte to find out.

    Args:
        transport: To write to; what is not here is its business.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._num_sent = 0
        self._has_begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, at first without what has been sent already."""
        if not self._has_begun:
            self._has_begun, data = True, data[self._num_sent :]
        self._transport.write(data)

    def probe_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send the next byte when it is time, and so on until the answer begins or the client is known to have gone."""
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
