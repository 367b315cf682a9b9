"""The engine's process as the one sees it that starts it: start, watch and end it.

Knows nothing of what the messages mean: see `async_engine.py`. What runs in it is `process.py`.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from nanoflow.engine.link import EngineLink
from nanoflow.engine.messages import Shutdown

ENGINE_MODULE = "nanoflow.engine.process"
STDERR = 2


class EngineChild:
    """A child process and the link to it, in a folder that nobody else may enter. Made by `start`.

    Attributes:
        path: File of the engine's socket, for further front ends.
        link: To the engine, as front end 0.
    """

    def __init__(self, process: Process, folder: Path, path: str, link: EngineLink) -> None:
        self.path = path
        self.link = link
        self._process = process
        self._folder = folder
        self._exited = asyncio.ensure_future(process.wait())

    @classmethod
    async def start(cls, module: str = ENGINE_MODULE) -> EngineChild:
        """Start a process; it waits for its first message.

        Args:
            module: What to run, as by `python -m`, with the path of the socket as its argument.
        """
        folder = Path(tempfile.mkdtemp(prefix="nanoflow-"))
        path = str(folder / "engine")
        link = EngineLink(path)
        try:
            # Of a session of its own, Ctrl-C in the terminal does not reach it: its end is the parent's to decide. Its
            # standard input closes when the parent ends, however that happens.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, path), stdin=PIPE, stdout=STDERR, start_new_session=True
            )
        except BaseException:
            _remove(link, folder)
            raise
        return cls(process, folder, path, link)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    async def end(self) -> str:
        """Wait until the process has ended; how it did, for people."""
        return f"the engine's process {end_of(await asyncio.shield(self._exited))}"

    async def close(self, grace_s: float) -> None:
        """Ask the child to end, end it if it has not after so long, and remove the socket."""
        try:
            self.link.send(Shutdown())
            await asyncio.wait((self._exited,), timeout=grace_s)
        finally:
            if not self._exited.done():
                self._process.kill()
            await self._exited
            _remove(self.link, self._folder)


def _remove(link: EngineLink, folder: Path) -> None:
    link.close()
    shutil.rmtree(folder, ignore_errors=True)


def end_of(status: int) -> str:
    """How a process ended, for people."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
