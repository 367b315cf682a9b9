"""How slow this machine is now: limits in seconds that tests state are those of a usual machine, times this."""

from __future__ import annotations

import time


def slowness() -> float:
    """How much slower than usual Python runs here, 1 at least: a sum takes 18 ms on a usual machine."""

    def sum_s() -> float:
        start_s = time.perf_counter()
        sum(number * number for number in range(300_000))
        return time.perf_counter() - start_s

    return max(min(sum_s() for _ in range(5)) / 0.018, 1.0)
