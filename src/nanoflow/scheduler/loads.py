"""Pages on their way between the device and lower tiers: the records of `lower_tiers.py`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from nanoflow.batch import Int32

# A prefix is loaded for so many times without being used; then it is computed.
_MOST_ATTEMPTS = 3
_NUM_REMEMBERED = 4096


class Attempts:
    """How often prefixes were loaded since they were last used."""

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    def note(self, key: bytes) -> None:
        """One more load of the prefix that ends with this key."""
        self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > _NUM_REMEMBERED:
            self._counts.popitem(last=False)

    def are_over(self, key: bytes) -> bool:
        """Whether the prefix that ends with this key was loaded often enough."""
        return self._counts.get(key, 0) >= _MOST_ATTEMPTS

    def forget(self, keys: Iterable[bytes]) -> None:
        """Prefixes that end with these keys have been used."""
        for key in keys:
            self._counts.pop(key, None)


@dataclass(slots=True, kw_only=True)
class Load:
    """Pages on their way to the device, in G KV groups.

    Attributes:
        keys: For each group those of its pages.
        pages: For each group the reserved pages of the device, int32 [any].
        slots: For each group the slots of host memory, held until the load ends.
        num_tokens: Of the prefix, those that need not be computed thanks to this load.
        disk_bytes: Bytes of pages that are read from the disk.
        start_s: When it was asked for.
        load_s: Time for reading from the disk and for copying.
        is_void: What arrives is not to be used.
    """

    keys: tuple[tuple[bytes, ...], ...]
    pages: tuple[Int32, ...]
    slots: tuple[list[int], ...]
    num_tokens: int
    disk_bytes: int
    start_s: float
    load_s: float = 0.0
    is_void: bool = False


@dataclass(slots=True)
class Saves:
    """Pages to save in one KV group: pages of the device and slots of host memory, as many."""

    pages: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
