"""The events of `kvcache/events.py` with the tokens of each page: which prefixes the first KV group can find.

Every key that the pool learns or forgets is told once, in order: whoever applies all events from the start has exactly
the keys of that pool. Where a model has several KV groups, a prefix is used only if all of them have it, so what
is told is then what may be found. This file does not know who listens (`engine/kv_publisher.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nanoflow.kvcache.events import DEVICE, HOST, KeyEvent, KeyWatch, NoWatch, PagesRemoved, PagesStored
from nanoflow.kvcache.keys import root_key
from nanoflow.scheduler.rows import RowTable

Put = Callable[[KeyEvent], None]
_ROOT = root_key()
_NO_TOKENS = np.zeros(0, dtype=np.int32)


class NoKeyEvents(NoWatch):
    """Nobody listens: nothing is noted."""

    def cached(self, row: int, start: int, before: bytes, keys: Sequence[bytes]) -> None:
        """Nothing."""

    def loaded(self, keys: Sequence[bytes]) -> None:
        """Nothing."""

    @property
    def of_host(self) -> KeyWatch:
        """Nothing."""
        return self


class KeyEvents(KeyWatch):
    """Makes events of what the pool tells, and of the tokens in the rows.

    Args:
        put: Takes each event; it must not wait.
        rows: Has the tokens.
        page_size: Tokens a page.
    """

    def __init__(self, put: Put, rows: RowTable, page_size: int) -> None:
        self._put = put
        self._rows = rows
        self._page_size = page_size
        self._new: set[bytes] = set()

    def stored(self, key: bytes) -> None:
        """Note a key that `cached` will tell, with the tokens of its page."""
        self._new.add(key)

    def removed(self, key: bytes) -> None:
        """Tell that a key is gone."""
        self._put(PagesRemoved(keys=(key,), medium=DEVICE))

    def cached(self, row: int, start: int, before: bytes, keys: Sequence[bytes]) -> None:
        """The pages of a row from the column `start` on were cached; tell of those whose keys the pool did not have.

        To be called after the pool was told of these keys, while the row still has its tokens.

        Args:
            row: Of the state table.
            start: Column of the first page.
            before: Key of the page before it, or the root of the sequence.
            keys: Of all these pages.
        """
        known = [before if before != _ROOT else None, *keys]
        first = 0
        while first < len(keys):
            stop = first
            while stop < len(keys) and keys[stop] in self._new:
                stop += 1
            if stop > first:
                tokens = self._rows.known_tokens(
                    row, (start + first) * self._page_size, (start + stop) * self._page_size
                )
                self._put(PagesStored(keys=tuple(keys[first:stop]), before=known[first], token_ids=tokens))
                self._new.difference_update(keys[first:stop])
            first = stop + 1

    def loaded(self, keys: Sequence[bytes]) -> None:
        """Pages were loaded to the device; tell of those whose keys the pool did not have, without their tokens.

        To be called after the pool was told of these keys.
        """
        new = tuple(key for key in keys if key in self._new)
        if new:
            self._new.difference_update(new)
            self._put(PagesStored(keys=new, before=None, token_ids=_NO_TOKENS, medium=DEVICE))

    @property
    def of_host(self) -> KeyWatch:
        """Is told of the keys of host memory."""
        return _HostKeys(self._put)


class _HostKeys:
    """Tells which pages are in host memory. Their tokens were told when the device had them."""

    def __init__(self, put: Put) -> None:
        self._put = put

    def stored(self, key: bytes) -> None:
        """See `KeyWatch`."""
        self._put(PagesStored(keys=(key,), before=None, token_ids=_NO_TOKENS, medium=HOST))

    def removed(self, key: bytes) -> None:
        """See `KeyWatch`."""
        self._put(PagesRemoved(keys=(key,), medium=HOST))


def key_events(put: Put | None, rows: RowTable, page_size: int) -> KeyEvents | NoKeyEvents:
    """Events for `put`; none without it."""
    return NoKeyEvents() if put is None else KeyEvents(put, rows, page_size)
