"""Find the end of a JSON value that arrives in pieces, and the place where it stops being JSON.

The scanner keeps a stack of open brackets and what may come next; it builds no values. What it says depends on the text
alone, not on how the text was cut. `call_object.py` and `parser.py` use it.
"""

from __future__ import annotations

import enum
import re

_SPACE = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ATOM_CHARS = re.compile(r"[-+.0-9A-Za-z]*")
_ATOM = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_HEX = "0123456789abcdefABCDEF"
_CLOSING = {"{": "}", "[": "]"}


class _Expects(enum.Enum):
    VALUE = enum.auto()
    VALUE_OR_END = enum.auto()  # behind [
    KEY = enum.auto()
    KEY_OR_END = enum.auto()  # behind {
    COLON = enum.auto()
    COMMA_OR_END = enum.auto()
    TEXT = enum.auto()  # inside a string
    ESCAPE = enum.auto()  # behind a backslash in it
    ATOM = enum.auto()  # inside a number or a word


class JsonScan:
    """Scans one value.

    Attributes:
        is_done: The value has ended.
        is_broken: The text is not JSON at the place that `advance` has returned last.
    """

    __slots__ = ("_atom", "_expects", "_is_key", "_num_hex", "_open", "is_broken", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._expects = _Expects.VALUE
        self._open: list[str] = []
        self._atom = ""
        self._is_key = False
        self._num_hex = 0

    def advance(self, text: str, start: int) -> int:
        """Read on.

        Args:
            text: Text with more of the value.
            start: Where to read on: what the last call has returned, if the text has only grown.

        Returns:
            The index behind the last character that belongs to the value so far. If nothing is done or broken, this is
            the end of the text.
        """
        place, end = start, len(text)
        while place < end and not (self.is_done or self.is_broken):
            if self._expects is _Expects.TEXT:
                place = self._text(text, place)
            elif self._expects is _Expects.ESCAPE:
                place = self._escape(text, place)
            elif self._expects is _Expects.ATOM:
                place = self._in_atom(text, place)
            elif text[place] in _SPACE:
                place += 1
            else:
                place = self._structure(text, place)
        return place

    def end(self) -> None:
        """No more text comes: a number at the end is done now, and anything else that is open is not."""
        if self._expects is _Expects.ATOM and not self._open and not self.is_broken:
            self._close_atom()

    def _text(self, text: str, place: int) -> int:
        match = _PLAIN.match(text, place)
        place = place if match is None else match.end()
        if place == len(text):
            return place
        if text[place] == '"':
            self._after_value() if not self._is_key else self._set(_Expects.COLON)
            return place + 1
        if text[place] == "\\":
            self._set(_Expects.ESCAPE)
            return place + 1
        return self._break(place)

    def _escape(self, text: str, place: int) -> int:
        char = text[place]
        if self._num_hex:
            if char not in _HEX:
                return self._break(place)
            self._num_hex -= 1
        elif char == "u":
            self._num_hex = 4
        elif char not in '"\\/bfnrt':
            return self._break(place)
        if not self._num_hex:
            self._set(_Expects.TEXT)
        return place + 1

    def _in_atom(self, text: str, place: int) -> int:
        match = _ATOM_CHARS.match(text, place)
        end = place if match is None else match.end()
        self._atom += text[place:end]
        if end < len(text):
            self._close_atom()
        return end

    def _close_atom(self) -> None:
        if _ATOM.fullmatch(self._atom):
            self._atom = ""
            self._after_value()
        else:
            self.is_broken = True

    def _structure(self, text: str, place: int) -> int:
        """Read one character outside of strings, numbers and words."""
        char, expects = text[place], self._expects
        takes_value = expects in (_Expects.VALUE, _Expects.VALUE_OR_END)
        takes_key = expects in (_Expects.KEY, _Expects.KEY_OR_END)
        can_end = expects in (_Expects.VALUE_OR_END, _Expects.KEY_OR_END, _Expects.COMMA_OR_END)
        if char == '"' and (takes_value or takes_key):
            self._is_key = takes_key
            self._set(_Expects.TEXT)
        elif char in _CLOSING and takes_value:
            self._open.append(char)
            self._set(_Expects.KEY_OR_END if char == "{" else _Expects.VALUE_OR_END)
        elif can_end and self._open and char == _CLOSING[self._open[-1]]:
            self._open.pop()
            self._after_value()
        elif char == ":" and expects is _Expects.COLON:
            self._set(_Expects.VALUE)
        elif char == "," and expects is _Expects.COMMA_OR_END:
            self._set(_Expects.KEY if self._open[-1] == "{" else _Expects.VALUE)
        elif takes_value and _ATOM_CHARS.fullmatch(char):
            self._set(_Expects.ATOM)
            return place
        else:
            return self._break(place)
        return place + 1

    def _after_value(self) -> None:
        self._set(_Expects.COMMA_OR_END)
        self.is_done = not self._open

    def _set(self, expects: _Expects) -> None:
        self._expects = expects

    def _break(self, place: int) -> int:
        self.is_broken = True
        return place


def is_json(text: str) -> bool:
    """True if a text is one JSON value, with nothing behind it but white space."""
    scan = JsonScan()
    end = scan.advance(text, 0)
    scan.end()
    return scan.is_done and not text[end:].strip(_SPACE)
