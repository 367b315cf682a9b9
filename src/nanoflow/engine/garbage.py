"""Keep the garbage collector from going through all objects of torch and transformers between two tokens."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def freeze_heap() -> None:
    """Exclude all objects that exist now from garbage collection, in a process that only serves from now on.

    The modules of transformers and torch are some 300,000 objects. A full collection goes through all of them in
    0.15 s, now and then between two tokens.
    """
    gc.collect()
    gc.freeze()


# A program that freezes its heap freezes its modules, tens of thousands of objects. Fewer are the interpreter's
# own: Python 3.12 begins with some 400.
_OWN_FREEZE = 5000


@contextmanager
def heap_left_alone() -> Iterator[None]:
    """Exclude all objects that exist when the block begins from garbage collection, until the block ends.

    This is for a process that is not ours alone. If the program has frozen its heap itself, nothing is changed, since
    its frozen objects could not be told from ours.
    """
    if gc.get_freeze_count() > _OWN_FREEZE:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
