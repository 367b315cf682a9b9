"""What an engine's process says while it loads: log messages go to the front end that started it, which logs them.

So whoever starts a server reads them in one place, from the level on that was asked for there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nanoflow.engine.messages import Told

_ROOT = "nanoflow"


class _Teller(logging.Handler):
    """Sends messages on."""

    def __init__(self, send: Callable[[Told], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(Told(level=record.levelno, text=record.getMessage()))


@contextmanager
def told(send: Callable[[Told], None]) -> Iterator[None]:
    """Hand on the messages of this process, news and graver ones, while the block runs; they appear nowhere else."""
    logger, teller = logging.getLogger(_ROOT), _Teller(send)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(teller)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(teller)
        logger.setLevel(level)
        logger.propagate = propagates
