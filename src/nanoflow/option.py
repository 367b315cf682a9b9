"""How an option is declared: a dataclass field with its help and how its text is read.

The options are in `config.py`, `access.py` and `bounds.py`; vLLM's names of them are in `compat/`. `cli/options.py`
makes command-line flags of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from nanoflow.parameters import read_count as read_count


class ConfigError(ValueError):
    """An option does not exist or has an invalid value; the message names it and says what would work."""


def option(default: Any, text: str, *, read: Callable[[str], Any] | None = None) -> Any:
    """Declare an option.

    Args:
        default: Its value if it is not given.
        text: One line of help.
        read: Converts the text that a user wrote to a value; ValueError if it cannot. None converts by type.
    """
    return dataclasses.field(default=default, metadata={"help": text, "read": read})


def require_positive(name: str, value: float) -> None:
    """Raise a `ConfigError` unless the value is a positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}")
