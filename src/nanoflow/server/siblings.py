"""The further front ends as the server's main process sees them: start, watch, start again, end.

One that ends by itself is started again. Its listening socket stays open here meanwhile, so that connections wait for
the new process instead of failing, and requests of other front ends are not disturbed. Something that ends them again
and again is no accident: after `MAX_RESTARTS` in `RESTARTS_WITHIN_S` the server stops.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.child import end_of
from nanoflow.engine.errors import EngineError
from nanoflow.server.answering import STREAM_END_TIMEOUT_S
from nanoflow.server.front_end import READY, Setup

logger = logging.getLogger(__name__)

FRONT_END_MODULE = "nanoflow.server.front_end"
MAX_RESTARTS = 8
RESTARTS_WITHIN_S = 600.0
_CLOSE_GRACE_S = STREAM_END_TIMEOUT_S + 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all further front ends share; see `front_end.Setup`."""

    engine_path: str
    engine_config: EngineConfig
    server_config: ServerConfig
    counts: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sibling:
    number: int
    process: Process
    listener: socket.socket


class Siblings:
    """The further front ends of a server, one for each listener. Made by `start`."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._living: dict[int, _Sibling] = {}
        self._next_number = 1
        self._restarts_s: deque[float] = deque(maxlen=MAX_RESTARTS)

    @classmethod
    async def start(cls, surroundings: Surroundings, listeners: Sequence[socket.socket]) -> Siblings:
        """Start a process for each listener; they wait for the engine."""
        siblings = cls(surroundings)
        try:
            for listener in listeners:
                await siblings._start_one(listener)
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

    async def watch(self, engine: AsyncEngine) -> None:
        """Start again whichever ends, and have the engine forget its requests, as long as the engine lives.

        Raises:
            EngineError: That has happened too often.
        """
        ends = {asyncio.create_task(self._end(sibling)) for sibling in self._living.values()}
        try:
            while True:
                if not ends:
                    await asyncio.Event().wait()
                done, ends = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not engine.is_alive:
                        return
                    sibling = await self._replace(engine, task.result())
                    ends.add(asyncio.create_task(self._end(sibling)))
        finally:
            for task in ends:
                task.cancel()

    async def close(self) -> None:
        """End all, in good order if they can; their listeners are closed, so that new connections are refused."""
        for sibling in self._living.values():
            sibling.listener.close()
        processes = [sibling.process for sibling in self._living.values()]
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        ends = [asyncio.create_task(process.wait()) for process in processes]
        if ends:
            await asyncio.wait(ends, timeout=_CLOSE_GRACE_S)
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*ends)

    @property
    def pids(self) -> list[int]:
        """Process ids of those that live."""
        return [sibling.process.pid for sibling in self._living.values()]

    async def _start_one(self, listener: socket.socket) -> _Sibling:
        around, number = self._surroundings, self._next_number
        self._next_number += 1
        # Of a session of its own, Ctrl-C in the terminal does not reach it: its end is the parent's to decide.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", FRONT_END_MODULE),
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        sibling = self._living[number] = _Sibling(number=number, process=process, listener=listener)
        setup = Setup(
            number=number,
            engine_path=around.engine_path,
            engine_config=around.engine_config,
            server_config=around.server_config,
            listener=listener.fileno(),
            counts=str(around.counts),
        )
        assert process.stdin is not None
        process.stdin.write(setup.to_line())
        return sibling

    async def _end(self, sibling: _Sibling) -> _Sibling:
        await sibling.process.wait()
        return sibling

    async def _replace(self, engine: AsyncEngine, sibling: _Sibling) -> _Sibling:
        engine.forget(sibling.number)
        del self._living[sibling.number]
        end = end_of(sibling.process.returncode or 0)
        now_s = time.monotonic()
        if len(self._restarts_s) == MAX_RESTARTS and now_s - self._restarts_s[0] < RESTARTS_WITHIN_S:
            times = f"{MAX_RESTARTS + 1} times in {RESTARTS_WITHIN_S / 60:.0f} minutes"
            raise EngineError(f"a front end {end}; this has happened {times}, so the server stops")
        self._restarts_s.append(now_s)
        logger.warning("front end %d %s; its requests are lost, and it is started again", sibling.number, end)
        return await self._start_one(sibling.listener)


async def _ready(sibling: _Sibling) -> None:
    """Wait until a front end answers; EngineError if it ends before."""
    assert sibling.process.stdout is not None
    if await sibling.process.stdout.readline() != READY:
        raise EngineError(f"a front end could not start: its process {end_of(await sibling.process.wait())}")
