"""Sizes of the pools of KV pages: what a request needs of each, and how memory is divided between them.

Every KV group of the model (`graph/layers.py`) has a pool of its own. Where a sliding window ends the reach of later
tokens, pages are given back while their request runs (`tables.py`), so the need of a request has a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """The pool of one KV group.

    Attributes:
        num_pages: Pages in it.
        window: Sliding window of the group's layers: a token sees itself and the `window - 1` before it. None without.
    """

    num_pages: int
    window: int | None = None


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // page_size)


def window_pages(window: int, page_size: int) -> int:
    """Most pages that a request holds in a group with this window while it computes a token at a time, and one more.

    It keeps the `window - 1` tokens before the next one, and that one. W tokens in a row touch at most
    (W + P - 2) // P + 1 pages of P tokens. The page more is a part of what a chunk of its prompt needs: `chunk_pages`.
    """
    return (window + page_size - 2) // page_size + 2


def chunk_pages(max_batch_tokens: int, page_size: int) -> int:
    """Most pages that all requests of an iteration together hold beyond the `window_pages` of each.

    One that computes t tokens touches at most ceil((t - 1) / P) pages more than one that computes a single token. Of
    these one is counted in its `window_pages`, and the others are at most (t - 2) / P.
    """
    return max_batch_tokens // page_size


def most_pages(window: int | None, num_tokens: int, *, page_size: int, max_batch_tokens: int) -> int:
    """Most pages that one request of so many tokens holds at once in a group with this window."""
    whole = pages_for(num_tokens, page_size)
    if window is None:
        return whole
    return min(whole, window_pages(window, page_size) + chunk_pages(max_batch_tokens, page_size))


def longest_sequence(pools: Sequence[PoolSize], most: int, *, page_size: int, max_batch_tokens: int) -> int:
    """Most tokens of a request, up to `most`, that every pool can hold."""

    def limit(pool: PoolSize) -> int:
        needed = most_pages(pool.window, most, page_size=page_size, max_batch_tokens=max_batch_tokens)
        return most if needed <= pool.num_pages else pool.num_pages * page_size

    return min(most, *map(limit, pools))


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What pools are sized for.

    Attributes:
        max_num_seqs: Requests at once.
        max_model_len: Most tokens of each.
        max_batch_tokens: Token budget of an iteration.
        page_size: Tokens a page.
    """

    max_num_seqs: int
    max_model_len: int
    max_batch_tokens: int
    page_size: int

    def useful_pages(self, window: int | None) -> int:
        """Pages that all requests at once can hold in a group with this window; more would never be used."""
        whole = pages_for(self.max_model_len, self.page_size)
        if window is None:
            return self.max_num_seqs * whole
        chunks = chunk_pages(self.max_batch_tokens, self.page_size)
        return min(self.max_num_seqs * whole, self.max_num_seqs * window_pages(window, self.page_size) + chunks)

    def useful_bytes(self, groups: Sequence[tuple[int | None, int]]) -> int:
        """Bytes of all useful pages; see `divide`."""
        return sum(self.useful_pages(window) * page_bytes for window, page_bytes in groups)

    def divide(self, room_bytes: int, groups: Sequence[tuple[int | None, int]]) -> tuple[PoolSize, ...]:
        """Pools that fill so many bytes: equally many pages each, but where there is a window no more than are useful.

        What groups with windows cannot use goes to the others.

        Args:
            room_bytes: For all pools.
            groups: Window, and bytes of a page, of each group.
        """
        num_pages, room_bytes = 0, max(room_bytes, 0)
        # Without a window there is no end: no more pages fit than there are bytes.
        left = sorted(
            (room_bytes if window is None else self.useful_pages(window), page_bytes) for window, page_bytes in groups
        )
        while left:
            # All that are left grow until the next of them has enough, or until the room ends.
            step_bytes = sum(page_bytes for _, page_bytes in left)
            enough, _ = left.pop(0)
            grown = min(enough - num_pages, room_bytes // step_bytes)
            num_pages, room_bytes = num_pages + grown, room_bytes - grown * step_bytes
            if num_pages < enough:
                break
        return self.bounded(num_pages, [window for window, _ in groups])

    def bounded(self, num_pages: int, windows: Sequence[int | None]) -> tuple[PoolSize, ...]:
        """Pools of so many pages each, or fewer where there is a window and no more are useful."""
        return tuple(
            PoolSize(
                num_pages=num_pages if window is None else min(num_pages, self.useful_pages(window)), window=window
            )
            for window in windows
        )
