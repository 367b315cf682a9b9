"""The host's memory: how much of it this process may take, and bounds on what libraries keep of it unasked.

How much is free is the least that machine, container and limits of the process leave. The bounds are set once, before
the first product; what a user has set in the environment stands. Which shapes products have, so that little code of
oneDNN's is enough, is `kernels/cpu.py`'s. Knows nothing of GPUs (`detect.py`).
"""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from pathlib import Path

_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# Five products of a layer and of the logits in 48 numbers of rows are 240, 0.75 MB each; the library's own bound is
# 1,024. What is over it is made again when it is needed, in about 1 ms.
_MAX_PRIMITIVES = 256
# By malloc.h. An arena keeps what was freed in it, and by itself there may be eight for each core.
_M_ARENA_MAX = -8
_MAX_ARENAS = 2

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_NEVER_OVERCOMMIT = "2"


def bound_host_memory() -> None:
    """Set the bounds for this process; where a library has none of them, nothing happens."""
    os.environ.setdefault(_CAPACITY, str(_MAX_PRIMITIVES))
    if "MALLOC_ARENA_MAX" not in os.environ:
        # Other C libraries than glibc have no such function, or give memory back by themselves.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _MAX_ARENAS)


def free_host_bytes() -> int:
    """Bytes that this process can still have."""
    page_bytes, meminfo = os.sysconf("SC_PAGE_SIZE"), _meminfo()
    bounds = [meminfo.get("MemAvailable", page_bytes * os.sysconf("SC_PHYS_PAGES"))]
    if _text(_PROC / "sys/vm/overcommit_memory") == _NEVER_OVERCOMMIT:
        bounds.append(meminfo["CommitLimit"] - meminfo["Committed_AS"])
    limit, used = _text(_CGROUP / "memory.max"), _text(_CGROUP / "memory.current")
    if limit.isdecimal() and used.isdecimal():
        bounds.append(int(limit) - int(used) + _reclaimable_bytes())
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        taken = _text(_PROC / "self/statm").partition(" ")[0] or "0"
        bounds.append(address_space - int(taken) * page_bytes)
    return max(min(bounds), 0)


def total_host_bytes() -> int:
    """Bytes of memory that the machine has, or the container."""
    limit = _text(_CGROUP / "memory.max")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, int(limit)) if limit.isdecimal() else physical


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    lines = (line.split() for line in _text(_PROC / "meminfo").splitlines())
    return {name.rstrip(":"): int(number) * 1024 for name, number, *_ in lines}


def _reclaimable_bytes() -> int:
    """Pages of files that a container holds, which the system takes back when they are needed."""
    lines = (line.split() for line in _text(_CGROUP / "memory.stat").splitlines())
    return next((int(number) for name, number in lines if name == "inactive_file"), 0)


def _text(file: Path) -> str:
    """What a file of the system says; nothing if it is not there."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
