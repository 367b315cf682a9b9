"""Where the server's processes log to: standard error, a line a message, from the level that was asked for on."""

from __future__ import annotations

import logging

from nanoflow.engine.quiet_log import log_quietly


class _LineFormatter(logging.Formatter):
    """Says who speaks; how grave it is only where it is more than news."""

    def __init__(self, speaker: str) -> None:
        super().__init__(f"{speaker}: %(message)s")
        self._graver = logging.Formatter(f"{speaker}: %(levelname)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) if record.levelno == logging.INFO else self._graver.format(record)


def start_logging(level: str, speaker: str = "nanoflow") -> None:
    """Let this process's messages from a level on be read.

    Args:
        level: debug, info, warning or error.
        speaker: Begins each line.
    """
    log_quietly(speaker)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_LineFormatter(speaker))
    logging.getLogger("nanoflow").setLevel(level.upper())
