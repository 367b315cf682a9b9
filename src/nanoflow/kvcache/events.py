"""Which pages can be found, told as it changes: the events that a router of requests follows from outside.

`cached.py` tells a `KeyWatch` of every key that it learns or forgets. `scheduler/key_events.py` adds the tokens, which
nobody here knows. `engine/kv_publisher.py` sends the events to other programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nanoflow.batch import Int32

# Where pages are, by vLLM's names: in the device's memory, and in the lower tiers.
DEVICE, HOST, DISK = "GPU", "CPU", "DISK"


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesStored:
    """Consecutive pages of one sequence can be found from now on.

    Attributes:
        keys: The key of each, at least one.
        before: The key of the page before the first. The first page of a sequence has None, or the root of its salt,
            which is the key of no page.
        token_ids: int32 [len(keys) * page size], the tokens in them. Empty for pages of a lower tier: they were told
            when the device had these pages, and so was what is before them.
        medium: Where they are: DEVICE, HOST or DISK.
    """

    keys: tuple[bytes, ...]
    before: bytes | None
    token_ids: Int32
    medium: str = DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesRemoved:
    """Pages cannot be found any more in the place that `medium` names; they may be in another."""

    keys: tuple[bytes, ...]
    medium: str = DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class AllCleared:
    """Nothing can be found any more: the engine has just started, or events were lost."""


KeyEvent = PagesStored | PagesRemoved | AllCleared


class KeyWatch(Protocol):
    """Is told of each key of one pool."""

    def stored(self, key: bytes) -> None:
        """A page with this key can be found."""

    def removed(self, key: bytes) -> None:
        """No page with this key can be found any more."""


class NoWatch:
    """Nobody watches."""

    def stored(self, key: bytes) -> None:
        """Nothing."""

    def removed(self, key: bytes) -> None:
        """Nothing."""


NO_WATCH = NoWatch()
