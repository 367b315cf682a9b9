"""The server's port, which several processes share, and the number of these processes."""

from __future__ import annotations

import os
import socket
import sys

from nanoflow.config import ConfigError, Goal

# Connections that may wait to be accepted; the system may have a lower limit.
BACKLOG = 4096
MAX_FRONT_ENDS = 8
# From this many cores on there is room for a second front end beside the engine.
_CORES_FOR_TWO = 8
# Cores for each front end. A loaded engine keeps three busy with its threads; short gaps need them free.
_CORES_A_FRONT_END: dict[Goal, int] = {"throughput": 3, "balanced": 4, "latency": 8}


def choose_num_front_ends(num_cores: int, goal: Goal) -> int:
    """The default number of processes that answer HTTP."""
    if num_cores < _CORES_FOR_TWO:
        return 1
    return min(num_cores // _CORES_A_FRONT_END[goal], MAX_FRONT_ENDS)


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bind(host: str, port: int, count: int = 1) -> list[socket.socket]:
    """Sockets at one address, one for each process; each refuses connections until its process listens.

    Port 0 takes a free port. On systems that distribute connections over sockets at the same port (Linux), each process
    gets a socket of its own; on others, a copy of the same socket.

    Raises:
        ConfigError: The address does not exist or is in use.
    """
    listeners: list[socket.socket] = []
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        is_shared = count > 1 and deals_connections_out()
        if is_shared:
            # A shared port could be shared with another program as well: first check that it is free.
            _bind(family, kind, address, is_shared=False).close()
        listeners.append(_bind(family, kind, address, is_shared=is_shared))
        for _ in range(count - 1):
            taken = listeners[0].getsockname()
            listeners.append(_bind(family, kind, taken, is_shared=True) if is_shared else listeners[0].dup())
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    return listeners


def deals_connections_out() -> bool:
    """True if the system distributes the connections of a port over all sockets that listen at it."""
    return sys.platform == "linux" and hasattr(socket, "SO_REUSEPORT")


def _bind(family: int, kind: int, address: object, *, is_shared: bool) -> socket.socket:
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)  # type: ignore[arg-type]
    except OSError:
        listener.close()
        raise
    return listener


def url(listener: socket.socket, *, has_tls: bool = False) -> str:
    """URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    place = f"[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{host}:{port}"
    return f"{'https' if has_tls else 'http'}://{place}"
