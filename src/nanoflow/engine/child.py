"""Start, watch and end the engine's process, from the process that starts it.

The engine's process runs `process.py`. Its messages are handled in `async_engine.py`. What this file needs to talk to
the process is imported when it runs: it takes seconds to import torch, and they should begin at once.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from typing import TYPE_CHECKING

from nanoflow.engine.place import EnginePlace

if TYPE_CHECKING:
    from nanoflow.engine.link import EngineLink

ENGINE_MODULE = "nanoflow.engine.process"
STDERR = 2
# An engine that is asked to end is killed after so long: an idle one ends at once, one with a disk writes pages first.
GRACE_S, DISK_GRACE_S = 10.0, 45.0


class EngineChild:
    """The engine's process and the link to it. Made by `start`.

    Attributes:
        link: Socket to the engine, as front end 0.
        grace_s: How long `close` waits.
    """

    def __init__(self, process: Process, link: EngineLink, own_place: EnginePlace | None) -> None:
        self.link = link
        self.grace_s = GRACE_S
        self._process = process
        self._own_place = own_place
        self._exited = asyncio.ensure_future(process.wait())

    @classmethod
    async def start(cls, module: str = ENGINE_MODULE, place: EnginePlace | None = None) -> EngineChild:
        """Start a process; it waits for its first message.

        Args:
            module: Module to run, as by `python -m`, with the file descriptor of its socket as its argument.
            place: Where front ends connect. Without one, the process gets a place that is closed with it.
        """
        own_place = EnginePlace() if place is None else None
        place = place or own_place
        assert place is not None
        try:
            # In a session of its own, Ctrl-C in the terminal does not reach the process: the parent ends it. Its
            # standard input closes when the parent ends in any way, which tells the process to end.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, str(place.listener)),
                stdin=PIPE,
                stdout=STDERR,
                pass_fds=[place.listener],
                start_new_session=True,
            )
        except BaseException:
            if own_place is not None:
                own_place.close()
            raise
        from nanoflow.engine.link import EngineLink

        return cls(process, EngineLink(place.path), own_place)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    async def end(self) -> str:
        """Wait until the process has ended; return a phrase that says how."""
        return f"the engine's process {end_of(await asyncio.shield(self._exited))}"

    async def close(self, grace_s: float | None = None) -> None:
        """Ask the process to end, kill it if it still runs after `grace_s` seconds, and close the link to it.

        Args:
            grace_s: `self.grace_s` if not given.
        """
        from nanoflow.engine.messages import Shutdown

        try:
            self.link.send(Shutdown())
            await asyncio.wait((self._exited,), timeout=self.grace_s if grace_s is None else grace_s)
        finally:
            if not self._exited.done():
                self._process.kill()
            await self._exited
            self.link.close()
            if self._own_place is not None:
                self._own_place.close()


def end_of(status: int) -> str:
    """How a process with this exit status ended, as the end of a sentence."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
