"""How deep and how large JSON is, counted before it is parsed.

Parsing holds the interpreter lock and makes an object of every value; counting brackets, commas and colons outside of
strings does neither. A text is counted a piece at a time. The parser refuses what is no JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 1 << 18
_QUOTE = ord('"')
# What a value costs is about the same for all but these.
ITEMS_A_CONTAINER, ITEMS_A_NAME = 8, 4
_IS_BETWEEN = np.zeros(256, bool)
_IS_BETWEEN[[ord(","), ord(":")]] = True
_OPENS = np.zeros(256, np.int8)
_OPENS[[ord("["), ord("{")]] = 1
_OPENS[[ord("]"), ord("}")]] = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonShape:
    """What a JSON text has.

    Attributes:
        depth: Lists and objects inside each other, at most.
        num_items: Values in lists and objects, all together. A list or object costs as much as eight of them, a name in
            an object as four, and they count as that.
    """

    depth: int
    num_items: int


def json_shape(text: bytes) -> JsonShape:
    """Count what a JSON text has; linear in its length."""
    depth = deepest = num_items = start = 0
    is_in_string = False
    while start < len(text):
        end = _piece_end(text, start)
        piece = text[start:end]
        start = end
        if b"\\" in piece:
            # Escaped quotes end no string. Escapes stand in strings alone: their other characters do not matter.
            piece = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        array = np.frombuffer(piece, np.uint8)
        quotes = np.flatnonzero(array == _QUOTE)
        steps = _OPENS[array]
        brackets = _outside(np.flatnonzero(steps), quotes, is_in_string)
        between = array[_outside(np.flatnonzero(_IS_BETWEEN[array]), quotes, is_in_string)]
        num_items += len(between) + (ITEMS_A_NAME - 1) * int(np.count_nonzero(between == ord(":")))
        if len(brackets):
            depths = depth + np.cumsum(steps[brackets], dtype=np.int64)
            num_items += ITEMS_A_CONTAINER * int(np.count_nonzero(steps[brackets] > 0))
            depth, deepest = int(depths[-1]), max(deepest, int(depths.max()))
        is_in_string ^= bool(len(quotes) % 2)
    return JsonShape(depth=deepest, num_items=num_items)


def _outside(places: NDArray[np.intp], quotes: NDArray[np.intp], is_in_string: bool) -> NDArray[np.intp]:
    """The places that no string surrounds."""
    num_before = np.searchsorted(quotes, places)
    is_outside: NDArray[np.bool_] = (num_before + is_in_string) % 2 == 0
    return np.asarray(places[is_outside])


def _piece_end(text: bytes, start: int) -> int:
    """Where a piece may end: not between a backslash and what it escapes."""
    end = min(start + PIECE_BYTES, len(text))
    if end == len(text):
        return end
    num_backslashes = 0
    while end - num_backslashes > start and text[end - num_backslashes - 1] == ord("\\"):
        num_backslashes += 1
    return end - num_backslashes % 2
