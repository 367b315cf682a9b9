"""The file that a benchmark writes: what it found, and on which machine with which software."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nanoflow.bench.machine import detect_machine, detect_software


def write_document(path: Path, benchmark: str, **found: Any) -> None:
    """Write what can be written as JSON.

    Args:
        path: The file, replaced if it is there.
        benchmark: Its name.
        found: Everything else, by key.
    """
    document = {
        "benchmark": benchmark,
        "machine": dataclasses.asdict(detect_machine()),
        "software": dataclasses.asdict(detect_software()),
        **found,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
