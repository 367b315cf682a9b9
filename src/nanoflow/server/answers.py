"""Make and encode whole answers in a thread, one piece at a time.

An answer with log probabilities may have a hundred megabytes. A thread that runs Python lets the event loop run every
few milliseconds, but encoding JSON is one call that holds the interpreter lock. So an answer is encoded in pieces:
choice by choice, and long lists some entries at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

import msgspec
from fastapi import Response

P = ParamSpec("P")
T = TypeVar("T")

# Entries of a list that are encoded in one call; each may have twenty log probabilities.
_ENTRIES = 256
# An event with at most so many tokens and log probabilities is made in the event loop, in about two milliseconds.
_LONG_EVENT = 512


async def beside(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work`, which may take long, in a thread."""
    return await asyncio.to_thread(work, *args, **kwargs)


async def made(make: Callable[[], T], num_entries: int) -> T:
    """Make an event; in a thread if it has many entries, as for a client that reads slowly."""
    return await beside(make) if num_entries > _LONG_EVENT else make()


async def answer_of(making: Coroutine[Any, Any, Any]) -> Response:
    """The answer with the JSON of what the coroutine returns."""
    return await encoded(await making)


async def encoded(value: Any) -> Response:
    """An answer with the JSON of a value that may be large."""
    return Response(await beside(to_json, value), media_type="application/json")


def to_json(value: Any) -> bytes:
    """The JSON of a value; for a large value the interpreter lock is released between pieces."""
    return b"".join(_pieces(value))


def _pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value in pieces."""
    if not isinstance(value, dict) or not any(isinstance(item, dict | list) for item in value.values()):
        yield from _list_pieces(value) if isinstance(value, list) else (msgspec.json.encode(value),)
        return
    opening = b"{"
    for name, item in value.items():
        yield opening + msgspec.json.encode(str(name)) + b":"
        opening = b","
        if name == "choices":
            yield from _choices_pieces(item)
        else:
            yield from _pieces(item)
    yield b"}"


def _choices_pieces(choices: list[Any]) -> Iterator[bytes]:
    yield b"["
    for number, choice in enumerate(choices):
        if number:
            yield b","
        yield from _pieces(choice)
    yield b"]"


def _list_pieces(items: list[Any]) -> Iterator[bytes]:
    yield b"["
    for start in range(0, len(items), _ENTRIES):
        entries = msgspec.json.encode(items[start : start + _ENTRIES])[1:-1]
        yield b"," + entries if start else entries
    yield b"]"
