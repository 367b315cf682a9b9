"""Ctrl-C while a call computes: it takes effect between two iterations."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_deferred() -> Iterator[Callable[[], None]]:
    """Defer Ctrl-C in the block; yields a function that raises KeyboardInterrupt if Ctrl-C was pressed.

    So an iteration is never interrupted halfway. Outside the main thread, or if the program handles Ctrl-C itself,
    nothing is changed.
    """
    pending: list[int] = []

    def raise_if_interrupted() -> None:
        if pending:
            raise KeyboardInterrupt

    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield raise_if_interrupted
        return
    signal.signal(signal.SIGINT, lambda number, _frame: pending.append(number))
    try:
        yield raise_if_interrupted
        raise_if_interrupted()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
