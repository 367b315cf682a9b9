"""Flags of `vllm serve` that nanoflow lacks: accepted if their value changes nothing, otherwise refused with a reason.

The flags are data (`compat/`); nanoflow's own flags are made in `options.py`. Users of vLLM write flags with
underscores, in a short form (`-tp 2`, `-O3`), or with a path into a JSON value (`--hf-overrides.rope_theta 1`).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from nanoflow.compat.entries import Foreign, Table, read_text


def with_dashes(argv: Iterable[str]) -> list[str]:
    """The command line with underscores in flag names as dashes, and with paths into JSON values as JSON.

    Arguments after `--` are unchanged.
    """
    written: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            return [*written, argument, *arguments]
        flag = re.fullmatch(r"(--[A-Za-z][\w-]*)(?:\.([\w.-]+))?(=.*)?", argument, re.DOTALL)
        if flag is None:
            written.append(argument)
            continue
        name, path, value = flag[1].replace("_", "-"), flag[2], flag[3]
        if path is not None:
            value = "=" + _nested(path, next(arguments, "true") if value is None else value[1:])
        written.append(name + (value or ""))
    return written


def add_foreign_flags(parser: argparse.ArgumentParser, tables: Sequence[Table]) -> None:
    """Add a hidden flag for each foreign option of the tables, unless the parser has that flag already."""
    for entry in (entry for table in tables for entry in table.foreign):
        name = "--" + entry.name.replace("_", "-")
        spellings = [name, *(f"--no-{name[2:]}" for _ in range(entry.is_switch)), *entry.flags]
        taken = parser._option_string_actions
        free = [flag for flag in spellings if flag not in taken]
        if name in free:
            how: dict[str, Any] = {"nargs": 0 if entry.is_switch else entry.nargs}
            parser.add_argument(*free, action=_Check, entry=entry, help=argparse.SUPPRESS, **how)


class _Check(argparse.Action):
    """Refuses a value that would change something; ignores other values."""

    def __init__(self, *, entry: Foreign, **kwargs: Any) -> None:
        super().__init__(default=argparse.SUPPRESS, **kwargs)
        self._entry = entry

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """See `argparse.Action`."""
        if self._entry.is_switch:
            value: Any = not option_string.startswith("--no-")
            given = option_string
        else:
            texts = values if isinstance(values, list) else [values]
            shown_texts = () if self._entry.is_secret else (text for text in texts if text is not None)
            given = " ".join((option_string, *shown_texts))
            value = _value_of(texts, is_list=self._entry.nargs in ("+", "*"))
        if not self._entry.changes_nothing(value):
            parser.error(f"{given} is not possible: {self._entry.reason}")


def _value_of(texts: Sequence[str | None], *, is_list: bool) -> Any:
    """The value of a flag: parsed as JSON if possible, a list for several texts, True without a value."""
    read = [True if text is None else read_text(text.removeprefix("=")) for text in texts]
    return read if is_list and not (len(read) == 1 and isinstance(read[0], list)) else read[0]


def _nested(path: str, text: str) -> str:
    """A JSON object with a value at a path, as text."""
    value = read_text(text)
    for name in reversed(path.split(".")):
        value = {name: value}
    return json.dumps(value)
