"""Runs modules of tests that compile for Hopper, each in a process of its own without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def compiled(module: str, *arguments: str) -> list[Any]:
    """What each line says that the module prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
