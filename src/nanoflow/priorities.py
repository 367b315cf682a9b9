"""The priority of a request: an integer, of which lower ones go first, or "batch" for work that nobody waits for.

Requests with an integer are *interactive*. Those of priority "batch" are *background* requests: they get what the
interactive ones leave of the device (`scheduler/background.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nanoflow.parameters import RequestError, Whole, shown

BATCH: Literal["batch"] = "batch"
Priority = int | Literal["batch"]
PRIORITY_CLASSES = ("interactive", BATCH)
"""Names of the two classes of requests, for metrics: those with an integer, and background ones."""

_MOST = 2**31 - 1
_NUMBERS = Whole(low=-_MOST, high=_MOST)
# Behind all integers that a priority can be.
_RANK_OF_BATCH = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorityKind:
    """An integer or "batch", checked as a parameter is."""

    def read(self, name: str, value: object) -> Priority:
        """The value; RequestError if it is neither."""
        if value == BATCH:
            return BATCH
        if isinstance(value, str):
            raise RequestError(f"{name} must be an integer or {BATCH!r}, got {shown(value)}")
        return _NUMBERS.read(name, value)

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of valid values."""
        return {"anyOf": [_NUMBERS.schema, {"enum": [BATCH]}]}


PRIORITY = PriorityKind()


def is_background(priority: Priority) -> bool:
    """True for a request that gets what interactive ones leave."""
    return priority == BATCH


def rank_of(priority: Priority) -> int:
    """Requests of lower rank go first."""
    return _RANK_OF_BATCH if priority == BATCH else priority
