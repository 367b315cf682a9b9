"""Processes that use a store of KV pages on disk and are killed: what they were told is what the next one finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_some_dozens_of_kills(tmp_path: Path) -> None:
    """`benchmarks/robustness/disk_kills.py` says what is checked; it forks, so it has a process of its own."""
    options = ["--kills", "36", "--max-life-s", "0.06", "--folder", str(tmp_path), "--seed", str(os.getpid())]
    command = [sys.executable, "-m", "benchmarks.robustness.disk_kills", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "36 kills" in ended.stdout and ", 0 with problems" in ended.stdout
    assert "'stored': 0" not in ended.stdout, "victims must have done something"
