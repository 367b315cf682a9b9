"""What an option of vLLM may be here: the same, another name, or one that is taken only where it changes nothing.

The lists themselves are in the files beside this one; who reads them is in `__init__.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from nanoflow.parameters import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Same:
    """An option that has the same name and meaning here.

    Attributes:
        name: As a keyword argument.
        values: Other names of its values, as `{"half": "float16"}`.
        refused: Values that vLLM has and this has not, each with the reason.
        note: What differs.
    """

    name: str
    values: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """Another name of an option of ours.

    Attributes:
        name: As a keyword argument.
        to: Our name of it.
        convert: From a value under this name to one of the option, where the two differ; ValueError if it cannot be.
        note: How the two differ, in a few words for the help.
        flags: Further spellings on the command line, as `-q`.
    """

    name: str
    to: str
    convert: Callable[[Any], Any] | None = None
    note: str = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """An option that there is not: taken with the values that ask for what is so anyway, refused with any other.

    Attributes:
        name: As a keyword argument.
        reason: What there is instead, or what is so anyway.
        takes: The values that are taken, beside None.
        same_as: The value of this other option is taken too.
        is_switch: On the command line it is `--name` and `--no-name`, without a value.
        nargs: How many values it has on the command line, in argparse's words, if not one.
        flags: Further spellings on the command line, as `-tp`.
        is_secret: Its value is not shown in errors.
    """

    name: str
    reason: str
    takes: tuple[Any, ...] = ()
    same_as: str | None = None
    is_switch: bool = False
    nargs: str | None = None
    flags: tuple[str, ...] = ()
    is_secret: bool = False

    def changes_nothing(self, value: Any, others: Mapping[str, Any] | None = None) -> bool:
        """True if the value asks for what is so anyway; 1 is not true, and 0 not false.

        Args:
            value: What was given.
            others: The other options, for `same_as`.
        """
        if value is None or any(_is_equal(value, taken) for taken in self.takes):
            return True
        return self.same_as is not None and _is_equal(value, (others or {}).get(self.same_as))

    def refusal(self, value: Any) -> str:
        """One line for who gave another value."""
        given = self.name if self.is_secret else f"{self.name}={shown(value)}"
        return f"{given} is not possible: {self.reason}"


Entry = Same | Alias | Foreign


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The entries of one list, by name.

    Attributes:
        title: What has these options, for a page and for errors.
        entries: All of them, in the order of the page.
    """

    title: str
    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, title: str, *groups: Iterable[Entry]) -> Table:
        """A table of several lists of entries; ValueError if a name stands in it twice."""
        entries: dict[str, Entry] = {}
        for entry in (entry for group in groups for entry in group):
            if entry.name in entries:
                raise ValueError(f"{entry.name} stands twice in the table of {title}")
            entries[entry.name] = entry
        return cls(title=title, entries=entries)

    @property
    def aliases(self) -> tuple[Alias, ...]:
        """The other names of our options."""
        return tuple(entry for entry in self.entries.values() if isinstance(entry, Alias))

    @property
    def foreign(self) -> tuple[Foreign, ...]:
        """What there is not."""
        return tuple(entry for entry in self.entries.values() if isinstance(entry, Foreign))

    def value_of(self, name: str, value: str) -> str:
        """Our name of an option's value.

        Raises:
            ValueError: The value is one of those that vLLM has and this has not; the message says why.
        """
        entry = self.entries.get(name)
        if not isinstance(entry, Same):
            return value
        if value in entry.refused:
            raise ValueError(f"{value!r} is not possible: {entry.refused[value]}")
        return entry.values.get(value, value)


EMPTY = Table(title="", entries={})


def switches(reason: str, *names: str, takes: tuple[Any, ...] = (False,)) -> tuple[Foreign, ...]:
    """Several switches that are off, or whatever `takes` says, for one reason."""
    return tuple(Foreign(name=name, reason=reason, takes=takes, is_switch=True) for name in names)


def options(reason: str, *names: str, takes: tuple[Any, ...] = ()) -> tuple[Foreign, ...]:
    """Several options with values that there are not, for one reason."""
    return tuple(Foreign(name=name, reason=reason, takes=takes) for name in names)


def read_text(text: str) -> Any:
    """A value as the command line has it: JSON if it is, else the text; None and null are nothing."""
    if text in ("None", "none", "null"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_equal(value: Any, taken: Any) -> bool:
    """True for equal values, numbers of any kind among themselves; a class that cannot be compared is not equal."""
    if isinstance(value, bool) or isinstance(taken, bool):
        return value is taken
    if isinstance(value, tuple | set | frozenset) and isinstance(taken, list):
        value = list(value)
    return isinstance(value, Real | str | list | dict) and bool(value == taken)


def negated(value: Any) -> bool:
    """The other truth value, for an option that says the opposite of ours; ValueError if it is none."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {shown(value)}")
    return not value
