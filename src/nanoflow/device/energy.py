"""The card's own energy counter and clock.

The counter moves in ticks, about ten a second on an H200: read at both ends of a second, it is off by a tenth. So it is
watched, and a window has the power between its first tick and its last one.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# Between two readings, a fraction of a tick.
_INTERVAL_S = 0.02
# Ticks in a window stand for it if they span this part of it.
_SPANNED = 0.5


class EnergySampler:
    """Watches an energy counter while it is entered, so that any part of that time can be asked for.

    Args:
        read_j: The counter in joules; None if there is none.
        interval_s: Seconds between two readings.
    """

    def __init__(self, read_j: Callable[[], float | None], interval_s: float = _INTERVAL_S) -> None:
        self._read_j = read_j
        self._interval_s = interval_s
        # When the counter was seen to have moved, and to where.
        self._ticks: list[tuple[float, float]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)

    def __enter__(self) -> EnergySampler:
        self._last_j = self._read_j()
        if self._last_j is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._last_j is not None:
            self._thread.join()

    def used_j(self, start_s: float, stop_s: float) -> float | None:
        """Joules used between two times of `time.monotonic`; None without a counter, or if it did not move twice."""
        ticks = list(self._ticks)
        if len(ticks) < 2:
            return None
        inside = [tick for tick in ticks if start_s <= tick[0] <= stop_s]
        if len(inside) > 1 and inside[-1][0] - inside[0][0] >= _SPANNED * (stop_s - start_s):
            (first_s, first_j), (last_s, last_j) = inside[0], inside[-1]
            return (last_j - first_j) / (last_s - first_s) * (stop_s - start_s)
        start_j, stop_j = np.interp((start_s, stop_s), *np.array(ticks).T)
        return float(stop_j - start_j)

    def _watch(self) -> None:
        while not self._is_over.wait(self._interval_s):
            now_j = self._read_j()
            if now_j is not None and now_j != self._last_j:
                self._ticks.append((time.monotonic(), now_j))
                self._last_j = now_j


def gpu_energy(index: int | None) -> EnergySampler:
    """Watches a GPU's counter; for None, no GPU, it knows of no energy."""
    return EnergySampler(lambda: None if index is None else gpu_energy_j(index))


def gpu_energy_j(index: int = 0) -> float | None:
    """Joules that a GPU has used since its driver was loaded; None without NVML, a GPU or such a counter."""
    millijoules = _ask(index, lambda nvml, handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    return None if millijoules is None else millijoules / 1e3


def gpu_clock_mhz(index: int = 0) -> float | None:
    """Clock of a GPU's multiprocessors now; None without NVML or a GPU."""
    return _ask(index, lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))


def _ask(index: int, question: Callable[[Any, Any], Any]) -> float | None:
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return float(question(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
    except nvml.NVMLError:
        return None


@functools.cache
def _nvml() -> Any:
    """NVML, ready for questions; None without it."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
