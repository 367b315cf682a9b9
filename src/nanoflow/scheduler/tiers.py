"""What lies below the device's KV pages: the interface that the scheduler uses, and `NoTiers` for an engine without.

`lower_tiers.py` has the real one, with host memory and disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanoflow.batch import Int32
from nanoflow.kvcache.copies import PageCopies
from nanoflow.kvcache.pages import PagePool
from nanoflow.kvcache.tier_counts import TierCounts
from nanoflow.scheduler.key_events import KeyEvents, NoKeyEvents


@dataclass(frozen=True, slots=True, kw_only=True)
class Below:
    """What lower tiers have of a prefix.

    Attributes:
        num_pages: Full pages of it that the device could have after a load; 0 if a load would not be worth it.
        is_loading: Pages of it are being loaded just now.
    """

    num_pages: int = 0
    is_loading: bool = False


NOTHING = Below()


class Tiers(Protocol):
    """Saves pages that were computed, and loads pages for requests in the queue."""

    @property
    def is_on(self) -> bool:
        """Whether there is a tier at all: pages of completions then get keys while their request runs."""

    @property
    def is_loading(self) -> bool:
        """Whether pages are on their way to the device."""

    @property
    def counts(self) -> Mapping[str, TierCounts]:
        """Of each tier below the device, by its name."""

    def save(self, keys: Sequence[bytes], parts: Sequence[tuple[int, Int32]], *, is_computed: bool) -> None:
        """Keep the content of pages.

        Args:
            keys: Of consecutive pages of a sequence.
            parts: For each KV group the first of them that is on the device, and the pages from there on (int32 [any]).
            is_computed: The batches that compute them have been formed before; else the batch that is being formed
                does.
        """

    def find(self, keys: Sequence[bytes], num_cached: int) -> Below:
        """What is there of a prefix with these keys, of which the device has `num_cached` pages."""

    def start_load(self, keys: Sequence[bytes], num_spare: int) -> bool:
        """Load what the device lacks of this prefix, unless that has begun; False if it is not there, or no room is.

        Args:
            keys: Of its pages.
            num_spare: Pages of each pool that stay free.
        """

    def use(self, keys: Sequence[bytes]) -> None:
        """A request with this prefix has ended: its pages were used just now; the first should stay longest."""

    def forget(self, keys: Iterable[bytes]) -> None:
        """What is under these keys may be wrong."""

    def forget_all(self) -> None:
        """Nothing is to be used again."""

    def watch(self, events: KeyEvents | NoKeyEvents) -> None:
        """Tell these which pages lower tiers have, and which the device has after a load."""

    def note_iteration(self, num_tokens: int, time_s: float) -> None:
        """An iteration with so many tokens took so long: what computing a prefix again would cost follows."""

    def take_copies(self) -> Sequence[PageCopies]:
        """What is to be copied now, in this order: after the batches that have been launched, before the next is."""

    def note_copied(self, number: int, time_s: float) -> None:
        """Copies that were taken are done; they took so long, without what they waited for."""

    def idle(self) -> bool:
        """There are no requests: keep more in lower tiers. True if there is more of that to do soon."""

    def check_integrity(self) -> None:
        """Raise RuntimeError if the tiers contradict themselves."""

    def close(self) -> None:
        """Keep what should outlive the engine."""


def counts_of_all(
    tiers: Tiers, pools: Sequence[PagePool], page_bytes: Sequence[int], *, queries: int, hits: int
) -> dict[str, TierCounts]:
    """What each tier of the KV cache has done, the device first.

    Args:
        tiers: What is below the device.
        pools: Of the device, one of each KV group.
        page_bytes: Bytes of a page of each; empty if unknown, and then the device has 0 bytes.
        queries, hits: Tokens that were looked for on the device, and found.
    """
    device = TierCounts(
        queries=queries,
        hits=hits,
        evictions=sum(pool.num_evicted for pool in pools),
        capacity_bytes=sum(pool.num_pages * size for pool, size in zip(pools, page_bytes, strict=False)),
        used_bytes=sum(pool.num_filled * size for pool, size in zip(pools, page_bytes, strict=False)),
    )
    return {"device": device, **tiers.counts}


class NoTiers:
    """Nothing is below the device."""

    is_on = is_loading = False
    counts: Mapping[str, TierCounts] = {}

    def save(self, keys: Sequence[bytes], parts: Sequence[tuple[int, Int32]], *, is_computed: bool) -> None:
        """See `Tiers`."""

    def find(self, keys: Sequence[bytes], num_cached: int) -> Below:
        """See `Tiers`."""
        del keys, num_cached
        return NOTHING

    def start_load(self, keys: Sequence[bytes], num_spare: int) -> bool:
        """See `Tiers`."""
        del keys, num_spare
        return False

    def use(self, keys: Sequence[bytes]) -> None:
        """See `Tiers`."""

    def forget(self, keys: Iterable[bytes]) -> None:
        """See `Tiers`."""

    def forget_all(self) -> None:
        """See `Tiers`."""

    def watch(self, events: KeyEvents | NoKeyEvents) -> None:
        """See `Tiers`."""

    def note_iteration(self, num_tokens: int, time_s: float) -> None:
        """See `Tiers`."""

    def take_copies(self) -> Sequence[PageCopies]:
        """See `Tiers`."""
        return ()

    def note_copied(self, number: int, time_s: float) -> None:
        """See `Tiers`."""

    def idle(self) -> bool:
        """See `Tiers`."""
        return False

    def check_integrity(self) -> None:
        """See `Tiers`."""

    def close(self) -> None:
        """See `Tiers`."""
