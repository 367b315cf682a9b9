"""The engine's process as its parent sees it: start it, send and receive messages, end it.

Knows nothing of what the messages mean: see `async_engine.py`. The other end of the socket is `process.py`.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from zmq.asyncio import Context, Socket
from zmq.constants import PAIR

from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.messages import FromEngine, Shutdown
from nanoflow.engine.wire import ToEngine, decode_from_engine, encode

ENGINE_MODULE = "nanoflow.engine.process"
STDERR = 2
# How long a message may still be on its way when its sender has ended.
_DRAIN_S = 0.2


class EngineChild:
    """A child process and the socket to it, in a folder that nobody else may enter. Made by `start`."""

    def __init__(self, process: Process, folder: Path, context: Context, socket: Socket) -> None:
        self._process = process
        self._folder = folder
        self._context = context
        self._socket = socket
        self._exited = asyncio.ensure_future(process.wait())

    @classmethod
    async def start(cls, module: str = ENGINE_MODULE) -> EngineChild:
        """Start a process; it waits for its first message.

        Args:
            module: What to run, as by `python -m`, with the path of the socket as its argument.
        """
        folder = Path(tempfile.mkdtemp(prefix="nanoflow-"))
        context = Context()
        try:
            socket = context.socket(PAIR)
            socket.set_hwm(0)
            socket.bind(f"ipc://{folder}/engine")
            # Of a session of its own, Ctrl-C in the terminal does not reach it: its end is the parent's to decide. Its
            # standard input closes when the parent ends, however that happens.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, str(folder / "engine")),
                stdin=PIPE,
                stdout=STDERR,
                start_new_session=True,
            )
        except BaseException:
            _remove(context, folder)
            raise
        return cls(process, folder, context, socket)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Send without waiting; a child that has ended gets nothing."""
        if not self._socket.closed:
            self._socket.send_multipart(encode(message))

    async def receive(self) -> FromEngine:
        """The next message.

        Raises:
            EngineDeadError: The child has ended and all its messages have been read.
            WireError: It is no message.
        """
        frames = self._socket.recv_multipart()
        try:
            if not frames.done():
                await asyncio.wait((frames, self._exited), return_when=asyncio.FIRST_COMPLETED)
            if not frames.done():
                await asyncio.wait((frames,), timeout=_DRAIN_S)
            if not frames.done():
                raise EngineDeadError(f"the engine's process {_end_of(self._exited.result())}")
            return decode_from_engine(frames.result())
        finally:
            frames.cancel()

    async def close(self, grace_s: float) -> None:
        """Ask the child to end, end it if it has not after so long, and remove the socket."""
        try:
            self.send(Shutdown())
            await asyncio.wait((self._exited,), timeout=grace_s)
        finally:
            if not self._exited.done():
                self._process.kill()
            await self._exited
            _remove(self._context, self._folder)


def _remove(context: Context, folder: Path) -> None:
    context.destroy(linger=0)
    shutil.rmtree(folder, ignore_errors=True)


def _end_of(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
