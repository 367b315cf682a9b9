"""The host's memory: how much this process can still use, and bounds on the caches of libraries.

Free memory is the least of what the machine, the container and the limits of the process leave. The bounds are set
once, before the first matrix product; environment variables set by the user take precedence. `kernels/cpu.py` keeps the
number of different product shapes small, which makes the bound on oneDNN's cache sufficient.
"""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from pathlib import Path

_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# oneDNN caches a compiled kernel for each shape of product: 0.75 MB each, 1,024 by default. We need 240: five products
# of a layer and of the logits in 48 numbers of rows. A kernel that was dropped is compiled again in about 1 ms.
_MAX_PRIMITIVES = 256
# Constant of malloc.h. An arena keeps memory that was freed in it; by default there may be eight for each core.
_M_ARENA_MAX = -8
_MAX_ARENAS = 2

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_NEVER_OVERCOMMIT = "2"


def bound_host_memory() -> None:
    """Set the bounds for this process, in the libraries that have them."""
    os.environ.setdefault(_CAPACITY, str(_MAX_PRIMITIVES))
    if "MALLOC_ARENA_MAX" not in os.environ:
        # C libraries other than glibc lack this function, or give memory back by themselves.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _MAX_ARENAS)


def free_host_bytes() -> int:
    """Bytes of memory that this process can still allocate."""
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
    """Total memory in bytes of the machine, or of the container."""
    limit = _text(_CGROUP / "memory.max")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, int(limit)) if limit.isdecimal() else physical


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    lines = (line.split() for line in _text(_PROC / "meminfo").splitlines())
    return {name.rstrip(":"): int(number) * 1024 for name, number, *_ in lines}


def _reclaimable_bytes() -> int:
    """Bytes of the container's page cache, which the system frees when memory is needed."""
    lines = (line.split() for line in _text(_CGROUP / "memory.stat").splitlines())
    return next((int(number) for name, number in lines if name == "inactive_file"), 0)


def _text(file: Path) -> str:
    """Text of a system file; empty if it does not exist."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
