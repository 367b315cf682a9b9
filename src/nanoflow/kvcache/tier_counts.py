"""What each tier of the KV cache has done since the start, for metrics. Tiers count; `server/metrics.py` shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

# The names of tiers in metrics, the fastest first.
TIERS = ("device", "host", "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCounts:
    """One tier; all but the last two fields only grow.

    Attributes:
        queries: Tokens that were looked for here: by requests, or because a faster tier did not have them.
        hits: Tokens of them that were found here.
        stored_bytes, loaded_bytes: Copied to this tier from a faster one, and from here to a faster one. The device
            computes what it stores, so both are 0 there.
        load_seconds: Time that the copies of `loaded_bytes` took.
        evictions: Pages whose memory was needed for others, in all KV groups.
        losses: Those of them that a slower tier was to have and did not have yet.
        capacity_bytes, used_bytes: Memory of this tier, and how much of it holds keys and values that can be used, or
            that running requests hold.
    """

    queries: int = 0
    hits: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    evictions: int = 0
    losses: int = 0
    capacity_bytes: int = 0
    used_bytes: int = 0

    def __add__(self, other: TierCounts) -> TierCounts:
        """The sums of all fields."""
        names = [field.name for field in fields(self)]
        return TierCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def counters(self) -> TierCounts:
        """The fields that only grow; the memory that was used is free."""
        return replace(self, used_bytes=0, capacity_bytes=0)


# Fields that only grow.
COUNTERS = ("queries", "hits", "stored_bytes", "loaded_bytes", "load_seconds", "evictions", "losses")


def total(counts: Iterable[TierCounts]) -> TierCounts:
    """The sums over several tiers."""
    return sum(counts, TierCounts())
