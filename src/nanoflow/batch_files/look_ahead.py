"""Lines of a batch in the order in which they are sent: as they come, or the best order of the next lines.

A look-ahead holds a bounded number of lines and of bytes. What is known of a request before it runs: the length of its
text, which is about four times its number of tokens, and the most tokens that it allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from nanoflow.batch_files.order import RequestCost, order_requests
from nanoflow.batch_files.source import Line
from nanoflow.workload import Lengths

MAX_BYTES = 128 * 2**20
PREFIX_BYTES = 2048
_CHARS_A_TOKEN = 4
# Tokens of completions that set no limit: the API's default of completions, and a guess for conversations.
_COMPLETION_TOKENS, _CHAT_TOKENS = 16, 256

Order = Callable[[Iterator[Line]], Iterator[Line]]


class _Body(msgspec.Struct):
    prompt: Any = None
    messages: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    n: Any = None


class _Request(msgspec.Struct):
    body: _Body


_requests = msgspec.json.Decoder(_Request)


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a request before it runs: its length, and the beginning of its prompt as text."""

    length: Lengths
    prefix: bytes


def arrival(lines: Iterator[Line]) -> Iterator[Line]:
    """The lines as they come."""
    return lines


def throughput(cost: RequestCost, num_lines: int, max_bytes: int = MAX_BYTES) -> Order:
    """The best order within each look-ahead of so many lines, or fewer if these have more bytes than `max_bytes`."""

    def ordered(lines: Iterator[Line]) -> Iterator[Line]:
        for block in _blocks(lines, num_lines, max_bytes):
            outlines = [outline(line) for line in block]
            order = order_requests([one.length for one in outlines], [one.prefix for one in outlines], cost)
            del outlines
            waiting: list[Line | None] = list(block)
            block.clear()
            for place in order:
                line, waiting[place] = waiting[place], None  # let go of what was sent
                assert line is not None
                yield line

    return ordered


def outline(line: Line) -> Outline:
    """What a line asks for; nothing of a line that is no request, which costs nothing."""
    if line.text is None:
        return _NOTHING
    try:
        body = _requests.decode(line.text).body
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return _NOTHING
    is_chat = body.messages is not None
    num_chars, prefix = _beginning(body.messages if is_chat else body.prompt)
    limit = body.max_completion_tokens or body.max_tokens
    most = limit if isinstance(limit, int) and limit > 0 else _CHAT_TOKENS if is_chat else _COMPLETION_TOKENS
    n = body.n if isinstance(body.n, int) and body.n > 0 else 1
    length = Lengths(
        num_prompt_tokens=max(num_chars // _CHARS_A_TOKEN, 1),
        num_output_tokens=min(most * n, len(line.text) + (1 << 20)),
    )
    return Outline(length, prefix)


_NOTHING = Outline(Lengths(num_prompt_tokens=1, num_output_tokens=1), b"")


def _beginning(prompt: Any) -> tuple[int, bytes]:
    """Characters of a prompt in any of its forms (four for a token id), and its beginning as text."""
    num_chars, pieces, size = 0, list[bytes](), 0
    for piece, length in _pieces(prompt):
        num_chars += length
        if size < PREFIX_BYTES:
            pieces.append(piece[:PREFIX_BYTES].encode("utf-8", "replace"))
            size += len(pieces[-1])
    return num_chars, b"\n".join(pieces)[:PREFIX_BYTES]


def _pieces(prompt: Any) -> Iterator[tuple[str, int]]:
    """Texts in a prompt or in messages, each with its length in characters."""
    if isinstance(prompt, str):
        yield prompt, len(prompt)
    elif isinstance(prompt, dict):
        yield from _pieces(prompt.get("role"))
        yield from _pieces(prompt.get("content"))
        yield from _pieces(prompt.get("text"))
    elif isinstance(prompt, list):
        if prompt and all(isinstance(item, int) for item in prompt):
            yield " ".join(map(str, prompt[:PREFIX_BYTES])), _CHARS_A_TOKEN * len(prompt)
        else:
            for item in prompt:
                yield from _pieces(item)


def _blocks(lines: Iterator[Line], num_lines: int, max_bytes: int) -> Iterator[list[Line]]:
    block, size = list[Line](), 0
    for line in lines:
        block.append(line)
        size += len(line.text or b"")
        if len(block) >= num_lines or size >= max_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block
