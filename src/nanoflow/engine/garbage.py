"""What the garbage collector is kept from: going through all of torch and transformers between two tokens."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def freeze_heap() -> None:
    """Let the collector leave alone what is loaded by now, in a process that serves from here on.

    The modules of transformers and torch are some 300,000 objects. A full collection goes through all of them, which
    takes 0.15 s, and would come every now and then between two tokens.
    """
    gc.collect()
    gc.freeze()


# A program that freezes its heap freezes its modules, tens of thousands of objects. Fewer are the interpreter's
# own: Python 3.12 begins with some 400.
_OWN_FREEZE = 5000


@contextmanager
def heap_left_alone() -> Iterator[None]:
    """Let the collector leave alone, for as long as this lasts, what there is when it begins.

    For a process that is not ours alone: afterwards all is as before. Where the program has frozen its heap itself,
    nothing is changed, since what is frozen cannot be told apart.
    """
    if gc.get_freeze_count() > _OWN_FREEZE:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
