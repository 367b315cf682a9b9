"""Memory, open files and threads of processes and their descendants, read from /proc.

Without /proc the results are empty. `record.py` and the benchmarks under `benchmarks/` use this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_KIB = 1024
_LISTENING = "0A"
# A part of the command line of a process, and the role that it stands for.
_ROLES: Mapping[str, str] = {
    "nanoflow.engine.process": "engine",
    "nanoflow.server.front_end": "front end",
    "template_process": "template",
    "grammar_process": "grammar",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """A process at one moment.

    Attributes:
        pid: Process id.
        role: "engine", "front end", "template" or "grammar", else "main".
        rss_bytes, peak_rss_bytes: Resident memory, now and at its peak.
        peak_virtual_bytes: Peak of the address space. Reserved memory is not used, but counts against a limit.
        num_threads, num_files: Present numbers of threads and open files.
    """

    pid: int
    role: str
    rss_bytes: int
    peak_rss_bytes: int
    peak_virtual_bytes: int
    num_threads: int
    num_files: int


def processes_of(pids: Iterable[int]) -> list[ProcessState]:
    """These processes and their running descendants, in order of their ids; ended ones are left out."""
    children = _children()
    waiting, found = list(pids), set[int]()
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, ())
    states = (state_of(pid) for pid in sorted(found))
    return [state for state in states if state is not None]


def state_of(pid: int) -> ProcessState | None:
    """The state of a process; None if it does not exist or this user may not read it."""
    try:
        lines = (_PROC / str(pid) / "status").read_text().splitlines()
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        command = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        num_files = sum(1 for _ in (_PROC / str(pid) / "fd").iterdir())
        return ProcessState(
            pid=pid,
            role=next((role for mark, role in _ROLES.items() if mark in command), "main"),
            rss_bytes=int(fields["VmRSS"][0]) * _KIB,
            peak_rss_bytes=int(fields["VmHWM"][0]) * _KIB,
            peak_virtual_bytes=int(fields["VmPeak"][0]) * _KIB,
            num_threads=int(fields["Threads"][0]),
            num_files=num_files,
        )
    # A process that has ended but was not waited for has no memory fields.
    except (OSError, LookupError, ValueError):
        return None


def listeners_at(port: int) -> list[int]:
    """The processes of this machine that listen at a TCP port, as far as this user may see them."""
    inodes = {inode for name in ("tcp", "tcp6") for inode in _listening_inodes(_PROC / "net" / name, port)}
    sockets = {f"socket:[{inode}]" for inode in inodes}
    return [pid for pid in _pids() if sockets & _targets(pid)] if sockets else []


def _listening_inodes(table: Path, port: int) -> Iterable[str]:
    with suppress(OSError):
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            # Local address, state and inode are fields 2, 4 and 10 of proc_net_tcp(5).
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def _targets(pid: int) -> set[str]:
    """Targets of the open files of a process; empty if this user may not read them."""
    found = set[str]()
    with suppress(OSError):
        for entry in (_PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                found.add(str(entry.readlink()))
    return found


def _children() -> dict[int, list[int]]:
    """The children of every process."""
    found: dict[int, list[int]] = {}
    for pid in _pids():
        with suppress(OSError, LookupError, ValueError):
            # Field 4 of proc(5) is the parent. The name before it may contain blanks and brackets.
            parent = (_PROC / str(pid) / "stat").read_text().rpartition(") ")[2].split()[1]
            found.setdefault(int(parent), []).append(pid)
    return found


def _pids() -> list[int]:
    return [int(path.name) for path in _PROC.iterdir() if path.name.isdecimal()] if _PROC.is_dir() else []
