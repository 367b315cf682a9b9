"""Ctrl-C where it is ignored at first: in what a shell starts in the background, and in all that this starts."""

from __future__ import annotations

import subprocess
import sys

SHOW = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
IN_A_TEST = f"""
import tests.conftest, subprocess, sys
{SHOW}
subprocess.run([sys.executable, "-c", {SHOW!r}], check=True)
"""
IN_A_SESSION = f"""
import sys
from benchmarks import session
session.run = lambda *_, **__: [session.run_command([sys.executable, "-c", {SHOW!r}], {{}}, 60)] and []
session.main(["--out", sys.argv[1]])
"""


def lines_with_interrupts_ignored(program: str, *arguments: str) -> list[str]:
    """What it prints when it is started as in the background of a script."""
    ignored = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", ignored, sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()


def test_a_process_in_the_background_ignores_ctrl_c() -> None:
    """So the tests below can fail."""
    assert lines_with_interrupts_ignored(SHOW) == ["False"]


def test_tests_and_what_they_start_can_be_interrupted() -> None:
    assert lines_with_interrupts_ignored(IN_A_TEST) == ["True", "True"]


def test_a_measuring_session_in_the_background_can_end_what_it_starts(tmp_path: object) -> None:
    """It tells its pieces to end as Ctrl-C does: killed, they would leave engines behind."""
    assert lines_with_interrupts_ignored(IN_A_SESSION, str(tmp_path))[0] == "True"
