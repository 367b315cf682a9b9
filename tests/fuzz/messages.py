"""Hostile HTTP: whole messages as bytes, and how they are sent: whole, in pieces, cut off, several at once.

An input is a function of (seed, number), so that every finding can be had again. Bodies are `bodies.py`'s; what an
answer must be is `judge.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.fuzz.bodies import ROUTES, hostile_body, seed_body
from tests.fuzz.values import hostile_text

How = Literal["whole", "raw", "slow", "cut", "leave"]

_HEADERS: Sequence[bytes] = tuple(
    line.encode("ascii").decode("unicode_escape").encode("latin-1")
    for line in (Path(__file__).parent / "seeds" / "headers.txt").read_text(encoding="ascii").splitlines()
)
_PATHS = (
    *ROUTES,
    *("/", "/health", "/version", "/metrics", "/v1/models", "/v1/models/m", "/v1/models/x%00y", "/openapi.json"),
    *("/tokenizer_info", "/v1", "/v1/", "/nowhere", "//", "/../../etc/passwd", "/%2e%2e/", "/v1/completions/"),
    *("/v1/embeddings", "/v1/responses/x", "*", "http://evil.example/", "/\xff", "/a b", "/" + "a" * 9000, "/?%00=%zz"),
)
# How often a route is asked, beside 1 of the others.
_ODDS = {"/v1/completions": 5, "/v1/chat/completions": 4, "/v1/responses": 3, "/v1/messages": 3}
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "PRI", "X" * 100, "")
_VERSIONS = ("HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.9", "http/1.1", "", "HTTP/1.1 x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """One input.

    Attributes:
        number: Its number under the seed.
        kind: What is strange about it, for people.
        how: "whole": an answer is due. "raw": there may be none, or several. "slow": as whole, sent in pieces. "cut":
            the client stops in the middle. "leave": it does not wait for the answer.
        data: What is sent.
    """

    number: int
    kind: str
    how: How
    data: bytes


def hostile(seed: int, number: int) -> Hostile:
    """The input of a number."""
    rng = random.Random(f"{seed}:{number}")
    kind = rng.choices(
        ("body", "header", "chunks", "line", "pipeline", "cut", "slow", "leave"), (70, 8, 5, 5, 3, 4, 2, 3)
    )[0]
    how, data = _KINDS[kind](rng)
    return Hostile(number=number, kind=kind, how=how, data=data)


def request(path: str, body: bytes, headers: Sequence[bytes] = (), method: str = "POST") -> bytes:
    """A request in good order, with further headers."""
    lines = (f"{method} {path} HTTP/1.1".encode("latin-1"), b"host: 127.0.0.1", *headers)
    return b"\r\n".join((*lines, b"content-length: %d" % len(body), b"", body))


_JSON = b"content-type: application/json"


def _route(rng: random.Random) -> str:
    return rng.choices(ROUTES, [_ODDS.get(route, 1) for route in ROUTES])[0]


def _body(rng: random.Random) -> tuple[How, bytes]:
    route = _route(rng)
    return "whole", request(route, hostile_body(rng, route), [_JSON])


def _header(rng: random.Random) -> tuple[How, bytes]:
    route = _route(rng)
    headers = [_JSON, *rng.choices(_HEADERS, k=rng.choice((1, 1, 2, 5)))]
    if rng.random() < 0.05:
        headers += [b"x-%d: %s" % (place, b"a" * 500) for place in range(rng.choice((20, 300)))]
    rng.shuffle(headers)
    return "raw", request(route, seed_body(rng, route), headers)


def _chunks(rng: random.Random) -> tuple[How, bytes]:
    """Chunked framing with errors, and both kinds of framing at once."""
    route = _route(rng)
    body = seed_body(rng, route)
    cut = rng.randrange(len(body) + 1)
    sizes = ("%x", "%X;a=b", "%x ", "0%x", "-%x", "0x%x", "%x\n", "fffffffff%x", "z%x")
    chunks = b"".join(
        (rng.choice(sizes) % len(part)).encode() + b"\r\n" + part + b"\r\n" for part in (body[:cut], body[cut:])
    )
    end = rng.choice((b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"0\r\n", b"", b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n"))
    headers = [_JSON, b"transfer-encoding: chunked"]
    if rng.random() < 0.4:
        headers.insert(rng.randrange(3), b"content-length: %d" % rng.choice((0, 4, len(body), 10**6)))
    lines = (f"POST {route} HTTP/1.1".encode(), b"host: a", *headers, b"", b"")
    return "raw", b"\r\n".join(lines) + chunks + end


def _line(rng: random.Random) -> tuple[How, bytes]:
    """A strange first line, or no HTTP at all."""
    if rng.random() < 0.2:
        return "raw", rng.choice(
            (rng.randbytes(200), b"\x16\x03\x01\x02\0" + rng.randbytes(60), b"\r\n" * 50, b"\0" * 99)
        )
    path = rng.choice(_PATHS) + rng.choice(("", "", "?a=b", "#x", "?" + hostile_text(rng).replace("\n", "")[:200]))
    line = f"{rng.choice(_METHODS)} {path} {rng.choice(_VERSIONS)}".encode("utf-8", "surrogatepass")
    return "raw", line + rng.choice((b"\r\n", b"\n", b"\r")) + b"host: a\r\n\r\n"


def _pipeline(rng: random.Random) -> tuple[How, bytes]:
    """Several requests at once, one of them perhaps wrong."""
    messages = [
        _body(rng)[1] if rng.random() < 0.5 else request("/health", b"", (), "GET") for _ in range(rng.randint(2, 6))
    ]
    if rng.random() < 0.3:
        messages.insert(rng.randrange(len(messages)), _chunks(rng)[1])
    return "raw", b"".join(messages)


def _cut(rng: random.Random) -> tuple[How, bytes]:
    data = _body(rng)[1]
    return "cut", data[: rng.randrange(len(data))]


def _slow(rng: random.Random) -> tuple[How, bytes]:
    return "slow", _body(rng)[1]


def _leave(rng: random.Random) -> tuple[How, bytes]:
    route = rng.choice(ROUTES[:2])
    body = seed_body(rng, route).replace(b'"max_tokens": 2', b'"max_tokens": 200')
    return "leave", request(route, body, [_JSON])


_KINDS = {
    "body": _body,
    "header": _header,
    "chunks": _chunks,
    "line": _line,
    "pipeline": _pipeline,
    "cut": _cut,
    "slow": _slow,
    "leave": _leave,
}
