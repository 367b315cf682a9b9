"""Reads JSON files of a model folder without trusting them: bounded memory, and one-line errors for invalid values.

The meaning of fields is in `config_json.py` and `generation.py`.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A config.json has a few kB; the index of the largest models has 10 MB.
MAX_INDEX_BYTES = 32 * 2**20
MAX_CONFIG_BYTES = 4 * 2**20
INT32_MAX = 2**31 - 1
_MAX_SHOWN = 80


class ModelError(ValueError):
    """A model folder cannot be served; one line that says which file or field is wrong and what would work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A JSON object whose values are checked as they are read.

    Every reader raises ModelError for an invalid value and, unless it has a default, for an absent one; `null` counts
    as absent.

    Attributes:
        values: The object.
        origin: Its source for messages: a file, or a file and a field.
    """

    values: Mapping[str, Any]
    origin: str

    def has(self, name: str) -> bool:
        """True if the field exists and is not null."""
        return self.values.get(name) is not None

    def error(self, name: str, problem: str) -> ModelError:
        """The error to raise about a field."""
        return ModelError(f"{self.origin}: field {name!r} {problem}")

    def problem(self, text: str) -> ModelError:
        """The error to raise about the object."""
        return ModelError(f"{self.origin}: {text}")

    def raw(self, name: str, default: Any = None) -> Any:
        """The value without checks."""
        value = self.values.get(name)
        if value is None and default is None:
            raise self.error(name, "is missing: it is null" if name in self.values else "is missing")
        return default if value is None else value

    def positive_int(self, name: str, default: int | None = None, *, most: int = INT32_MAX) -> int:
        """A whole number from 1 to `most`."""
        value = self.raw(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(name, f"must be a positive integer, got {shown(value)}")
        if value > most:
            raise self.error(name, f"must be at most {most}, got {shown(value)}")
        return value

    def whole(self, name: str, *, most: int) -> int:
        """A whole number from -`most` to `most`."""
        value = self.raw(name)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > most:
            raise self.error(name, f"must be a whole number, got {shown(value)}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.raw(name, default)
        if not _is_finite(value):
            raise self.error(name, f"must be a finite number, got {shown(value)}")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.raw(name, default)
        if not _is_finite(value) or value <= 0:
            raise self.error(name, f"must be a positive number, got {shown(value)}")
        return float(value)

    def flag(self, name: str, *, default: bool | None = None) -> bool:
        """True or False."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {shown(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self.raw(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, got {shown(value)}")
        return value

    def positives(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above 0."""
        values = self.raw(name)
        if not isinstance(values, list) or len(values) != count:
            raise self.error(name, f"must be a list of {count} positive numbers, got {_counted(values)}")
        for value in values:
            if not _is_finite(value) or value <= 0:
                raise self.error(name, f"must hold positive numbers, got {shown(value)}")
        return tuple(float(value) for value in values)

    def refuse_nulls(self, *names: str) -> None:
        """Refuse null in these fields, for which it does not mean absent."""
        for name in names:
            if name in self.values and self.values[name] is None:
                raise self.error(name, "is missing: it is null")

    def nested(self, name: str) -> Fields:
        """A nested object; empty if absent."""
        value = self.raw(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be an object, got {shown(value)}")
        return Fields(values=value, origin=f"{self.origin}: {name}")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids, given as one or as a list; empty if absent."""
        ids = self.raw(name, [])
        ids = ids if isinstance(ids, list) else [ids]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise self.error(name, f"must be token ids below {vocab_size}, got {shown(token)}")
        return tuple(dict.fromkeys(ids))


def shown(value: Any) -> str:
    """A value from a file as short text on one line, for a message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _counted(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else shown(value)


def is_there(path: Path) -> bool:
    """True if the path exists, also as a broken link."""
    return path.is_symlink() or path.exists()


def require_file(path: Path) -> int:
    """The size in bytes of a regular file, or of a link's target.

    Reading a pipe, a socket or a device could wait forever, so these are refused.

    Raises:
        ModelError: It does not exist or is not a regular file.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder needs one") from None
    except OSError as error:
        raise ModelError(f"{path}: not readable: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{path}: is no regular file")
    return found.st_size


def read_object(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> Mapping[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: The file does not exist or is too large, is not UTF-8 or JSON, is not an object, is nested too
            deeply, or has a key twice in one object.
    """
    size = require_file(path)
    if size > max_bytes:
        raise ModelError(f"{path}: has {size} bytes, more than the {max_bytes} allowed")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=without_duplicates)
    except OSError as error:
        raise ModelError(f"{path}: not readable: {error.strerror}") from None
    except RecursionError:
        raise ModelError(f"{path}: not readable as JSON: nested too deeply") from None
    except ValueError as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`; ValueError if a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} is twice in one object")
    return found


def _is_finite(value: Any) -> bool:
    """True for a number that a float can represent. Python's JSON also has NaN, Infinity and integers of any size."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= 1.7e308
