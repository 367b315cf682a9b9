"""Stop strings in text that comes in pieces.

Where the pieces begin and end makes no difference to what is found. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on, but nothing that is, or may yet become, a stop string.

    The stop string that is complete first ends the text; of several that end at one place, the longest.

    Args:
        stops: Non-empty strings; none lets all text pass.
        keeps_stop: The stop string is part of the text.

    Attributes:
        found: The stop string that ended the text; None before.
    """

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool = False) -> None:
        self.found: str | None = None
        self._stops = stops
        self._keeps_stop = keeps_stop
        self._held = ""

    def push(self, piece: str, *, may_stop: bool = True) -> str:
        """The text to show now.

        Args:
            piece: What follows the text so far.
            may_stop: False lets stop strings that end in this piece pass.
        """
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        if may_stop:
            ends = self._ends(text, len(self._held))
            if ends:
                end, start = min(ends)
                self.found, self._held = text[start:end], ""
                return text[: end if self._keeps_stop else start]
        num_shown = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[num_shown:]
        return text[:num_shown]

    def flush(self) -> str:
        """The text held back, once there is no more to come."""
        held, self._held = self._held, ""
        return held

    def _ends(self, text: str, num_seen: int) -> list[tuple[int, int]]:
        """End and start of each stop string where it first ends behind the first `num_seen` characters."""
        starts = ((text.find(stop, max(num_seen - len(stop) + 1, 0)), len(stop)) for stop in self._stops)
        return [(start + length, start) for start, length in starts if start >= 0]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string without being all of it."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
