"""Handle SIGINT and SIGTERM: after the first signal the server ends in an orderly way, after the second at once."""

from __future__ import annotations

import asyncio
import signal


class StopSignals:
    """Handles both signals from now on, in the running event loop.

    Attributes:
        first, second: Set after one signal, and after two.
    """

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._take)

    def _take(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def ignore_stop_signals() -> None:
    """Ignore both signals, in a process that its parent ends.

    A service manager signals the whole process group. The parent handles that: it lets running requests end first.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
