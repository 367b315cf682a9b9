"""Counts of a tier of the KV cache, for statistics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCounts:
    """Counts since the start, and what is there now.

    Attributes:
        queries: Tokens of prefixes that were looked for here, as no faster tier had them.
        hits: Those of them that were there.
        stored_bytes, loaded_bytes: Copied here, and from here to the next faster tier.
        load_seconds: Time from the request to load pages to their being loaded.
        evictions: Pages that had to go.
        capacity_bytes, used_bytes: Room there is, and room that is in use.
    """

    queries: int = 0
    hits: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    evictions: int = 0
    capacity_bytes: int = 0
    used_bytes: int = 0
