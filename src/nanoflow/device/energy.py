"""The GPU's energy counter, clock and power limit.

The counter advances in ticks, about ten a second on an H200. Read only at both ends of a second, it would be off by a
tenth. So it is sampled, and the power of a window is that between its first and its last tick.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from nanoflow.device.nvml import ask_gpu

if TYPE_CHECKING:
    import torch

# Seconds between two readings: a fraction of a tick.
_INTERVAL_S = 0.02
# The ticks of a window must span this part of it; else ticks around it are used too.
_SPANNED = 0.5


class EnergySampler:
    """A context manager that samples an energy counter, so that the energy of any part of that time can be computed.

    Args:
        read_j: Reads the counter in joules; None if there is none.
        interval_s: Seconds between two readings.
    """

    def __init__(self, read_j: Callable[[], float | None], interval_s: float = _INTERVAL_S) -> None:
        self._read_j = read_j
        self._interval_s = interval_s
        # Times at which the counter was seen to advance, and its values.
        self._ticks: list[tuple[float, float]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)

    def __enter__(self) -> EnergySampler:
        self._entered_s, self._last_j = time.monotonic(), self._read_j()
        if self._last_j is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._last_j is not None:
            self._thread.join()

    def used_so_far_j(self) -> float | None:
        """Joules since entering, computed as in `used_j`."""
        return self.used_j(self._entered_s, time.monotonic())

    def used_j(self, start_s: float, stop_s: float) -> float | None:
        """Joules between two times of `time.monotonic`; None without a counter, or without two ticks near them."""
        ticks = list(self._ticks)
        if len(ticks) < 2:
            return None
        inside = [tick for tick in ticks if start_s <= tick[0] <= stop_s]
        if len(inside) > 1 and inside[-1][0] - inside[0][0] >= _SPANNED * (stop_s - start_s):
            first_s, last_s = inside[0][0], inside[-1][0]
        else:
            # Time before the first tick and after the last one is given the mean power between them.
            first_s, last_s = max(start_s, ticks[0][0]), min(stop_s, ticks[-1][0])
        if last_s <= first_s:
            return None
        first_j, last_j = np.interp((first_s, last_s), *np.array(ticks).T)
        return float((last_j - first_j) / (last_s - first_s) * (stop_s - start_s))

    def _watch(self) -> None:
        while not self._is_over.wait(self._interval_s):
            now_j = self._read_j()
            if now_j is not None and now_j != self._last_j:
                self._ticks.append((time.monotonic(), now_j))
                self._last_j = now_j


def energy_of(device: torch.device | str) -> EnergySampler:
    """A sampler for a device, as torch names it; that of a CPU has no counter."""
    # Imported late: commands that only read results do not need torch.
    import torch

    watched = torch.device(device)
    if watched == torch.device("cuda"):
        # The current device differs by thread, and sampling runs in another thread.
        watched = torch.device("cuda", torch.cuda.current_device())
    return EnergySampler(lambda: gpu_energy_j(watched))


def gpu_energy_j(device: torch.device | str) -> float | None:
    """Joules used by a GPU since its driver was loaded; None if `ask_gpu` returns None or it has no such counter."""
    millijoules = ask_gpu(device, lambda nvml, card: nvml.nvmlDeviceGetTotalEnergyConsumption(card))
    return None if millijoules is None else millijoules / 1e3


def gpu_clock_mhz(device: torch.device | str) -> float | None:
    """Clock of a GPU's SMs now, in MHz; None if `ask_gpu` returns None."""
    clock_mhz = ask_gpu(device, lambda nvml, card: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM))
    return None if clock_mhz is None else float(clock_mhz)


def gpu_power_limit_w(device: torch.device | str) -> float | None:
    """Power limit of a GPU in watts; None if `ask_gpu` returns None."""
    limit_mw = ask_gpu(device, lambda nvml, card: nvml.nvmlDeviceGetEnforcedPowerLimit(card))
    return None if limit_mw is None else limit_mw / 1e3
