"""Send the log messages of an engine's process, while it loads, to the front end that started it, which logs them.

So the log of a server is in one place and has one level.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nanoflow.engine.messages import Told

_ROOT = "nanoflow"


class _Teller(logging.Handler):
    """Sends log messages as `Told`."""

    def __init__(self, send: Callable[[Told], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(Told(level=record.levelno, text=record.getMessage()))


@contextmanager
def told(send: Callable[[Told], None]) -> Iterator[None]:
    """While the block runs, pass log messages of this process from level INFO on to `send`, and nowhere else."""
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
