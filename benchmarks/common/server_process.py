"""A server under test, ours or another one, as a process: its start, CPU time, memory and end.

`engine/serving.py` and the benchmarks in `robustness/` send it requests. CPU time and memory are those of the process
and all of its descendants, from /proc.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.05
_STOP_S = 60.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ServerFailed(Exception):
    """The server did not start; the message is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answers.

    Attributes:
        url: Its base address, which ends in /v1.
        pid: Process id of its main process; None if unknown.
        start_s: Seconds from its start to its first answer; None if it ran before.
    """

    url: str
    pid: int | None = None
    start_s: float | None = None


@contextmanager
def started(command: Sequence[str], port: int, timeout_s: float, log: Path | None = None) -> Iterator[Server]:
    """Context in which a server runs.

    Args:
        command: Command that starts it, with the port among its arguments.
        port: Its port on this machine.
        timeout_s: Seconds that its start may take.
        log: File for its output; discarded if None.

    Raises:
        ServerFailed: It ended, or did not answer in time.
    """
    many_files()
    begin_s = time.monotonic()
    with (
        Path(os.devnull if log is None else log).open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process, begin_s + timeout_s)
            yield Server(url=f"http://127.0.0.1:{port}/v1", pid=process.pid, start_s=time.monotonic() - begin_s)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then kill what is left of its session, which has only its processes."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], deadline_s: float) -> None:
    """Wait until /health is answered with status 200.

    Raises:
        ServerFailed: The server ended, or the deadline has passed.
    """
    while not _answers(f"{url}/health"):
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with status {process.returncode} before it answered")
        if time.monotonic() > deadline_s:
            raise ServerFailed(f"the server did not answer at {url}/health in time")
        time.sleep(_POLL_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def free_port() -> int:
    """A port of this machine on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def many_files() -> None:
    """Raise the limit on open files, and so on connections, of this process and its children to the system's."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a tree of processes uses: CPU seconds since its start, and resident memory now."""

    cpu_s: float
    rss_bytes: int


def usage_of(pid: int) -> Usage:
    """Usage of a process and all of its descendants. CPU time includes children that have ended."""
    trees = _children()
    cpu_s, rss_bytes, waiting = 0.0, 0, [pid]
    while waiting:
        each = waiting.pop()
        waiting += trees.get(each, [])
        fields = _stat(each)
        # Fields 14 to 17 of proc(5) are user and system time, own and of children; 24 is the resident set in pages.
        cpu_s += sum(map(int, fields[11:15])) / _TICKS_PER_S if fields else 0.0
        rss_bytes += int(fields[21]) * _PAGE_BYTES if fields else 0
    return Usage(cpu_s=cpu_s, rss_bytes=rss_bytes)


def _children() -> dict[int, list[int]]:
    """Process ids of the children of every process."""
    found: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and (fields := _stat(int(path.name))):
            found.setdefault(int(fields[1]), []).append(int(path.name))
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may contain anything; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []
