"""The card's own energy counter. It ticks coarsely: use windows of a second or more."""

from __future__ import annotations

import importlib.util


def gpu_energy_j(index: int = 0) -> float | None:
    """Joules that a GPU has used since its driver was loaded; None without NVML, a GPU or such a counter."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except pynvml.NVMLError:
        return None
