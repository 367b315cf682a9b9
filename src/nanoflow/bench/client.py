"""A small HTTP/1.1 client for load: one connection per request; it records received bytes and their times.

Parsing each token on arrival would cost more CPU than a fast server needs to send it, and would be what is measured. So
nothing is parsed under load: `exchange` stores pieces and times, and `read_answer` and `read_events` parse them
afterwards. `online.py` makes the requests.
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
    """No complete answer was received; the message is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Address of a server; `path` is the path of the base address, without a slash at its end."""

    host: str
    port: int
    path: str
    is_secure: bool

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The TLS context for a connection; None for plain HTTP."""
        return ssl.create_default_context() if self.is_secure else None


def read_address(url: str) -> Address:
    """The parts of a base address such as `http://127.0.0.1:8000/v1`.

    Raises:
        ValueError: It is not an http or https address.
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
    """An HTTP request as bytes: a POST of JSON that asks the server to close the connection afterwards."""
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
    """Received bytes and their times (seconds of `time.monotonic`, one clock for all processes)."""

    data: list[bytes]
    times_s: list[float]


async def exchange(address: Address, message: bytes, timeout_s: float, tls: ssl.SSLContext | None = None) -> Pieces:
    """Send a request and receive until the server closes the connection.

    Args:
        address: The server.
        message: The request, as made by `post`.
        timeout_s: Longest time without data.
        tls: As from `Address.tls`.

    Raises:
        OSError: The connection failed or broke.
        ExchangeFailed: No data came for `timeout_s`.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    pieces = Pieces(data=[], times_s=[])
    connecting = loop.create_connection(lambda: _Exchange(message, pieces, done), address.host, address.port, ssl=tls)
    transport, _ = await asyncio.wait_for(connecting, timeout_s)
    started_s = time.monotonic()
    try:
        # Restarting a timer at each piece would cost as much as the piece.
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
    """The protocol that stores received data."""

    def __init__(self, message: bytes, pieces: Pieces, done: asyncio.Future[None]) -> None:
        self._message, self._done = message, done
        self._add_data, self._add_time = pieces.data.append, pieces.times_s.append

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Event loops other than asyncio's have transports that are not instances of asyncio's classes.
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
    """An answer: its status, and the parts of its body, each with the time at which it was complete."""

    status: int
    parts: Sequence[tuple[float, bytes]]

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(part for _, part in self.parts)


def read_answer(pieces: Pieces) -> Answer:
    """Parse an answer.

    Raises:
        ExchangeFailed: It is not HTTP, or is incomplete.
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
    """Start and end of every chunk's content in `raw`."""
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
    """The data of every server-sent event and the arrival time of its last byte; `[DONE]` is left out."""
    rest = b""
    for time_s, part in answer.parts:
        *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines and lines != [b"[DONE]"]:
                yield time_s, b"\n".join(lines)
