"""Writes the record of a benchmark: its results, the command, and the machine and software that it ran on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from nanoflow.bench.provenance import header


def write_document(path: Path, benchmark: str, /, **found: Any) -> None:
    """Write a record as JSON, completely or not at all.

    Args:
        path: The file; replaced if it exists.
        benchmark: Name of the benchmark.
        found: Results, by key.
    """
    write_json(path, {**header(benchmark), **found})


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON. The file is replaced in one step, so that readers never see a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
    new.replace(path)
