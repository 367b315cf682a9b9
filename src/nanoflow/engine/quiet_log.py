"""A log that never holds up who writes to it: a thread writes the lines, and what it cannot write in time is dropped.

Standard error may be a pipe that nobody reads. A line written to it directly would stop the process, its event loop and
its reaction to signals with it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time

MAX_WAITING_LINES = 1000
# How long a process that ends waits for its last lines.
FLUSH_S = 1.0


class QuietHandler(logging.Handler):
    """Hands lines to a thread.

    Args:
        file: Descriptor to write to; it is written to directly, so that no lock of Python's is held by a thread that
            waits while the process ends.
        max_waiting: Lines that may wait; what comes beyond is dropped and counted.
    """

    def __init__(self, file: int = 2, max_waiting: int = MAX_WAITING_LINES) -> None:
        super().__init__()
        self.num_dropped = 0
        self._file = file
        self._lines: queue.Queue[str] = queue.Queue(max_waiting)
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record; never waits."""
        try:
            line = self.format(record)
        except Exception:
            line = f"{record.levelname}: a message that cannot be formatted"
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.num_dropped += 1

    def flush(self) -> None:
        """Wait a moment until what was taken is written."""
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
        except OSError:  # closed by its reader: there is nobody to tell
            return


def log_quietly(prefix: str) -> None:
    """Send warnings and graver messages of this process through a `QuietHandler`, the only one from now on.

    Args:
        prefix: Before each line: the name of the process.
    """
    logging.basicConfig(
        format=f"{prefix}: %(levelname)s: %(message)s", level=logging.WARNING, handlers=[QuietHandler()], force=True
    )
