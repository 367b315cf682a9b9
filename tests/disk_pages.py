"""Stores of made-up pages in files: small, and with contents that their keys foretell."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow.kvcache.disk import DiskTier
from nanoflow.kvcache.segments import Bytes

# One with a gap behind each page, one without.
PAGE_BYTES = (5000, 4096)
WAIT_S = 10.0


def key_of(number: int | str) -> bytes:
    """The key of a page."""
    return hashlib.sha256(str(number).encode()).digest()


def page_of(group: int, key: bytes, page_bytes: Sequence[int] = PAGE_BYTES) -> Bytes:
    """What is in the page of a key, uint8 [page_bytes of the group]: nothing of another key or group is alike."""
    text = hashlib.sha256(key + bytes([group])).digest()
    return np.frombuffer(text * (page_bytes[group] // len(text) + 1), dtype=np.uint8)[: page_bytes[group]].copy()


def open_tier(folder: Path, **options: Any) -> DiskTier:
    """A tier with room for everything, unless options say otherwise."""
    chosen: dict[str, Any] = {"capacity_bytes": 8 << 20, "fingerprint": "a model", "page_bytes": PAGE_BYTES} | options
    return DiskTier.open(folder, **chosen)


def put(tier: DiskTier, *numbers: int, group: int = 0) -> list[bool]:
    """Write pages and wait: which are stored."""
    keys = [key_of(number) for number in numbers]
    futures = [tier.write(group, key, page_of(group, key)) for key in keys]
    return [future.result(WAIT_S) for future in futures]


def get(tier: DiskTier, *numbers: int, group: int = 0) -> list[bool]:
    """Read pages, all at once: which are there; a page that is not the right one fails."""
    keys = [key_of(number) for number in numbers]
    pages = [np.full(PAGE_BYTES[group], 0xAA, dtype=np.uint8) for _ in keys]
    futures = [tier.read(group, key, page) for key, page in zip(keys, pages, strict=True)]
    found = [future.result(WAIT_S) for future in futures]
    for key, page, is_found in zip(keys, pages, found, strict=True):
        assert not is_found or np.array_equal(page, page_of(group, key)), "a wrong page"
    return found


def there(tier: DiskTier, *numbers: int, group: int = 0) -> list[int]:
    """The numbers whose pages can be found."""
    return [number for number in numbers if tier.contains(group, key_of(number))]


def segment_paths(tier: DiskTier) -> list[Path]:
    """Files of the segments, the first made first."""
    return sorted(tier.folder.glob("segment-*"))
