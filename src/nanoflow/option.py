"""How an option is declared: a dataclass field with its help and how its text is read.

Which options there are stands in `config.py`, `access.py` and `bounds.py`, their other names in `compat/`; flags are
made of them in `cli/options.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from nanoflow.parameters import read_count as read_count


class ConfigError(ValueError):
    """An option has a value it cannot have, or does not exist; the message says which and what would do."""


def option(default: Any, text: str, *, read: Callable[[str], Any] | None = None) -> Any:
    """Declare an option.

    Args:
        default: Its value if it is not given.
        text: One line of help.
        read: From what a user wrote to a value, where that is more than its type; ValueError if it is none.
    """
    return dataclasses.field(default=default, metadata={"help": text, "read": read})


def require_positive(name: str, value: float) -> None:
    """Refuse what is no positive number with a `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}")
