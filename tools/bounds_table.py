"""The tables of options in docs/bounds.md and docs/batches.md, from the options themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from nanoflow.batch_options import BatchServerOptions
from nanoflow.bounds import ServerBounds

_UNITS = ((2**20, "M"), (2**10, "K"))


def bounds_table() -> str:
    """One row an option."""
    return _table(fields(ServerBounds))


def batches_table() -> str:
    """One row an option of the batch API."""
    inherited = {one.name for one in fields(ServerBounds)}
    return _table(one for one in fields(BatchServerOptions) if one.name not in inherited)


def _table(options: Iterable[Field[Any]]) -> str:
    return "\n".join(["| option | default | what |", "|---|---|---|", *_rows(options)])


def _rows(options: Iterable[Field[Any]]) -> Iterator[str]:
    for one in options:
        assert one.default is not MISSING
        text = one.metadata["help"].replace("|", "\\|")
        yield f"| `--{one.name.replace('_', '-')}` | {_shown(one.default)} | {text} |"


def _shown(value: object) -> str:
    if not isinstance(value, int):
        return "" if value is None else f"{value:g}"
    return next((f"{value // size}{unit}" for size, unit in _UNITS if value >= size and value % size == 0), str(value))
