"""The table of bounds in docs/bounds.md, from the options themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields

from nanoflow.bounds import ServerBounds

_UNITS = ((2**20, "M"), (2**10, "K"))


def bounds_table() -> str:
    """One row an option."""
    return "\n".join(["| option | default | what |", "|---|---|---|", *_rows()])


def _rows() -> Iterator[str]:
    for one in fields(ServerBounds):
        assert one.default is not MISSING
        text = one.metadata["help"].replace("|", "\\|")
        yield f"| `--{one.name.replace('_', '-')}` | {_shown(one.default)} | {text} |"


def _shown(value: object) -> str:
    if not isinstance(value, int):
        return "" if value is None else f"{value:g}"
    return next((f"{value // size}{unit}" for size, unit in _UNITS if value >= size and value % size == 0), str(value))
