"""Pages on their way between the device and lower tiers: the records of `lower_tiers.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.batch import Int32


@dataclass(slots=True, kw_only=True)
class Load:
    """Pages on their way to the device, in G KV groups.

    Attributes:
        keys: For each group those of its pages.
        pages: For each group the reserved pages of the device, int32 [any].
        slots: For each group the slots of host memory, held until the load ends.
        num_tokens: Of the prefix, those that need not be computed thanks to this load.
        start_s: When it was asked for.
        load_s: Time for reading from the disk and for copying.
        is_void: What arrives is not to be used.
    """

    keys: tuple[tuple[bytes, ...], ...]
    pages: tuple[Int32, ...]
    slots: tuple[list[int], ...]
    num_tokens: int
    start_s: float
    load_s: float = 0.0
    is_void: bool = False


@dataclass(slots=True)
class Saves:
    """Pages to save in one KV group: pages of the device and slots of host memory, as many."""

    pages: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
