"""A further front end in a process of its own: `python -m nanoflow.server.front_end`.

It answers HTTP at the server's port and uses the same engine. The server's main process starts it and writes a `Setup`
to its standard input, then one line for each command: the engine has died, another one runs, refuse new calls, stop. On
its standard output it reports that it answers and, after the command to refuse new calls, that none is running any
more. It ignores SIGINT and SIGTERM, which the main process handles, and ends when its standard input does.
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
from nanoflow.server.answering import STREAM_END_TIMEOUT_S, answer
from nanoflow.server.counters import Counters
from nanoflow.server.event_loop import run_loop
from nanoflow.server.gate import DRAINING, Gate, restarting
from nanoflow.server.lasting import LastingEngine
from nanoflow.server.logs import start_logging
from nanoflow.server.signals import ignore_stop_signals

# Lines from the main process.
LOSE, JOIN, DRAIN, STOP = b"lose\n", b"join\n", b"drain\n", b"stop\n"
# Lines from the front end.
READY, DRAINED = b"ready\n", b"drained\n"
# How long the process may take for an orderly end when its parent has ended.
_ORPHAN_GRACE_S = STREAM_END_TIMEOUT_S + 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a further front end is told at its start.

    Attributes:
        number: Number of the front end, from 1; each is used once.
        engine_path: Path of the engine's socket; see `place.py`.
        engine_config, server_config: Those of the main process.
        listener: File descriptor of a bound socket.
        counts: File descriptor of the rows of cells in which all front ends count.
        row: The row of this front end.
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
    """Executes the commands of the main process, and joins each engine that it starts.

    Attributes:
        stop: Set when the process has to end.
        gate: Decides whether calls are admitted.
        first: Future of the first engine that was joined; EngineError if that fails.
    """

    def __init__(self, setup: Setup) -> None:
        self.stop, self.gate = asyncio.Event(), Gate()
        self.first: asyncio.Future[LastingEngine] = asyncio.get_running_loop().create_future()
        self._setup = setup
        self._engine: LastingEngine | None = None
        self._joining = asyncio.create_task(self._join())
        self._draining: asyncio.Task[None] | None = None

    async def obey(self, commands: asyncio.Queue[bytes]) -> None:
        """Execute the commands of the main process, one after the other."""
        while True:
            match await commands.get():
                case command if command == LOSE:
                    await self._lose()
                case command if command == JOIN and not self._joining.done():
                    pass  # `first` waits for this engine already
                case command if command == JOIN and (self._engine is None or not self._engine.is_alive):
                    self._joining = asyncio.create_task(self._join())
                case command if command == DRAIN:
                    self.gate.close(DRAINING)
                    self._draining = asyncio.create_task(self._say_drained())
                case command if command == STOP:
                    self.stop.set()

    async def close(self) -> None:
        """End the tasks in the background."""
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
                    is_main=False,
                    on_ready=_say_ready,
                )
    finally:
        for task in (obeying, stopped):
            task.cancel()
        await front_end.close()


def _say_ready() -> None:
    os.write(1, READY)


def _hear_parent(loop: asyncio.AbstractEventLoop, commands: asyncio.Queue[bytes]) -> None:
    """Pass on the parent's lines until it has ended: only it holds the other end of the pipe, which closes with it."""
    while line := _read_line():
        with suppress(RuntimeError):  # the loop has ended by itself
            loop.call_soon_threadsafe(commands.put_nowait, line)
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(commands.put_nowait, STOP)
    threading.Event().wait(_ORPHAN_GRACE_S)
    os._exit(1)


def _read_line() -> bytes:
    """The next line of standard input, without reading further; empty at its end."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


def main() -> int:
    """Run a front end; return the exit status."""
    ignore_stop_signals()
    line = _read_line()
    if not line:
        return 1
    setup = msgspec.json.decode(line, type=Setup)
    start_logging(setup.server_config.log_level, f"nanoflow front end {setup.number}")
    try:
        run_loop(_serve(setup))
    except EngineError:
        return 1  # the main process gets the same error, and reports it
    return 0


if __name__ == "__main__":
    sys.exit(main())
