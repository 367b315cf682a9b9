"""Whether loading a prefix is faster than computing it: from measured rates of both.

Host memory and disk have a rate each. Where a rate says that loads are not worth it, one is tried now and then: the
disk may have been slow for a moment only. Knows neither pages nor requests; `lower_tiers.py` asks.
"""

from __future__ import annotations

from collections.abc import Callable

# Before anything has been measured: a copy over PCIe of the fourth generation, a server's disk, and a small model on a
# fast GPU. Where they are wrong the first loads and iterations correct them.
_HOST_S_PER_BYTE = 1 / 20e9
_DISK_S_PER_BYTE = 1 / 2e9
_COMPUTE_S_PER_TOKEN = 20e-6
# What a load takes beside the copy: it is queued behind the batches on their way.
_LOAD_OVERHEAD_S = 200e-6
# Weight of the latest measurement.
_NEWEST = 0.2
# Iterations of fewer tokens say nothing of how fast a long prompt is computed.
_LEAST_TOKENS = 32
# A tier that is not worth it is tried again after so long.
_RETRY_S = 10.0


class LoadGain:
    """Compares the time to load tokens with the time to compute them.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._s_per_token = _COMPUTE_S_PER_TOKEN
        self._host, self._disk = _HOST_S_PER_BYTE, _DISK_S_PER_BYTE
        self._tried_s = clock()

    def is_worth(self, num_tokens: int, host_bytes: int, disk_bytes: int) -> bool:
        """Whether so many tokens are there sooner by a load of their pages, of which so many bytes are in each tier."""
        load_s = _LOAD_OVERHEAD_S + host_bytes * self._host + disk_bytes * self._disk
        if load_s < num_tokens * self._s_per_token:
            return True
        if self._clock() < self._tried_s + _RETRY_S:
            return False
        self._tried_s = self._clock()
        return True

    def note_iteration(self, num_tokens: int, time_s: float) -> None:
        """An iteration with so many tokens took so long."""
        if num_tokens >= _LEAST_TOKENS and time_s > 0:
            self._s_per_token += _NEWEST * (time_s / num_tokens - self._s_per_token)

    def note_load(self, host_bytes: int, disk_bytes: int, time_s: float) -> None:
        """A load of so many bytes from each tier took so long; if any were on disk, all of that is the disk's time."""
        net_s = max(time_s - _LOAD_OVERHEAD_S, time_s / 2)
        if disk_bytes:
            self._disk += _NEWEST * (net_s / disk_bytes - self._disk)
        elif host_bytes:
            self._host += _NEWEST * (net_s / host_bytes - self._host)
