"""Copies of KV pages between the device and the host's memory, as data: what the scheduler asks for.

Who moves bytes (`executor/page_copies.py`) knows neither requests nor keys; who decides (`scheduler/tiers.py`) knows no
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.batch import Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCopies:
    """Pages to copy, in each of G KV groups.

    Attributes:
        number: Names these copies; each number is used once.
        is_load: From host to device; else from device to host.
        pages: G arrays int32 [N_g], pages of the group's pool on the device.
        slots: G arrays int32 [N_g], slots of the group's pool in host memory, one for each page.
    """

    number: int
    is_load: bool
    pages: tuple[Int32, ...]
    slots: tuple[Int32, ...]

    @property
    def num_pages(self) -> int:
        """Pages of all groups."""
        return sum(map(len, self.pages))

    def num_bytes(self, page_bytes: Sequence[int]) -> int:
        """Bytes to copy.

        Args:
            page_bytes: Of a page of each group.
        """
        return sum(len(pages) * size for pages, size in zip(self.pages, page_bytes, strict=True))
