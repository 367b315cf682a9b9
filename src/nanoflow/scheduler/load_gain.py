"""Whether loading a prefix is faster than computing it: from measured rates of both.

Knows neither pages nor requests; `lower_tiers.py` asks.
"""

from __future__ import annotations

# Before anything has been measured: a copy over PCIe of the fourth generation, and a small model on a fast GPU. Where
# both are wrong the first loads and iterations correct them.
_LOAD_BYTES_PER_S = 20e9
_COMPUTE_S_PER_TOKEN = 20e-6
# What a load takes beside the copy: it is queued behind the batches on their way.
_LOAD_OVERHEAD_S = 200e-6
# Weight of the latest measurement.
_NEWEST = 0.2
# Iterations of fewer tokens say nothing of how fast a long prompt is computed.
_LEAST_TOKENS = 32


class LoadGain:
    """Compares the time to load tokens with the time to compute them."""

    def __init__(self) -> None:
        self._bytes_per_s = _LOAD_BYTES_PER_S
        self._s_per_token = _COMPUTE_S_PER_TOKEN

    def is_worth(self, num_tokens: int, num_bytes: int) -> bool:
        """Whether so many tokens, whose pages have so many bytes, are there sooner by a load."""
        return _LOAD_OVERHEAD_S + num_bytes / self._bytes_per_s < num_tokens * self._s_per_token

    def note_iteration(self, num_tokens: int, time_s: float) -> None:
        """An iteration with so many tokens took so long."""
        if num_tokens >= _LEAST_TOKENS and time_s > 0:
            self._s_per_token += _NEWEST * (time_s / num_tokens - self._s_per_token)

    def note_load(self, num_bytes: int, time_s: float) -> None:
        """A load of so many bytes took so long."""
        if time_s > 0:
            rate = num_bytes / max(time_s - _LOAD_OVERHEAD_S, time_s / 2)
            self._bytes_per_s += _NEWEST * (rate - self._bytes_per_s)
