"""The file that a benchmark writes: what it found, by which command, on which machine with which software."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from nanoflow.bench.provenance import header


def write_document(path: Path, benchmark: str, **found: Any) -> None:
    """Write what can be written as JSON, whole or not at all.

    Args:
        path: The file, replaced if it is there.
        benchmark: Its name.
        found: Everything else, by key.
    """
    write_json(path, {**header(benchmark), **found})


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON; who reads the file meanwhile has the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
    new.replace(path)
