"""Read a call that is a JSON object, such as {"name": "f", "arguments": {...}}, as its text arrives.

The text is not taken from the buffer before the name is known and the arguments have begun, so that a call that turns
out to be none can stay content.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Container
from dataclasses import dataclass

from nanoflow.chat_formats.formats import CallObject
from nanoflow.chat_formats.json_scan import JsonScan

_SPACE = " \t\n\r"


class Verdict(enum.Enum):
    """What is known of the text so far."""

    OPEN = enum.auto()  # more text is needed
    NO_CALL = enum.auto()
    STREAMS = enum.auto()  # the name is known, and the arguments begin at `place`
    ENDED = enum.auto()  # the object ends before `place`


@dataclass(slots=True)
class ObjectReader:
    """Reads the members of one object.

    Args:
        shape: Names of its members.
        names: The declared functions; an object that names another one is no call.
        place: Index in the buffer where the object begins, with "{".

    Attributes:
        name: The function's name, once it is known.
        arguments: Arguments that came before the name, or as a string: then its content. None if there are none.
    """

    shape: CallObject
    names: Container[str]
    place: int
    name: str | None = None
    arguments: str | None = None
    _expects: str = "{"
    _key: str | None = None
    _scan: JsonScan | None = None
    _start: int = 0

    def read(self, text: str) -> Verdict:
        """Read on in the buffer, which may have grown."""
        while True:
            if self._scan is not None:
                verdict = self._value(text)
            else:
                while self.place < len(text) and text[self.place] in _SPACE:
                    self.place += 1
                if self.place == len(text):
                    return Verdict.OPEN
                verdict = self._structure(text[self.place])
            if verdict is not None:
                return verdict

    def resume(self, place: int) -> None:
        """Go on behind arguments that were read elsewhere, which end before `place`."""
        self.place, self.arguments, self._expects = place, "", ","

    def _structure(self, char: str) -> Verdict | None:
        """Read what stands between keys and values; None to go on."""
        expects = self._expects
        if expects == "{" and char == "{":
            self._expects, self.place = "first key", self.place + 1
        elif char == "}" and expects in ("first key", ","):
            self.place += 1
            return Verdict.NO_CALL if self.name is None else Verdict.ENDED
        elif char == "," and expects == ",":
            self._expects, self.place = "key", self.place + 1
        elif char == '"' and expects in ("key", "first key"):
            self._expects = "key"
            self._begin()
        elif char == ":" and expects == ":":
            self._expects, self.place = "value", self.place + 1
        elif expects == "value":
            if self._key in self.shape.arguments and self.name is not None and char == "{" and self.arguments is None:
                return Verdict.STREAMS
            self._begin()
        else:
            return Verdict.NO_CALL
        return None

    def _begin(self) -> None:
        self._scan, self._start = JsonScan(), self.place

    def _value(self, text: str) -> Verdict | None:
        """Read on in a key or a value; None to go on."""
        scan = self._scan
        assert scan is not None
        self.place = scan.advance(text, self.place)
        if scan.is_broken:
            return Verdict.NO_CALL
        if not scan.is_done:
            return Verdict.OPEN
        self._scan = None
        written = text[self._start : self.place]
        if self._expects == "key":
            self._key, self._expects = json.loads(written), ":"
            return None
        self._expects = ","
        return None if self._take(written) else Verdict.NO_CALL

    def _take(self, written: str) -> bool:
        """Take the value of a member; False if it cannot be one of a call."""
        if self._key == self.shape.name:
            value = json.loads(written)
            is_new = self.name is None
            self.name = value if isinstance(value, str) and value in self.names else None
            return is_new and self.name is not None
        if self._key in self.shape.arguments and self.arguments is None:
            if written.startswith("{"):
                self.arguments = written
            elif written.startswith('"'):
                # Half of a surrogate pair may be escaped in JSON, but is no text. A blank text has no arguments.
                content = json.loads(written).encode("utf-8", "replace").decode()
                self.arguments = content if content.strip() else None
            else:
                return written == "null"
        return True
