"""A server in a process of its own, on a free loopback port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

_READY = re.compile(r"nanoflow serves .* at (https?://\S+)/v1")


@dataclass(slots=True)
class ServerProcess:
    """A running server.

    Attributes:
        process: The process; its stderr is joined to stdout.
        lines: Its output so far.
        root_url: Such as http://127.0.0.1:40123, without /v1; empty until the server is ready.
    """

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    root_url: str = ""

    def wait_ready(self, timeout_s: float) -> None:
        """Wait for the line that names the address."""
        deadline_s = time.monotonic() + timeout_s
        while not self.root_url:
            found = [match for line in self.lines if (match := _READY.match(line))]
            if found:
                self.root_url = found[0][1]
            elif self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("the server did not get ready:\n" + "".join(self.lines))
            else:
                time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        """Send a signal and wait for the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def watch(self) -> None:
        """Collect lines in a thread until the process closes its output."""
        assert self.process.stdout is not None
        threading.Thread(target=self.lines.extend, args=(self.process.stdout,), daemon=True).start()


def start_server(*arguments: str) -> ServerProcess:
    """Start `nanoflow serve` with arguments; does not wait until it is ready."""
    return launch(sys.executable, "-m", "nanoflow", "serve", *arguments)


def launch(*command: str, **variables: str) -> ServerProcess:
    """Start a server command with additional environment variables; does not wait until it is ready."""
    environment = {**os.environ, **variables}
    server = ServerProcess(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    )
    server.watch()
    return server


@contextmanager
def running_server(
    arguments: Sequence[str] = ("default",), *, ready_timeout_s: float = 120.0
) -> Iterator[ServerProcess]:
    """A server that is ready; it is stopped at the end."""
    server = start_server(*arguments, "--port", "0")
    try:
        server.wait_ready(ready_timeout_s)
        yield server
    finally:
        try:
            server.stop()
        except subprocess.TimeoutExpired:
            server.process.kill()
            raise
