"""Logging of the server's processes: to standard error, one line for each message."""

from __future__ import annotations

import logging

from nanoflow.engine.quiet_log import log_quietly


class _LineFormatter(logging.Formatter):
    """Begins a line with the speaker, and with the level if it is above INFO."""

    def __init__(self, speaker: str) -> None:
        super().__init__(f"{speaker}: %(message)s")
        self._graver = logging.Formatter(f"{speaker}: %(levelname)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) if record.levelno == logging.INFO else self._graver.format(record)


def start_logging(level: str, speaker: str = "nanoflow") -> None:
    """Log this process's messages from a level on.

    Args:
        level: debug, info, warning or error.
        speaker: Name at the beginning of each line.
    """
    log_quietly(speaker)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_LineFormatter(speaker))
    logging.getLogger("nanoflow").setLevel(level.upper())
