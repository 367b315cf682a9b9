"""Which cases of a sweep run: a fixed part of them, or all with NANOFLOW_ALL_CASES=1, which `make test-all` sets.

The part is the same on every machine and for every order of the cases, since it depends on their names alone. The
sweep says what must be in it.
"""

from __future__ import annotations

import os
import zlib

RUNS_ALL_CASES = os.environ.get("NANOFLOW_ALL_CASES") == "1"


def rank(name: str) -> int:
    """A number that is as good as random, and always the same for a name; a sweep takes the cases with the least."""
    return zlib.crc32(name.encode())
