"""The options of what lies below the device's KV pages: which values make sense together.

`config.py` has the options, `engine/tier_memory.py` follows them.
"""

from __future__ import annotations

import math

from nanoflow.option import ConfigError


def check_tiers(host_gib: float | None, folder: str | None, disk_gib: float, *, has_prefix_cache: bool) -> None:
    """Check kv_host_gib, kv_dir and kv_disk_gib.

    Raises:
        ConfigError: A size is no size, or one option makes no sense without another.
    """
    for name, value in (("kv_host_gib", host_gib), ("kv_disk_gib", disk_gib)):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be a number of GiB, at least 0, got {value}")
    if folder is not None and host_gib == 0:
        raise ConfigError("kv_dir needs host memory for pages on their way to the disk: raise kv_host_gib")
    if (folder is not None or host_gib) and not has_prefix_cache:
        raise ConfigError("kv_host_gib and kv_dir keep pages of the prefix cache: do not switch it off")


def check_sessions(max_sessions: object) -> None:
    """Check max_sessions; ConfigError if it is not a whole number from 0."""
    if isinstance(max_sessions, bool) or not isinstance(max_sessions, int) or max_sessions < 0:
        raise ConfigError(f"max_sessions must be a whole number from 0, got {max_sessions!r}")
