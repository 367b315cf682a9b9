"""What an answer to a hostile input must be, and reading answers off a connection that may hold anything.

Every answer is one of: a success whose JSON or events can be read, a refusal (4xx) in OpenAI's shape, or 503 with a
reason. What does not even parse as HTTP is refused in plain text by the HTTP library, and the connection closed.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

# By the HTTP library, before there is a request that could be answered.
NOT_HTTP = b"Invalid HTTP request received."
# Names of events that end a stream of /v1/messages or /v1/responses.
_ENDS = ("message_stop", "error", "response.completed", "response.incomplete", "response.failed")
_LAST_EVENTS = frozenset(f"event: {name}".encode() for name in _ENDS)


class Broken(Exception):
    """An answer that is none; one line says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer: its status, its headers by name in lower case, and its body."""

    status: int
    headers: dict[str, str]
    body: bytes


async def read_reply(reader: asyncio.StreamReader, *, is_head: bool = False) -> Reply | None:
    """The next answer on a connection; None if it has ended.

    Raises:
        Broken: What came is no answer, or ends in the middle.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise Broken(f"the answer ends in its head: {error.partial[:80]!r}") from None
    status_line, *lines = head.decode("latin-1").rstrip().split("\r\n")
    words = status_line.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
        raise Broken(f"no status line: {status_line[:80]!r}")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(words[1])
    if status == 100:
        return await read_reply(reader)
    # What is no HTTP is answered before anybody knows that it was to be HEAD; all other answers have an id.
    if (is_head and "x-request-id" in headers) or status in (204, 304):
        return Reply(status=status, headers=headers, body=b"")
    try:
        return Reply(status=status, headers=headers, body=await _read_body(reader, headers))
    except (asyncio.IncompleteReadError, ValueError) as error:
        raise Broken(f"the body of an answer is broken: {error}") from None


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        await reader.readexactly(2)
        return b"".join(parts)
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()


def problem_of(reply: Reply, *, is_head: bool = False) -> str | None:
    """What is wrong with an answer, in a line; None if nothing is. One to HEAD has no body."""
    if reply.status in (500, 501, 502, 504) or reply.status > 504:
        return f"status {reply.status}: {reply.body[:200]!r}"
    kind = reply.headers.get("content-type", "")
    if reply.status < 400 and not is_head:
        return _problem_of_success(kind, reply.body)
    if reply.status == 400 and reply.body == NOT_HTTP:
        return None
    if is_head:
        return None
    return _problem_of_refusal(reply)


def _problem_of_success(kind: str, body: bytes) -> str | None:
    if kind.startswith("application/json"):
        try:
            json.loads(body)
        except ValueError as error:
            return f"a success is no JSON: {error}"
    if kind.startswith("text/event-stream"):
        events = [event for event in body.replace(b"\r\n", b"\n").split(b"\n\n") if event.strip()]
        # Events with names end with one that says so, others with [DONE].
        is_whole = bool(events) and (events[-1] == b"data: [DONE]" or events[-1].split(b"\n")[0] in _LAST_EVENTS)
        if not is_whole:
            return f"a stream does not end with [DONE] but with {events[-1:]!r:.200}"
        lines = [line for event in events for line in event.split(b"\n") if line.startswith(b"data: {")]
        try:
            [json.loads(line.removeprefix(b"data: ")) for line in lines]
        except ValueError as error:
            return f"an event is no JSON: {error}"
        if len(lines) < len(events) - 1:
            return f"an event has no JSON: {events!r:.200}"
    return None


def _problem_of_refusal(reply: Reply) -> str | None:
    try:
        error: Any = json.loads(reply.body)["error"]
        # That of /v1/messages has only what it needs.
        own = error if json.loads(reply.body).get("type") != "error" else {"param": None, "code": None, **error}
        parts = (own["message"], own["type"], own["param"], own["code"])
    except (ValueError, LookupError, TypeError):
        return f"status {reply.status} is not in OpenAI's shape: {reply.body[:200]!r}"
    message, kind, param, code = parts
    is_well = isinstance(message, str) and message and "\n" not in message and isinstance(kind, str)
    if not is_well or not isinstance(param, str | None) or not isinstance(code, str | int | None):
        return f"status {reply.status} has an error of strange parts: {reply.body[:200]!r}"
    if "Traceback" in message or ".py" in message:
        return f"status {reply.status} shows the server's inside: {message[:200]}"
    return None
