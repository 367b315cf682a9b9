"""A further front end in a process of its own: `python -m nanoflow.server.front_end`.

It answers HTTP at the server's port for the same engine. The server's main process starts it with a `Setup` on standard
input and then tells it there, a line each, that the engine was lost, that another one runs, to take nothing new, and to
stop. On its standard output it says that it answers, and that nothing runs any more after it was told to take nothing
new. It leaves SIGINT and SIGTERM to the main process, and ends when standard input does.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.errors import EngineError
from nanoflow.server.answering import STREAM_END_TIMEOUT_S, answer, run_loop
from nanoflow.server.counters import Counters
from nanoflow.server.gate import DRAINING, Gate, restarting
from nanoflow.server.lasting import LastingEngine
from nanoflow.server.logs import start_logging
from nanoflow.server.signals import ignore_stop_signals

# Said by the main process.
LOSE, JOIN, DRAIN, STOP = b"lose\n", b"join\n", b"drain\n", b"stop\n"
# Said by the front end.
READY, DRAINED = b"ready\n", b"drained\n"
# How long a process may take to end in good order when its parent is gone.
_ORPHAN_GRACE_S = STREAM_END_TIMEOUT_S + 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a further front end must know.

    Attributes:
        number: Its number, from 1, not used before.
        engine_path: What it connects to; see `place.py`.
        engine_config, server_config: Those of the main process.
        listener: File descriptor of a bound socket.
        counts: File descriptor of the rows where all front ends count.
        row: Which of them is its own.
    """

    number: int
    engine_path: str
    engine_config: EngineConfig
    server_config: ServerConfig
    listener: int
    counts: int
    row: int

    def to_line(self) -> bytes:
        """As one line of JSON."""
        return msgspec.json.encode(self) + b"\n"


class FrontEnd:
    """Obeys the main process, and keeps to the engine that runs.

    Attributes:
        stop: Set when it has to end.
        gate: Who is let in.
        first: Becomes the engine, once one has been joined; EngineError if none can be.
    """

    def __init__(self, setup: Setup) -> None:
        self.stop, self.gate = asyncio.Event(), Gate()
        self.first: asyncio.Future[LastingEngine] = asyncio.get_running_loop().create_future()
        self._setup = setup
        self._engine: LastingEngine | None = None
        self._joining = asyncio.create_task(self._join())
        self._draining: asyncio.Task[None] | None = None

    async def obey(self, commands: asyncio.Queue[bytes]) -> None:
        """Do what the main process says, one thing after the other."""
        while True:
            match await commands.get():
                case command if command == LOSE:
                    await self._lose()
                case command if command == JOIN and not self._joining.done():
                    pass  # it waits for this very engine
                case command if command == JOIN and (self._engine is None or not self._engine.is_alive):
                    self._joining = asyncio.create_task(self._join())
                case command if command == DRAIN:
                    self.gate.close(DRAINING)
                    self._draining = asyncio.create_task(self._say_drained())
                case command if command == STOP:
                    self.stop.set()

    async def close(self) -> None:
        """End what goes on beside the answers."""
        tasks = [task for task in (self._joining, self._draining) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _join(self) -> None:
        setup = self._setup
        interval_s = setup.server_config.stream_interval_ms / 1000
        try:
            joined = await AsyncEngine.join(setup.engine_path, setup.number, setup.engine_config, interval_s=interval_s)
        except EngineError as error:
            if not self.first.done():
                self.first.set_exception(error)
            self.stop.set()  # the main process is told the same, or starts another front end
            return
        if self._engine is None:
            self._engine = LastingEngine(joined)
            self.first.set_result(self._engine)
        else:
            self._engine.replace(joined)
        self.gate.open()

    async def _lose(self) -> None:
        self._joining.cancel()
        await asyncio.gather(self._joining, return_exceptions=True)
        if self._engine is not None:
            facts = self._engine.facts
            self.gate.close(restarting(facts.load_s + facts.warm_up_s))
            await self._engine.current.close("the engine died")

    async def _say_drained(self) -> None:
        await self.gate.empty()
        os.write(1, DRAINED)


async def _serve(setup: Setup) -> None:
    commands: asyncio.Queue[bytes] = asyncio.Queue()
    front_end = FrontEnd(setup)
    threading.Thread(
        target=_hear_parent, args=(asyncio.get_running_loop(), commands), name="parent watch", daemon=True
    ).start()
    obeying, stopped = asyncio.create_task(front_end.obey(commands)), asyncio.create_task(front_end.stop.wait())
    try:
        await asyncio.wait((front_end.first, stopped), return_when=asyncio.FIRST_COMPLETED)
        if front_end.first.done():
            counters = Counters(setup.counts, setup.row)
            with socket.socket(fileno=setup.listener) as listener:
                await answer(
                    front_end.first.result(),
                    setup.server_config,
                    listener,
                    front_end.stop,
                    gate=front_end.gate,
                    counters=counters,
                    logs_stats=False,
                    on_ready=_say_ready,
                )
    finally:
        for task in (obeying, stopped):
            task.cancel()
        await front_end.close()


def _say_ready() -> None:
    os.write(1, READY)


def _hear_parent(loop: asyncio.AbstractEventLoop, commands: asyncio.Queue[bytes]) -> None:
    """Hand on what the parent says, until it is gone: only it holds the other end, which closes however it ends."""
    while line := _read_line():
        with suppress(RuntimeError):  # the loop has ended by itself
            loop.call_soon_threadsafe(commands.put_nowait, line)
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(commands.put_nowait, STOP)
    threading.Event().wait(_ORPHAN_GRACE_S)
    os._exit(1)


def _read_line() -> bytes:
    """The next line of standard input, without taking more; empty at its end."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


def main() -> int:
    """Run a front end."""
    ignore_stop_signals()
    line = _read_line()
    if not line:
        return 1
    setup = msgspec.json.decode(line, type=Setup)
    start_logging(setup.server_config.log_level, f"nanoflow front end {setup.number}")
    try:
        run_loop(_serve(setup))
    except EngineError:
        return 1  # the main process is told the same, and says so
    return 0


if __name__ == "__main__":
    sys.exit(main())
