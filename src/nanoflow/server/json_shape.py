"""Count how deep and how large JSON is, before it is parsed.

Parsing holds the interpreter lock and makes an object of every value. Counting brackets, commas and colons outside
strings does neither. A text is counted in pieces. Invalid JSON is left to the parser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 1 << 18
_QUOTE = ord('"')
# Cost of a list or object, and of a name in an object, in units of other values.
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
        depth: Largest nesting of lists and objects.
        num_items: Number of values in lists and objects. A list or object counts as eight, and a name in an object as
            four, since they cost as much.
    """

    depth: int
    num_items: int


def json_shape(text: bytes) -> JsonShape:
    """The shape of a JSON text, in time linear in its length."""
    depth = deepest = num_items = start = 0
    is_in_string = False
    while start < len(text):
        end = _piece_end(text, start)
        piece = text[start:end]
        start = end
        if b"\\" in piece:
            # Remove escaped quotes, which do not end a string. Escapes occur only in strings, so others do not matter.
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
    """The places that are outside strings."""
    num_before = np.searchsorted(quotes, places)
    is_outside: NDArray[np.bool_] = (num_before + is_in_string) % 2 == 0
    return np.asarray(places[is_outside])


def _piece_end(text: bytes, start: int) -> int:
    """The end of a piece, which may not be between a backslash and the escaped character."""
    end = min(start + PIECE_BYTES, len(text))
    if end == len(text):
        return end
    num_backslashes = 0
    while end - num_backslashes > start and text[end - num_backslashes - 1] == ord("\\"):
        num_backslashes += 1
    return end - num_backslashes % 2
