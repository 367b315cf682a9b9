"""Bound the number of connections, the length of request heads, and the time that a client may take.

A `Guard` is between a socket and uvicorn's protocol. It checks bytes before they are parsed, and times. `Connections`
has all guards of the process. If there are too many connections, it closes the one that has been idle longest;
regularly it closes those of slow clients. `body_bounds.py` bounds bodies.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from nanoflow.bounds import ServerBounds
from nanoflow.server.responses import ErrorResponse

# File descriptors reserved for other uses than connections: pipes of template processes, metrics, the log.
RESERVED_FILES = 64
MOST_CONNECTIONS = 8192
LOOK_INTERVAL_S = 0.5
SEARCH_INTERVAL_S = 0.05
# How long a connection stays open after a refusal before the body was read, so that the client can read the answer.
LINGER_S = 5.0
RETRY_AFTER_S = 1
_HEAD_PIECE_BYTES, _PIECE_BYTES = 1 << 12, 1 << 14
_MAX_PIPELINED = 64
_HEAD_END = b"\r\n\r\n"
_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class Parser(Protocol):
    """What a guard uses of uvicorn's protocol. `cycle` is the latest request; None before the first."""

    cycle: Any

    def connection_made(self, transport: asyncio.Transport) -> None:
        """There is a connection."""

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""

    def data_received(self, data: bytes) -> None:
        """Parse bytes."""

    def eof_received(self) -> None:
        """The client sends no more."""

    def pause_writing(self) -> None:
        """The client is slow to take what was written."""

    def resume_writing(self) -> None:
        """It has taken most of it."""


class Guard(asyncio.Protocol):
    """One connection with its times and counts.

    Args:
        parser: Receives the bytes that are accepted.
        connections: All connections of the process.
    """

    def __init__(self, parser: Parser, connections: Connections) -> None:
        self._parser = parser
        self._connections = connections
        self._bounds = connections.bounds
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._num_head_bytes = self._num_lines = 0
        self._tail = b""
        self._idle_s: float | None = None
        self._head_s: float | None = None
        self._body_s: float | None = None
        self._linger_s: float | None = None
        self._write_s: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection if there is room."""
        self._transport, self._idle_s = transport, self._loop.time()
        if not self._connections.take(self):
            self._refuse(503, "the server has as many connections as it can have; try again soon")
            return
        self._parser.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, from either side."""
        if self._connections.drop(self):
            self._parser.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass bytes to the parser in pieces, since the parser does not stop within a piece."""
        start = 0
        while start < len(data):
            if self.is_closing:
                return
            num_bytes = _PIECE_BYTES if self._is_in_body else _HEAD_PIECE_BYTES
            piece = data[start : start + num_bytes] if start or len(data) > num_bytes else data
            start += num_bytes
            if not self._is_in_body and not self._count_head(piece):
                return
            self._parser.data_received(piece)
            if len(getattr(self._parser, "pipeline", ())) > _MAX_PIPELINED:
                self._refuse(400, f"at most {_MAX_PIPELINED} requests may wait on a connection")
        self._note()

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        return self._parser.eof_received()  # type: ignore[func-returns-value]

    def pause_writing(self) -> None:
        """The client is slow to take what was written."""
        self._write_s = self._loop.time()
        self._parser.pause_writing()

    def resume_writing(self) -> None:
        """It has taken most of it."""
        self._write_s = None
        self._parser.resume_writing()

    @property
    def is_closing(self) -> bool:
        """True once no more bytes are accepted."""
        return self._transport is None or self._transport.is_closing()

    @property
    def is_idle(self) -> bool:
        """True while there is no request, not even a part of one."""
        return self._num_head_bytes == 0 and not self._is_in_body and self._is_answered

    @property
    def idle_since_s(self) -> float:
        """When the connection became idle, on the event loop's clock; infinity if it is not idle."""
        return math.inf if self._idle_s is None else self._idle_s

    def close(self) -> None:
        """End the connection; nothing is lost if it is idle."""
        if self._transport is not None:
            self._transport.close()

    def look(self, now_s: float) -> None:
        """End the connection if its client takes too long over something."""
        self._note()
        bounds = self._bounds
        if self._is_over(self._write_s, bounds.write_timeout_s, now_s) or self._is_over(
            self._linger_s, LINGER_S, now_s
        ):
            assert self._transport is not None
            self._transport.abort()
        elif self._is_over(self._head_s, bounds.header_timeout_s, now_s):
            self._refuse(408, f"the head of the request took longer than {bounds.header_timeout_s:g} s")
        elif self._is_over(self._body_s, bounds.body_timeout_s, now_s):
            self._refuse(408, f"the body of the request took longer than {bounds.body_timeout_s:g} s")
        elif self._is_over(self._idle_s, bounds.idle_timeout_s, now_s):
            self.close()

    @property
    def _is_in_body(self) -> bool:
        cycle = self._parser.cycle
        return cycle is not None and bool(cycle.more_body)

    @property
    def _is_answered(self) -> bool:
        cycle = self._parser.cycle
        return cycle is None or bool(cycle.response_complete)

    def _note(self) -> None:
        """Start or stop the clocks of the connection's states: each runs from when that state began."""
        now_s = self._loop.time()
        in_head, in_body = self._num_head_bytes > 0, self._is_in_body

        def clock(since_s: float | None, *, runs: bool) -> float | None:
            return None if not runs else now_s if since_s is None else since_s

        self._head_s = clock(self._head_s, runs=in_head)
        self._body_s = clock(self._body_s, runs=in_body and not self._is_answered)
        self._linger_s = clock(self._linger_s, runs=in_body and self._is_answered)
        self._idle_s = clock(self._idle_s, runs=self.is_idle)

    @staticmethod
    def _is_over(since_s: float | None, timeout_s: float, now_s: float) -> bool:
        return since_s is not None and now_s - since_s > timeout_s

    def _count_head(self, piece: bytes) -> bool:
        """Count bytes and lines of a head. If there are too many, end the connection and return False."""
        seen = self._tail + piece
        end = seen.find(_HEAD_END)
        num_new = len(piece) if end < 0 else max(end + len(_HEAD_END) - len(self._tail), 0)
        self._num_head_bytes += num_new
        self._num_lines += piece.count(b"\n", 0, num_new)
        bounds = self._bounds
        if self._num_head_bytes > bounds.max_header_bytes:
            self._refuse(431, f"the head of a request may have at most {bounds.max_header_bytes} bytes")
            return False
        # The request line and the empty line at the end are no headers.
        if self._num_lines - (1 if end < 0 else 2) > bounds.max_headers:
            self._refuse(431, f"a request may have at most {bounds.max_headers} headers")
            return False
        self._tail = seen[-len(_HEAD_END) + 1 :]
        if end >= 0:
            self._num_head_bytes = self._num_lines = 0
            self._tail = b""
        return True

    def _refuse(self, status: int, message: str) -> None:
        """Send an error without the parser, unless an answer has begun, and close the connection."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        cycle = self._parser.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            transport.write(_answer(status, message))
        transport.close()


class Connections:
    """All connections of a process.

    Args:
        bounds: Bounds on their number and on their times.
    """

    def __init__(self, bounds: ServerBounds) -> None:
        self.bounds = bounds
        self.max_connections = most_connections(bounds)
        self._living: dict[Guard, None] = {}
        self._ending: dict[Guard, None] = {}
        # Idle connections that the last search found, the longest idle last; if it found none, when to search again.
        self._candidates: list[Guard] = []
        self._next_search_s = 0.0

    def __len__(self) -> int:
        """Number of connections."""
        return len(self._living)

    def protocol(self, make: Callable[..., Any]) -> Callable[..., Guard]:
        """A factory of guarded connections.

        Args:
            make: uvicorn's protocol class; called with the arguments of the factory.
        """
        return lambda *args, **kwargs: Guard(make(*args, **kwargs), self)

    def take(self, guard: Guard) -> bool:
        """Count a new connection; False if there is no room even after closing idle ones."""
        if len(self._living) >= self.max_connections:
            oldest = self._longest_idle()
            if oldest is None:
                return False
            oldest.close()
            # `drop` is called when it has ended, later.
            del self._living[oldest]
            self._ending[oldest] = None
        self._living[guard] = None
        return True

    def drop(self, guard: Guard) -> bool:
        """Forget a connection that has ended; False if it was never taken."""
        was_taken = guard in self._living or guard in self._ending
        self._living.pop(guard, None)
        self._ending.pop(guard, None)
        return was_taken

    async def watch(self) -> None:
        """Regularly end connections of slow clients, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            now_s = asyncio.get_running_loop().time()
            for count, guard in enumerate(list(self._living), start=1):
                guard.look(now_s)
                if count % 256 == 0:
                    await asyncio.sleep(0)

    def _longest_idle(self) -> Guard | None:
        """The longest idle connection. All are searched only now and then, not for each new connection."""
        while True:
            while self._candidates:
                guard = self._candidates.pop()
                if guard in self._living and guard.is_idle and not guard.is_closing:
                    return guard
            now_s = asyncio.get_running_loop().time()
            if now_s < self._next_search_s:
                return None
            idle = [guard for guard in self._living if guard.is_idle and not guard.is_closing]
            self._candidates = sorted(idle, key=lambda guard: guard.idle_since_s, reverse=True)
            if not idle:
                self._next_search_s = now_s + SEARCH_INTERVAL_S


def most_connections(bounds: ServerBounds) -> int:
    """Most connections of a process: the configured bound, or fewer by the limit of open files."""
    wanted = bounds.max_connections or MOST_CONNECTIONS
    limit = _raised_file_limit()
    return wanted if limit is None else max(min(wanted, limit - _num_open_files() - RESERVED_FILES), 1)


def _raised_file_limit() -> int | None:
    """Raise the limit of open files as far as allowed and return it; None if there is no limit."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return None if soft == resource.RLIM_INFINITY else soft


def _num_open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else RESERVED_FILES


def _answer(status: int, message: str) -> bytes:
    """The bytes of an answer with an error in OpenAI's shape, after which the connection is closed."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error: ErrorResponse = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    body = msgspec.json.encode(error)
    retry = f"retry-after: {RETRY_AFTER_S}\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        f"{retry}connection: close\r\n\r\n"
    )
    return head.encode() + body
