"""A further front end in a process of its own: `python -m nanoflow.server.front_end`.

It answers HTTP at the server's port for the same engine. The server's main process starts it with a `Setup` on standard
input and learns from its standard output that it answers; it ends when standard input does, or at SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.errors import EngineError
from nanoflow.engine.quiet_log import log_quietly
from nanoflow.server.answering import STREAM_END_TIMEOUT_S, answer, run_loop, stop_at_signals
from nanoflow.server.cells import Cells

READY = b"ready\n"
# How long a process may take to end in good order when its parent is gone.
_ORPHAN_GRACE_S = STREAM_END_TIMEOUT_S + 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a further front end must know.

    Attributes:
        number: Its number, from 1, not used before.
        engine_path: File of the engine's socket.
        engine_config, server_config: Those of the main process.
        listener: File descriptor of a bound socket.
        counts: Folder where all front ends count.
    """

    number: int
    engine_path: str
    engine_config: EngineConfig
    server_config: ServerConfig
    listener: int
    counts: str

    def to_line(self) -> bytes:
        """As one line of JSON."""
        return msgspec.json.encode(self) + b"\n"


async def _serve(setup: Setup) -> None:
    stop = stop_at_signals()
    threading.Thread(
        target=_stop_with_parent,
        args=(asyncio.get_running_loop(), stop, setup.counts),
        name="parent watch",
        daemon=True,
    ).start()
    interval_s = setup.server_config.stream_interval_ms / 1000
    join = AsyncEngine.join(setup.engine_path, setup.number, setup.engine_config, interval_s=interval_s)
    starting, stopped = asyncio.create_task(join), asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    cells = Cells(Path(setup.counts), str(setup.number))
    with socket.socket(fileno=setup.listener) as listener:
        await answer(starting.result(), setup.server_config, listener, stop, cells=cells, on_ready=_say_ready)


def _say_ready() -> None:
    os.write(1, READY)


def _stop_with_parent(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, counts: str) -> None:
    """Wait for the end of standard input, a pipe that only the parent holds: it closes however the parent ends."""
    while os.read(0, 1):
        pass
    shutil.rmtree(counts, ignore_errors=True)
    with suppress(RuntimeError):  # the loop has ended by itself
        loop.call_soon_threadsafe(stop.set)
    threading.Event().wait(_ORPHAN_GRACE_S)
    os._exit(1)


def _read_line() -> bytes:
    """The first line of standard input, without taking more."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(1)
        line += byte
    return bytes(line)


def main() -> int:
    """Run a front end."""
    setup = msgspec.json.decode(_read_line(), type=Setup)
    log_quietly(f"nanoflow front end {setup.number}")
    try:
        run_loop(_serve(setup))
    except EngineError:
        return 1  # the main process is told the same, and says so
    return 0


if __name__ == "__main__":
    sys.exit(main())
