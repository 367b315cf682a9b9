"""Where an engine and its front ends meet: a listening Unix socket, made before the engine's process and kept after it.

The process that starts the engine makes the place and passes the listening socket to the engine's process. If the
engine dies, the next one gets the same socket: front ends connect to the same place, and wait in its queue until an
engine is there. On Linux the socket's file is removed at once, and front ends reach it through a file descriptor that
they inherit: nothing is left in the file system, however the processes end, and no other process can connect. On other
systems the file stays, in a folder that only its owner may enter, until the place is closed. `link.py` and `channel.py`
send messages.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

# Connections that may wait for an engine; each front end has one.
_BACKLOG = 128


class EnginePlace:
    """A listening socket for one engine at a time. Close it when no further engine will be started.

    Attributes:
        path: Path that a front end connects to, in this process and in those that inherit `fds`.
        fds: File descriptors that a further front end must inherit.
    """

    def __init__(self) -> None:
        self._folder: Path | None = Path(tempfile.mkdtemp(prefix="nanoflow-"))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        file = self._folder / "engine"
        self.path: str = str(file)
        self.fds: tuple[int, ...] = ()
        try:
            self._listener.bind(self.path)
            self._listener.listen(_BACKLOG)
            if sys.platform == "linux":
                self._hide(file)
        except BaseException:
            self.close()
            raise

    @property
    def listener(self) -> int:
        """File descriptor that the engine's process inherits; `channel.Channel` takes it."""
        return self._listener.fileno()

    def close(self) -> None:
        """Stop listening, and remove all files."""
        self._listener.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = ()
        self._remove_folder()

    def _hide(self, file: Path) -> None:
        """Remove the socket's file but keep a descriptor of it, through which front ends connect by a path in /proc."""
        fd = os.open(file, os.O_PATH)
        self.path, self.fds = f"/proc/self/fd/{fd}", (fd,)
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
