"""The card's own energy counter and clock. The counter ticks coarsely: use windows of a second or more."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any


def gpu_energy_j(index: int = 0) -> float | None:
    """Joules that a GPU has used since its driver was loaded; None without NVML, a GPU or such a counter."""
    millijoules = _ask(index, lambda nvml, handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    return None if millijoules is None else millijoules / 1e3


def gpu_clock_mhz(index: int = 0) -> float | None:
    """Clock of a GPU's multiprocessors now; None without NVML or a GPU."""
    return _ask(index, lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))


def _ask(index: int, question: Callable[[Any, Any], Any]) -> float | None:
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return float(question(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)))
    except pynvml.NVMLError:
        return None
