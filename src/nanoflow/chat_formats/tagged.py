"""Arguments that are no JSON but members between tags, such as `<parameter=city>Paris</parameter>`.

They become a JSON object as they arrive. A text value is passed on piece by piece; another value is passed on when it
has ended. The schema of the function says which values are text: the same characters may be a number or a text.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanoflow.chat_formats.markers import could_become, markers

_SPACE = " \t\r\n"
_WORDS = ("true", "false")
# Names of parameters are not longer.
_MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedArguments:
    """How members of arguments are written.

    Attributes:
        begin: Stands before a name.
        middle: Texts between a name and its value; white space may stand between them.
        end: Stands behind a value.
        trim: Is taken away once from either end of a value.
        member: A member as a model writes it that makes no mistakes, with {name} and {value}.
        closer: Stands behind all members.
    """

    begin: str
    middle: tuple[str, ...]
    end: str
    trim: str = ""
    member: str
    closer: str


def types_of(schema: Any) -> frozenset[str]:
    """The types that a schema allows by name; empty if it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset((given,))
    if isinstance(given, list):
        return frozenset(one for one in given if isinstance(one, str))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            each = [types_of(one) for one in schema[key]]
            return frozenset().union(*each) if all(each) else frozenset()
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema[k] for k in ("const",) if k in schema]
    return frozenset(_type_of(value) for value in values)


def _type_of(value: Any) -> str:
    return "string" if isinstance(value, str) else "null" if value is None else "other"


def is_text(schema: Any) -> bool:
    """True if a value with this schema is text, whatever its characters are."""
    types = types_of(schema)
    return "string" in types and "null" not in types


def value_of(text: str, schema: Any) -> str:
    """A value that was written as text, as JSON: by its schema, and as a text where it is nothing else."""
    types, word = types_of(schema), text.strip()
    if "boolean" in types and word.lower() in _WORDS:
        return word.lower()
    if "string" in types and word != "null":
        return _as_text(text)
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _as_text(text)
    return word


class Progress(enum.Enum):
    """Where a reader of members is."""

    OPEN = enum.auto()  # more text is needed
    ENDED = enum.auto()
    MISTAKE = enum.auto()  # what follows is no member


class TaggedReader:
    """Reads the members of one call.

    Args:
        shape: How they are written.
        parameters: The schema of the arguments.
    """

    def __init__(self, shape: TaggedArguments, parameters: Mapping[str, Any]) -> None:
        properties = parameters.get("properties")
        self._shape = shape
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._ends = markers(frozenset({shape.end, shape.trim + shape.end}))
        self._step: Callable[[str, bool], tuple[int, str] | Progress] = self._member
        self._num_members = 0
        self._key: str = ""
        self._num_middles = 0

    def read(self, text: str, *, is_end: bool) -> tuple[int, str, Progress]:
        """Read on.

        Args:
            text: What has not been read.
            is_end: True if no more text comes.

        Returns:
            How many characters were read, what they are as JSON, and where the reader is.
        """
        place, written = 0, ""
        while True:
            found = self._step(text[place:], is_end)
            if isinstance(found, Progress):
                return place, written, found
            num_read, more = found
            place, written = place + num_read, written + more
            if self._step == self._ended:
                return place, written, Progress.ENDED

    def _member(self, text: str, is_end: bool) -> tuple[int, str] | Progress:
        """Before a member, or the end."""
        body = text.lstrip(_SPACE)
        num_spaces = len(text) - len(body)
        if body.startswith(self._shape.closer):
            self._step = self._ended
            return num_spaces + len(self._shape.closer), "}" if self._num_members else "{}"
        if body.startswith(self._shape.begin):
            self._step = self._name
            return num_spaces + len(self._shape.begin), ""
        is_open = not body or any(could_become(body, word) for word in (self._shape.begin, self._shape.closer))
        return Progress.OPEN if is_open and not is_end else Progress.MISTAKE

    def _name(self, text: str, is_end: bool) -> tuple[int, str] | Progress:
        middle = self._shape.middle[0]
        place = text.find(middle, 0, _MAX_NAME_CHARS + len(middle))
        if place < 0:
            is_open = len(text) < _MAX_NAME_CHARS and not is_end
            return Progress.OPEN if is_open else Progress.MISTAKE
        self._key, self._num_middles, self._step = text[:place].strip(), 1, self._middle
        return place + len(middle), ""

    def _middle(self, text: str, is_end: bool) -> tuple[int, str] | Progress:
        """Between a name and its value."""
        if self._num_middles == len(self._shape.middle):
            trim = self._shape.trim
            if could_become(text, trim) and not is_end:
                return Progress.OPEN
            self._step = self._text if is_text(self._properties.get(self._key)) else self._other
            before = self._begin_member() + '"' if self._step == self._text else ""
            return len(trim) if trim and text.startswith(trim) else 0, before
        word, body = self._shape.middle[self._num_middles], text.lstrip(_SPACE)
        if body.startswith(word):
            self._num_middles += 1
            return len(text) - len(body) + len(word), ""
        return Progress.OPEN if could_become(body, word) and not is_end else Progress.MISTAKE

    def _text(self, text: str, is_end: bool) -> tuple[int, str] | Progress:
        """In a text value, which is passed on as it comes."""
        num_sure, mark = self._ends.find(text, is_end=is_end)
        if mark is None:
            return (num_sure, _as_text(text[:num_sure])[1:-1]) if num_sure else Progress.OPEN
        self._step = self._member
        return num_sure + len(mark), _as_text(text[:num_sure])[1:-1] + '"'

    def _other(self, text: str, is_end: bool) -> tuple[int, str] | Progress:
        """In a value that is passed on as a whole."""
        num_sure, mark = self._ends.find(text, is_end=is_end)
        if mark is None:
            return Progress.OPEN
        self._step = self._member
        return num_sure + len(mark), self._begin_member() + value_of(text[:num_sure], self._properties.get(self._key))

    def _ended(self, _text: str, _is_end: bool) -> tuple[int, str] | Progress:
        return Progress.ENDED

    def _begin_member(self) -> str:
        self._num_members += 1
        return f"{'{' if self._num_members == 1 else ', '}{_as_text(self._key)}: "


def _as_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(name: str) -> Any:
    raise ValueError(name)
