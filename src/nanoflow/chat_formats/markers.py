"""Find markers, such as "<think>", in text that arrives in pieces: text that may begin a marker is held back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

# Sets of markers whose tables are kept: a few states of a parser, for a few tokenizers.
_NUM_KEPT = 64


class Markers:
    """Markers to look for.

    Args:
        markers: Non-empty strings; of two that begin at one place the longer one counts.
    """

    __slots__ = ("_beginnings", "_firsts", "_longest", "_pattern")

    def __init__(self, markers: Sequence[str]) -> None:
        by_length = sorted(markers, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, by_length))) if by_length else None
        # Most text has none of these characters, and then nothing else has to be looked for.
        self._firsts = (
            re.compile(f"[{''.join(map(re.escape, {marker[0] for marker in markers}))}]") if by_length else None
        )
        self._beginnings = frozenset(marker[:end] for marker in markers for end in range(1, len(marker)))
        self._longest = len(by_length[0]) if by_length else 0

    def find(self, text: str, *, is_end: bool) -> tuple[int, str | None]:
        """Find the first marker.

        Args:
            text: Text so far.
            is_end: True if no more text comes.

        Returns:
            How many characters stand before it for sure, and the marker; None if there is none, or it is not decided
            yet whether there is.
        """
        if self._pattern is None or self._firsts is None or self._firsts.search(text) is None:
            return len(text), None
        match = self._pattern.search(text)
        begun = len(text) if is_end else self._first_beginning(text)
        if match is None or begun <= match.start():
            return begun, None
        return match.start(), match[0]

    def _first_beginning(self, text: str) -> int:
        """Where the longest end of the text begins that more text may complete to a marker."""
        first = max(len(text) - self._longest + 1, 0)
        return next((place for place in range(first, len(text)) if text[place:] in self._beginnings), len(text))


@lru_cache(_NUM_KEPT)
def markers(names: frozenset[str]) -> Markers:
    """`Markers` for these names; the last ones made are kept."""
    return Markers(sorted(names))


def could_become(text: str, word: str) -> bool:
    """True if more text may turn `text` into something that begins with `word`."""
    return len(text) < len(word) and word.startswith(text)
