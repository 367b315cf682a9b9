"""Values of Python as values of JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def json_values(value: Any) -> Any:
    """Convert to JSON values: an added token to its text, a number that JSON cannot express to null."""
    if isinstance(value, Mapping):
        return {str(name): json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    if isinstance(value, int | float | bool | None):
        return value if value is None or math.isfinite(value) else None
    return str(value)
