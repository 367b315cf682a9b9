"""A log that never blocks: a thread writes the lines, and lines that it cannot write in time are dropped.

Standard error may be a pipe that nobody reads. Writing a line to it directly would block the process, with its event
loop and its handling of signals.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time

MAX_WAITING_LINES = 1000
# How long a process that ends waits until its last lines are written.
FLUSH_S = 1.0


class QuietHandler(logging.Handler):
    """Passes lines to a thread that writes them.

    Args:
        file: Descriptor to write to. It is written to directly, because a blocked thread that holds the lock of a
            Python file would keep the process from ending.
        max_waiting: Lines that may wait; further ones are dropped and counted.
    """

    def __init__(self, file: int = 2, max_waiting: int = MAX_WAITING_LINES) -> None:
        super().__init__()
        self.num_dropped = 0
        self._file = file
        self._lines: queue.Queue[str] = queue.Queue(max_waiting)
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record for writing; never blocks."""
        try:
            line = self.format(record)
        except Exception:
            line = f"{record.levelname}: a message that cannot be formatted"
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.num_dropped += 1

    def flush(self) -> None:
        """Wait up to `FLUSH_S` seconds until queued lines are written."""
        end_s = time.monotonic() + FLUSH_S
        while self._lines.unfinished_tasks and time.monotonic() < end_s:
            time.sleep(0.005)

    def _write_all(self) -> None:
        num_told = 0
        while True:
            line = self._lines.get()
            if self.num_dropped > num_told and self._lines.empty():
                line += f"\n({self.num_dropped - num_told} lines of the log were dropped: nobody read them in time)"
                num_told = self.num_dropped
            self._write(line + "\n")
            self._lines.task_done()

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except BlockingIOError:
            self.num_dropped += 1
        except OSError:  # its reader has closed it: there is nowhere to report that
            return


def log_quietly(prefix: str) -> None:
    """Log warnings and errors of this process through a `QuietHandler`, in place of all other handlers.

    Args:
        prefix: Name of the process, put before each line.
    """
    logging.basicConfig(
        format=f"{prefix}: %(levelname)s: %(message)s", level=logging.WARNING, handlers=[QuietHandler()], force=True
    )
