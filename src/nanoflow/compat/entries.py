"""What an option of vLLM is in nanoflow: the same, another name, or one that is accepted only if it changes nothing.

The lists are in the other files of this package.
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
    """An option with the same name and meaning.

    Attributes:
        name: Keyword argument.
        values: vLLM's names of values, with ours, as `{"half": "float16"}`.
        refused: Values of vLLM that are not supported, each with the reason.
        note: The difference, if there is one.
        flags: Further spellings on the command line, as `-q`.
    """

    name: str
    values: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """Another name of one of our options.

    Attributes:
        name: Keyword argument.
        to: Our name of the option.
        convert: Converts a value to that of our option, if they differ; ValueError if it cannot.
        note: The difference in a few words, for the help.
        flags: Further spellings on the command line, as `-q`.
    """

    name: str
    to: str
    convert: Callable[[Any], Any] | None = None
    note: str = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """An option that nanoflow lacks: accepted with values that ask for what nanoflow does anyway, otherwise refused.

    Attributes:
        name: Keyword argument.
        reason: What to use instead, or what nanoflow does anyway.
        takes: Accepted values, beside None.
        same_as: The value of this other option is accepted too.
        is_switch: On the command line it is `--name` and `--no-name`, without a value.
        nargs: Number of its values on the command line, as in argparse; None for one.
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
        """True if the value asks for what nanoflow does anyway; 1 does not equal True, and 0 does not equal False.

        Args:
            value: The given value.
            others: The other options, for `same_as`.
        """
        if value is None or any(_is_equal(value, taken) for taken in self.takes):
            return True
        return self.same_as is not None and _is_equal(value, (others or {}).get(self.same_as))

    def refusal(self, value: Any) -> str:
        """One-line error for a value that is not accepted."""
        given = self.name if self.is_secret else f"{self.name}={shown(value)}"
        return f"{given} is not possible: {self.reason}"


Entry = Same | Alias | Foreign


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A list of entries, by name.

    Attributes:
        title: Where vLLM has these options, for the page and for errors.
        entries: All of them, in the order of the page.
    """

    title: str
    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, title: str, *groups: Iterable[Entry]) -> Table:
        """A table of several lists of entries; ValueError if a name occurs twice."""
        entries: dict[str, Entry] = {}
        for entry in (entry for group in groups for entry in group):
            if entry.name in entries:
                raise ValueError(f"{entry.name} stands twice in the table of {title}")
            entries[entry.name] = entry
        return cls(title=title, entries=entries)

    @property
    def aliases(self) -> tuple[Alias, ...]:
        """The entries that are other names of our options."""
        return tuple(entry for entry in self.entries.values() if isinstance(entry, Alias))

    @property
    def foreign(self) -> tuple[Foreign, ...]:
        """The entries that nanoflow lacks."""
        return tuple(entry for entry in self.entries.values() if isinstance(entry, Foreign))

    def flags_of(self, name: str) -> tuple[str, ...]:
        """Further spellings on the command line of one of our options, as `-q`."""
        entry = self.entries.get(name)
        return entry.flags if isinstance(entry, Same) else ()

    def value_of(self, name: str, value: str) -> str:
        """Our name of an option's value.

        Raises:
            ValueError: The value is not supported; the message says why.
        """
        entry = self.entries.get(name)
        if not isinstance(entry, Same):
            return value
        if value in entry.refused:
            raise ValueError(f"{value!r} is not possible: {entry.refused[value]}")
        return entry.values.get(value, value)


EMPTY = Table(title="", entries={})


def switches(reason: str, *names: str, takes: tuple[Any, ...] = (False,)) -> tuple[Foreign, ...]:
    """Switches that nanoflow lacks, accepted if they are off (or as `takes` says), with one reason for all."""
    return tuple(Foreign(name=name, reason=reason, takes=takes, is_switch=True) for name in names)


def options(reason: str, *names: str, takes: tuple[Any, ...] = ()) -> tuple[Foreign, ...]:
    """Options with values that nanoflow lacks, with one reason for all."""
    return tuple(Foreign(name=name, reason=reason, takes=takes) for name in names)


def read_text(text: str) -> Any:
    """A value from the command line: parsed as JSON if possible, else the text; None for "None" and "null"."""
    if text in ("None", "none", "null"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_equal(value: Any, taken: Any) -> bool:
    """Whether values are equal; numbers of any type are compared. A value that cannot be compared is not equal."""
    if isinstance(value, bool) or isinstance(taken, bool):
        return value is taken
    if isinstance(value, tuple | set | frozenset) and isinstance(taken, list):
        value = list(value)
    return isinstance(value, Real | str | list | dict) and bool(value == taken)


def negated(value: Any) -> bool:
    """The other boolean, for an option with the opposite meaning of ours; ValueError if it is none."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {shown(value)}")
    return not value
