"""A small HTTP/1.1 client for load: one connection a request; of an answer its bytes, and when they came.

A client that parses each token as it comes costs more than a server that sends it, and would be what is measured. So
nothing is understood while load runs: `exchange` keeps pieces and their times, `read_answer` and `read_events` make
sense of them afterwards. What is asked for stands in `online.py`.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast
from urllib.parse import urlsplit


class ExchangeFailed(Exception):
    """No whole answer came; one line says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is: `path` is that of the base address, without a slash at its end."""

    host: str
    port: int
    path: str
    is_secure: bool

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For a connection; None if that is plain."""
        return ssl.create_default_context() if self.is_secure else None


def read_address(url: str) -> Address:
    """The parts of a base address such as `http://127.0.0.1:8000/v1`.

    Raises:
        ValueError: It is no http or https address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ValueError(f"the address of a server is http://HOST:PORT/v1, got {url!r}")
    is_secure = parts.scheme == "https"
    return Address(
        host=parts.hostname,
        port=parts.port or (443 if is_secure else 80),
        path=parts.path.rstrip("/"),
        is_secure=is_secure,
    )


def post(address: Address, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A request as it is sent: a POST of JSON, after which the server is to close the connection."""
    lines = [
        f"POST {address.path}/{path} HTTP/1.1",
        f"host: {address.host}:{address.port}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass(slots=True, kw_only=True)
class Pieces:
    """What came over a connection, and when (seconds of `time.monotonic`, one clock for all processes)."""

    data: list[bytes]
    times_s: list[float]


async def exchange(address: Address, message: bytes, timeout_s: float, tls: ssl.SSLContext | None = None) -> Pieces:
    """Send a request and take in what comes until the server closes the connection.

    Args:
        address: Of the server.
        message: As `post` makes it.
        timeout_s: Longest silence.
        tls: As `Address.tls` has it.

    Raises:
        OSError: There is no connection, or it broke.
        ExchangeFailed: The server was silent for too long.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    pieces = Pieces(data=[], times_s=[])
    connecting = loop.create_connection(lambda: _Exchange(message, pieces, done), address.host, address.port, ssl=tls)
    transport, _ = await asyncio.wait_for(connecting, timeout_s)
    started_s = time.monotonic()
    try:
        # A timer for each piece would cost as much as the piece.
        while not done.done():
            last_s = pieces.times_s[-1] if pieces.times_s else started_s
            left_s = last_s + timeout_s - time.monotonic()
            if left_s <= 0:
                raise ExchangeFailed(f"nothing came for {timeout_s:g} s")
            await asyncio.wait((done,), timeout=left_s)
        done.result()
    finally:
        transport.abort()
    return pieces


class _Exchange(asyncio.Protocol):
    """Notes what comes."""

    def __init__(self, message: bytes, pieces: Pieces, done: asyncio.Future[None]) -> None:
        self._message, self._done = message, done
        self._add_data, self._add_time = pieces.data.append, pieces.times_s.append

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Transports of other loops than asyncio's own are of no class of its own.
        cast(asyncio.WriteTransport, transport).write(self._message)

    def data_received(self, data: bytes) -> None:
        self._add_time(time.monotonic())
        self._add_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer: its status, and parts of its body, each with the time at which the part was complete."""

    status: int
    parts: Sequence[tuple[float, bytes]]

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(part for _, part in self.parts)


def read_answer(pieces: Pieces) -> Answer:
    """An answer from what came.

    Raises:
        ExchangeFailed: It is no HTTP, or its end is missing.
    """
    raw = b"".join(pieces.data)
    head, separator, _ = raw.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    words = status_line.split(" ", 2)
    if not separator or len(words) < 2 or not words[1].isdecimal():
        raise ExchangeFailed("the server closed the connection without an answer")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    start = len(head) + len(separator)
    ends = list(accumulate(map(len, pieces.data)))
    if headers.get("transfer-encoding", "").lower() == "chunked":
        spans = list(_chunks(raw, start))
    else:
        spans = [(max(end - len(data), start), end) for data, end in zip(pieces.data, ends, strict=True) if end > start]
        if int(headers.get("content-length", len(raw) - start)) != len(raw) - start:
            raise ExchangeFailed("the server closed the connection before the end of its answer")
    parts = [(pieces.times_s[bisect_left(ends, stop)], raw[first:stop]) for first, stop in spans]
    return Answer(status=int(words[1]), parts=parts)


def _chunks(raw: bytes, place: int) -> Iterator[tuple[int, int]]:
    """Begin and end of every chunk's content."""
    while True:
        line_end = raw.find(b"\r\n", place)
        if line_end < 0:
            raise ExchangeFailed("the server closed the connection before the end of its answer")
        size = int(raw[place:line_end].partition(b";")[0], 16)
        if size == 0:
            return
        first = line_end + 2
        if first + size > len(raw):
            raise ExchangeFailed("the server closed the connection before the end of its answer")
        yield first, first + size
        place = first + size + 2


def read_events(answer: Answer) -> Iterator[tuple[float, bytes]]:
    """The data of every server-sent event, with the time at which its last byte came; `[DONE]` is left out."""
    rest = b""
    for time_s, part in answer.parts:
        *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines and lines != [b"[DONE]"]:
                yield time_s, b"\n".join(lines)
