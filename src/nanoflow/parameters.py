"""Kinds of values of sampling parameters: which values are valid, how they are stored, and their JSON schema.

Python arguments, HTTP requests and the OpenAPI document all use the same kind, so that bounds, messages and conversions
cannot differ. The parameters themselves are in `request.py`.
"""

from __future__ import annotations

import difflib
import enum
import math
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX, UINT64_MAX = -(2**63), 2**63 - 1, 2**64 - 1
_MAX_SHOWN_CHARS = 80
# Decimal digits of the largest token id.
_MAX_ID_DIGITS = 10
# Similarity of two names (0 to 1) below which one is not taken for a typing error of the other.
_NEAR = 0.75


class RequestError(ValueError):
    """A request is invalid; the message is one line for the client.

    Any other exception while a request is served is a fault of the server.

    Attributes:
        param: Name of the invalid parameter; "prompt" for the prompt or messages; None if no single one is at fault.
        code: Error code that client programs look for, where one is known.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Kind(Protocol):
    """A kind of value."""

    def read(self, name: str, value: object) -> Any:
        """Check and convert a value to plain Python numbers, strings and tuples. Converting twice changes nothing.

        Raises:
            RequestError: The value is not of this kind; the message begins with `name`.
        """

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of valid values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """An integer from `low` to `high`. numpy's integers and 2.0 are accepted, booleans and 2.5 are not."""

    low: int
    high: int

    def read(self, name: str, value: object) -> int:
        """See `Kind`."""
        if not is_whole(value):
            raise RequestError(f"{name} must be an integer, got {shown(value)}")
        number: int = int(value)  # type: ignore[call-overload]
        if not self.low <= number <= self.high:
            raise RequestError(f"{name} must be in [{self.low}, {self.high}], got {shown(number)}")
        return number

    @property
    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A finite number from `low` to `high`."""

    low: float
    high: float

    def read(self, name: str, value: object) -> float:
        """See `Kind`."""
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(number := _as_float(value)):
            raise RequestError(f"{name} must be a finite number, got {shown(value)}")
        if not self.low <= number <= self.high:
            raise RequestError(f"{name} must be in [{self.low}, {self.high}], got {shown(value)}")
        return number

    @property
    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"type": "number", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A boolean; numbers are not accepted."""

    def read(self, name: str, value: object) -> bool:
        """See `Kind`."""
        if isinstance(value, bool):
            return value
        # Imported late, so that `nanoflow --help`, which loads this file, does not load numpy.
        import numpy as np

        if not isinstance(value, np.bool_):
            raise RequestError(f"{name} must be true or false, got {shown(value)}")
        return bool(value)

    @property
    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOf:
    """A member of an enumeration."""

    members: type[enum.Enum]

    def read(self, name: str, value: object) -> enum.Enum:
        """See `Kind`."""
        if not isinstance(value, self.members):
            choices = ", ".join(map(str, self.members))
            raise RequestError(f"{name} must be one of {choices}, got {shown(value)}")
        return value

    @property
    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {"enum": [member.name for member in self.members]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """A list of non-empty strings; a single string is accepted if `takes_one`."""

    max_items: int
    takes_one: bool = False

    def read(self, name: str, value: object) -> tuple[str, ...]:
        """See `Kind`."""
        texts = (value,) if self.takes_one and isinstance(value, str) else _items(name, value, "strings")
        _require_few(name, texts, self.max_items)
        for text in texts:
            if not isinstance(text, str) or not text:
                raise RequestError(f"{name} must hold non-empty strings, got {shown(text)}")
            _require_unicode(name, text)
        return tuple(map(str, texts))

    @property
    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        text = {"type": "string", "minLength": 1}
        several = {"type": "array", "items": text, "maxItems": self.max_items}
        return {"anyOf": [text, several]} if self.takes_one else several


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """At most `max_items` token ids from `low`. The model checks that its vocabulary has them."""

    max_items: int | None = None
    low: int = -INT32_MAX

    def read(self, name: str, value: object) -> tuple[int, ...]:
        """See `Kind`."""
        items = _items(name, value, "integers")
        _require_few(name, items, self.max_items)
        ids = integers(name, items)
        for token_id in (min(ids, default=self.low), max(ids, default=self.low)):
            if not self.low <= token_id <= INT32_MAX:
                raise RequestError(f"{name}: token id {shown(token_id)} is out of vocabulary")
        return tuple(ids)

    @property
    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        items = {"type": "integer", "minimum": self.low, "maximum": INT32_MAX}
        limit = {} if self.max_items is None else {"maxItems": self.max_items}
        return {"type": "array", "items": items, **limit}


@dataclass(frozen=True, slots=True, kw_only=True)
class Biases:
    """A mapping from token ids to numbers. Ids may be strings of digits, as keys are in JSON."""

    bias: Number
    max_items: int

    def read(self, name: str, value: object) -> dict[int, float]:
        """See `Kind`."""
        if not isinstance(value, Mapping):
            raise RequestError(f"{name} must map token ids to numbers, got {shown(value)}")
        _require_few(name, value, self.max_items)
        biases = {_id_of(name, key): self.bias.read(f"{name}[{shown(key)}]", bias) for key, bias in value.items()}
        if len(biases) < len(value):
            raise RequestError(f"{name} names a token twice")
        return biases

    @property
    def schema(self) -> dict[str, Any]:
        """See `Kind`."""
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^[0-9]{{1,{_MAX_ID_DIGITS}}}$"},
            "additionalProperties": self.bias.schema,
            "maxProperties": self.max_items,
        }


def read_count(text: str) -> int:
    """Read a number of tokens: 4096, 4k (4,000) or 4K (4,096); likewise with m, M, g, G.

    Raises:
        ValueError: The text is no such number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text.strip())
    if match is None or ("." in match[1] and not match[2]):
        raise ValueError(f"{text!r} is no whole number, as 4096, 4k (4,000) or 4K (4,096)")
    base = 1024 if match[2].isupper() else 1000
    return int(float(match[1]) * base ** " kmg".index(match[2].lower() or " "))


def is_whole(value: object) -> bool:
    """True for an integer, also written as 2.0, which JSON does not tell from 2; False for booleans."""
    if isinstance(value, bool):
        return False
    return isinstance(value, Integral) or (isinstance(value, Real) and _as_float(value).is_integer())


def integers(name: str, values: Collection[object]) -> list[int]:
    """The values as Python integers of any size; fast if they are Python integers already.

    Raises:
        RequestError: One of them is not an integer.
    """
    if set(map(type, values)) <= {int}:
        return list(values)  # type: ignore[arg-type]
    for value in values:
        if not is_whole(value):
            raise RequestError(f"{name} must be integers, got {type(value).__name__} {shown(value)}")
    return [int(value) for value in values]  # type: ignore[call-overload]


def shown(value: object) -> str:
    """A value as short text for an error message."""
    try:
        text = reprlib.repr(value)
    # Python refuses to print very long integers, and a class's repr may raise anything.
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """End of a message about an unknown name, which suggests the nearest known one; None if none is near."""
    return next((f"; did you mean {near!r}?" for near in nearest(name, known)), None)


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """A known name that differs by a typing error, else the only known name that contains all words of this one."""
    names = list(known)
    slips = difflib.get_close_matches(name, names, n=1, cutoff=_NEAR)
    longer = [other for other in names if _words(name) <= _words(other)]
    return slips or (longer if len(longer) == 1 else [])


def _words(name: str) -> set[str]:
    return set(re.split(r"[-_]+", name.strip("-_")))


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _items(name: str, value: object, what: str) -> Collection[object]:
    if not isinstance(value, Collection) or isinstance(value, str | bytes | bytearray | Mapping):
        raise RequestError(f"{name} must be a list of {what}, got {shown(value)}")
    return value


def _require_few(name: str, items: Collection[object], max_items: int | None) -> None:
    if max_items is not None and len(items) > max_items:
        raise RequestError(f"{name} may hold at most {max_items} entries, got {len(items)}")


def _require_unicode(name: str, text: str) -> None:
    """Refuse lone surrogates: Python and JSON can contain them, but they cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name}: the text is not valid Unicode: it has a lone surrogate") from None


def _id_of(name: str, key: object) -> int:
    """A key of the mapping as a token id, which is an int32."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS:
        key = int(key)
    if isinstance(key, bool) or not isinstance(key, Integral):
        raise RequestError(f"{name} must have integers as token ids, got {shown(key)}")
    if abs(int(key)) > INT32_MAX:
        raise RequestError(f"{name}: token id {shown(key)} is out of vocabulary")
    return int(key)
