"""What SIGINT and SIGTERM mean to the server: the first asks it to end in good order, the second to end at once."""

from __future__ import annotations

import asyncio
import signal


class StopSignals:
    """Listens to both signals from now on, in the running event loop.

    Attributes:
        first, second: Set when so many have come.
    """

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._take)

    def _take(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def ignore_stop_signals() -> None:
    """Leave both to the parent, in a process whose end is the parent's to decide.

    Whoever stops a whole group of processes at once, as service managers do, means the parent, which lets running
    requests end first.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
