"""How an option is declared: a dataclass field with its help, its other names and how its text is read.

Which options there are stands in `config.py` and `bounds.py`; flags are made of them in `cli/options.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """An option has a value it cannot have, or does not exist; the message says which and what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """Another name of an option: what other engines call it.

    Attributes:
        name: As a keyword argument.
        convert: From a value under this name to one of the option, where the two differ; ValueError if it cannot be.
        note: How the two differ, in a few words for the help.
    """

    name: str
    convert: Callable[[Any], Any] | None = None
    note: str = ""


def option(
    default: Any, text: str, *, aliases: tuple[Alias, ...] = (), read: Callable[[str], Any] | None = None
) -> Any:
    """Declare an option.

    Args:
        default: Its value if it is not given.
        text: One line of help.
        aliases: Its other names.
        read: From what a user wrote to a value, where that is more than its type; ValueError if it is none.
    """
    return dataclasses.field(default=default, metadata={"help": text, "aliases": aliases, "read": read})


def read_count(text: str) -> int:
    """A number of tokens: 4096, 4k (thousands: 4,000), 4K (times 1,024: 4,096), and so with m, M, g, G.

    Raises:
        ValueError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text.strip())
    if match is None or ("." in match[1] and not match[2]):
        raise ValueError(f"{text!r} is no whole number, as 4096, 4k (4,000) or 4K (4,096)")
    base = 1024 if match[2].isupper() else 1000
    return int(float(match[1]) * base ** " kmg".index(match[2].lower() or " "))


def require_positive(name: str, value: float) -> None:
    """Refuse what is no positive number with a `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}")
