"""The card's own energy counter, clock and power limit.

The counter moves in ticks, about ten a second on an H200: read at both ends of a second, it is off by a tenth. So it is
watched, and a window has the power between its first tick and its last one.
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
        self._entered_s, self._last_j = time.monotonic(), self._read_j()
        if self._last_j is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._last_j is not None:
            self._thread.join()

    def used_so_far_j(self) -> float | None:
        """Joules used since it was entered, as `used_j` has them."""
        return self.used_j(self._entered_s, time.monotonic())

    def used_j(self, start_s: float, stop_s: float) -> float | None:
        """Joules used between two times of `time.monotonic`; None without a counter, or without two ticks near it."""
        ticks = list(self._ticks)
        if len(ticks) < 2:
            return None
        inside = [tick for tick in ticks if start_s <= tick[0] <= stop_s]
        if len(inside) > 1 and inside[-1][0] - inside[0][0] >= _SPANNED * (stop_s - start_s):
            first_s, last_s = inside[0][0], inside[-1][0]
        else:
            # What lies before all ticks, or after them, has the power of what lies between.
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
    """Watches a device, as torch names it; of a CPU nothing is known."""
    # Commands that only read what was measured do without it.
    import torch

    watched = torch.device(device)
    if watched == torch.device("cuda"):
        # The thread that watches has a current device of its own.
        watched = torch.device("cuda", torch.cuda.current_device())
    return EnergySampler(lambda: gpu_energy_j(watched))


def gpu_energy_j(device: torch.device | str) -> float | None:
    """Joules that a GPU has used since its driver was loaded; None if `ask_gpu` has none or it has no such counter."""
    millijoules = ask_gpu(device, lambda nvml, card: nvml.nvmlDeviceGetTotalEnergyConsumption(card))
    return None if millijoules is None else millijoules / 1e3


def gpu_clock_mhz(device: torch.device | str) -> float | None:
    """Clock of a GPU's multiprocessors now; None if `ask_gpu` has none."""
    clock_mhz = ask_gpu(device, lambda nvml, card: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM))
    return None if clock_mhz is None else float(clock_mhz)


def gpu_power_limit_w(device: torch.device | str) -> float | None:
    """Watts that a GPU may draw; None if `ask_gpu` has none."""
    limit_mw = ask_gpu(device, lambda nvml, card: nvml.nvmlDeviceGetEnforcedPowerLimit(card))
    return None if limit_mw is None else limit_mw / 1e3
