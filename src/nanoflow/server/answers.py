"""Whole answers, made and encoded beside the event loop, a piece at a time.

An answer with log probabilities may have a hundred megabytes. The thread that makes it gives way to the event loop
every few milliseconds while it runs Python; to encode JSON is one call that does not. So it is encoded in pieces:
choice by choice, and long lists some entries at a time. What else stands in it is not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

import msgspec
from fastapi import Response

P = ParamSpec("P")
T = TypeVar("T")

# Entries of a list that are encoded at once; each may have twenty log probabilities.
_ENTRIES = 256
# Tokens and log probabilities of an event that is made in the event loop: some two milliseconds.
_LONG_EVENT = 512


async def beside(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do something that may take a while beside the event loop."""
    return await asyncio.to_thread(work, *args, **kwargs)


async def made(make: Callable[[], T], num_entries: int) -> T:
    """Make an event; beside the event loop if it has many entries, as those of a client that reads slowly."""
    return await beside(make) if num_entries > _LONG_EVENT else make()


async def answer_of(making: Coroutine[Any, Any, Any]) -> Response:
    """The answer with the JSON of what is made."""
    return await encoded(await making)


async def encoded(value: Any) -> Response:
    """An answer with the JSON of a value that may be large."""
    return Response(await beside(to_json, value), media_type="application/json")


def to_json(value: Any) -> bytes:
    """The same JSON as in one piece; the interpreter lock is given up in between where the value is large."""
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
