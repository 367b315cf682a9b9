"""The garbage collector of a process that serves."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Let the collector leave alone what is loaded by now, in a process that serves from here on.

    The modules of transformers and torch are some 300,000 objects. A full collection goes through all of them, which
    takes 0.15 s, and would come every now and then between two tokens.
    """
    gc.collect()
    gc.freeze()
