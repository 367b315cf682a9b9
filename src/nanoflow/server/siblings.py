"""Start, watch, restart and end the further front ends, from the server's main process.

A front end that ends by itself is restarted. Its listening socket stays open here meanwhile, so connections wait for
the new process instead of failing. Requests of other front ends are not affected. After `MAX_RESTARTS` restarts within
`RESTARTS_WITHIN_S` seconds the server stops, since the cause is then permanent.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.child import end_of
from nanoflow.engine.errors import EngineError
from nanoflow.engine.place import EnginePlace
from nanoflow.server.answering import STREAM_END_TIMEOUT_S
from nanoflow.server.front_end import DRAIN, DRAINED, JOIN, LOSE, READY, STOP, Setup
from nanoflow.server.lasting import LastingEngine

logger = logging.getLogger(__name__)

FRONT_END_MODULE = "nanoflow.server.front_end"
MAX_RESTARTS = 8
RESTARTS_WITHIN_S = 600.0
_CLOSE_GRACE_S = STREAM_END_TIMEOUT_S + 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all further front ends share; see `front_end.Setup`.

    Attributes:
        engine: The socket where they connect to the engine.
        engine_config, server_config: Those of the main process.
        counts: File descriptor of the rows of cells in which all count; the first row is the main process's.
    """

    engine: EnginePlace
    engine_config: EngineConfig
    server_config: ServerConfig
    counts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sibling:
    """A further front end: its number, its row of cells, its process, its socket, and what it has reported."""

    number: int
    row: int
    process: Process
    listener: socket.socket
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)
    is_drained: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, command: bytes) -> None:
        """Send a command; does nothing if the process has ended."""
        assert self.process.stdin is not None
        with suppress(OSError, RuntimeError):
            self.process.stdin.write(command)


class Siblings:
    """The further front ends of a server, one for each listener. Made by `start`."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._living: dict[int, _Sibling] = {}
        self._hearing: set[asyncio.Task[None]] = set()
        self._next_number = 1
        self._restarts_s: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._is_draining = False

    @classmethod
    async def start(cls, surroundings: Surroundings, listeners: Sequence[socket.socket]) -> Siblings:
        """Start a process for each listener; they wait for the engine."""
        siblings = cls(surroundings)
        try:
            for row, listener in enumerate(listeners, start=1):
                await siblings._start_one(row, listener)
        except BaseException:
            await siblings.close()
            raise
        return siblings

    async def ready(self) -> None:
        """Wait until all answer.

        Raises:
            EngineError: One cannot start.
        """
        await asyncio.gather(*(_ready(sibling) for sibling in self._living.values()))

    async def watch(self, engine: LastingEngine) -> None:
        """Restart front ends that end, and have the engine drop their requests, until the server drains.

        Raises:
            EngineError: They have ended too often.
        """
        ends = {asyncio.create_task(self._end(sibling)) for sibling in self._living.values()}
        try:
            while True:
                if not ends:
                    await asyncio.Event().wait()
                done, ends = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    sibling = await self._replace(engine, task.result())
                    if sibling is not None:
                        ends.add(asyncio.create_task(self._end(sibling)))
        finally:
            for task in ends:
                task.cancel()

    def lose_engine(self) -> None:
        """Tell all that the engine has died: they end their requests, and refuse new ones until `join_engine`."""
        self._tell(LOSE)

    def join_engine(self) -> None:
        """Tell all to join the next engine, which runs now."""
        self._tell(JOIN)

    def drain(self) -> None:
        """Tell all to refuse new calls. From now on those that end are not restarted."""
        self._is_draining = True
        self._tell(DRAIN)

    async def drained(self) -> None:
        """Wait until all have reported after `drain` that no call is running, or have ended."""
        await asyncio.gather(*(sibling.is_drained.wait() for sibling in self._living.values()))

    def _tell(self, command: bytes) -> None:
        for sibling in self._living.values():
            sibling.tell(command)

    async def close(self) -> None:
        """End all, by force if they take too long, and close their listeners, so that new connections are refused."""
        for sibling in self._living.values():
            sibling.listener.close()
        self._tell(STOP)
        processes = [sibling.process for sibling in self._living.values()]
        ends = [asyncio.create_task(process.wait()) for process in processes]
        if ends:
            await asyncio.wait(ends, timeout=_CLOSE_GRACE_S)
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*ends, *self._hearing)

    async def _start_one(self, row: int, listener: socket.socket) -> _Sibling:
        around, number = self._surroundings, self._next_number
        self._next_number += 1
        # In a session of its own, Ctrl-C in the terminal does not reach the process: the parent ends it.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", FRONT_END_MODULE),
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=[listener.fileno(), around.counts, *around.engine.fds],
            start_new_session=True,
        )
        sibling = self._living[number] = _Sibling(number=number, row=row, process=process, listener=listener)
        self._hearing.add(hearing := asyncio.create_task(_hear(sibling), name="sibling"))
        hearing.add_done_callback(self._hearing.discard)
        setup = Setup(
            number=number,
            engine_path=around.engine.path,
            engine_config=around.engine_config,
            server_config=around.server_config,
            listener=listener.fileno(),
            counts=around.counts,
            row=row,
        )
        sibling.tell(setup.to_line())
        return sibling

    async def _end(self, sibling: _Sibling) -> _Sibling:
        await sibling.process.wait()
        return sibling

    async def _replace(self, engine: LastingEngine, sibling: _Sibling) -> _Sibling | None:
        if self._is_draining:
            return None
        engine.current.forget(sibling.number)
        del self._living[sibling.number]
        end = end_of(sibling.process.returncode or 0)
        now_s = time.monotonic()
        if len(self._restarts_s) == MAX_RESTARTS and now_s - self._restarts_s[0] < RESTARTS_WITHIN_S:
            times = f"{MAX_RESTARTS + 1} times in {RESTARTS_WITHIN_S / 60:.0f} minutes"
            raise EngineError(f"a front end {end}; this has happened {times}, so the server stops")
        self._restarts_s.append(now_s)
        logger.warning("front end %d %s; its requests are lost, and it is started again", sibling.number, end)
        return await self._start_one(sibling.row, sibling.listener)


async def _hear(sibling: _Sibling) -> None:
    """Read the reports of a front end until it has ended."""
    assert sibling.process.stdout is not None
    said = {READY: sibling.is_ready, DRAINED: sibling.is_drained}
    async for line in sibling.process.stdout:
        if line in said:
            said[line].set()
    sibling.is_drained.set()


async def _ready(sibling: _Sibling) -> None:
    """Wait until a front end answers; EngineError if it ends before."""
    ready, ended = asyncio.create_task(sibling.is_ready.wait()), asyncio.create_task(sibling.process.wait())
    try:
        await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise EngineError(f"a front end could not start: its process {end_of(ended.result())}")
    finally:
        ready.cancel()
        ended.cancel()
