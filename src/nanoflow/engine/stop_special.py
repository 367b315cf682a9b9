"""Stop strings that contain names of special tokens, if special tokens are left out of the text.

In the searched text, such a token is represented by a *mark*: a character that no text contains. The stop string has
the same mark in place of the name, so the search of `stop.py` finds it, and only where the token itself occurs. Other
stop strings are searched in the text without marks, as its reader sees it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate

from nanoflow.engine.stop import StopFilter, StopStrings

# Marks are surrogates, which text decoded from UTF-8 does not contain.
_MARKS = range(0xD800, 0xE000)


class StopRules:
    """The search trees of some stop strings; requests with the same strings may share them, in one thread.

    Args:
        stops: Non-empty strings.
        left_out: Ids of the special tokens that are left out of the text, by name.

    Attributes:
        marks: By token id, the mark of a special token that is left out of the text.
    """

    def __init__(self, stops: Sequence[str], left_out: Mapping[str, int] | None = None) -> None:
        named = {name: token_id for name, token_id in (left_out or {}).items() if any(name in stop for stop in stops)}
        self.marks = {token_id: chr(mark) for token_id, mark in zip(sorted({*named.values()}), _MARKS, strict=False)}
        mark_of = {name: self.marks[token_id] for name, token_id in named.items() if token_id in self.marks}
        self._stop_of = {_marked(stop, mark_of): stop for stop in stops}
        self._plain = StopStrings(stops)
        with_marks = [pattern for pattern, stop in self._stop_of.items() if pattern != stop]
        self._marked = StopStrings(with_marks) if with_marks else None
        self._num_shown = {pattern: _shown_counts(pattern) for pattern in with_marks}

    def new_filter(self, *, keeps_stop: bool = False) -> StopFilter | MarkedStopFilter:
        """The filter of one completion; `keeps_stop` leaves the stop string in the text."""
        if self._marked is None:
            return StopFilter(self._plain, keeps_stop=keeps_stop)
        return MarkedStopFilter(self._plain, self._marked, self._stop_of, self._num_shown, keeps_stop=keeps_stop)


class MarkedStopFilter:
    """A `StopFilter` for pieces with marks, which are not shown.

    Args:
        plain: Stop strings to find in the text without marks.
        marked: Stop strings with marks, to find in the text with marks.
        stop_of: The stop string of each string in `marked`.
        num_shown: For each string in `marked`: entry i is the number of its first i characters that are no marks.
        keeps_stop: Whether the stop string is part of the text, with the names of its special tokens.

    Attributes:
        found: The stop string that ended the text; None before.
    """

    __slots__ = (
        "_held",
        "_keeps_stop",
        "_marked",
        "_marked_node",
        "_num_shown",
        "_plain",
        "_plain_node",
        "_stop_of",
        "found",
    )

    def __init__(
        self,
        plain: StopStrings,
        marked: StopStrings,
        stop_of: Mapping[str, str],
        num_shown: Mapping[str, Sequence[int]],
        *,
        keeps_stop: bool = False,
    ) -> None:
        self.found: str | None = None
        self._plain, self._marked, self._stop_of = plain, marked, stop_of
        self._plain_node, self._marked_node = plain.root, marked.root
        self._keeps_stop = keeps_stop
        self._num_shown = num_shown
        # A queue of characters: adding and removing one costs the same, however many are held.
        self._held: deque[str] = deque()

    def push(self, piece: str, *, may_stop: bool = True) -> str:
        """The text to show now; arguments as of `StopFilter.push`."""
        held = self._held
        for char in piece:
            self._marked_node = self._marked.step(self._marked_node, char)
            if not _is_mark(char):
                held.append(char)
                self._plain_node = self._plain.step(self._plain_node, char)
            found = self._longest(self._marked_node.match, None if _is_mark(char) else self._plain_node.match)
            if found is not None and may_stop:
                self.found = self._stop_of.get(found, found)
                shown = self._take(len(held) - self._shown(found, len(found)))
                held.clear()
                return shown + self.found if self._keeps_stop else shown
        self._plain_node, self._marked_node = self._plain.held(self._plain_node), self._marked.held(self._marked_node)
        beginning = self._marked_node
        return self._take(len(held) - max(self._plain_node.depth, self._shown(beginning.text_of, beginning.depth)))

    def _shown(self, pattern: str, num_chars: int) -> int:
        """How many of the first `num_chars` characters of a pattern are no marks."""
        counts = self._num_shown.get(pattern)
        return num_chars if counts is None else counts[num_chars]

    def _take(self, num_chars: int) -> str:
        """Remove and return the first characters that are held."""
        return "".join([self._held.popleft() for _ in range(num_chars)])

    def _longest(self, *matches: str | None) -> str | None:
        found = [match for match in matches if match is not None]
        return max(found, key=lambda match: len(self._stop_of.get(match, match)), default=None)

    def flush(self) -> str:
        """The text held back, at the end of the text."""
        self._plain_node, self._marked_node = self._plain.root, self._marked.root
        return self._take(len(self._held))


def _marked(stop: str, mark_of: Mapping[str, str]) -> str:
    """A stop string with marks in place of the names in it; the longest name if several begin at one place."""
    if not mark_of:
        return stop
    names = "|".join(map(re.escape, sorted(mark_of, key=len, reverse=True)))
    return re.sub(names, lambda name: mark_of[name[0]], stop)


def _is_mark(char: str) -> bool:
    return ord(char) in _MARKS


def _shown_counts(pattern: str) -> list[int]:
    """Entry i: how many of the first i characters are no marks."""
    return list(accumulate((not _is_mark(char) for char in pattern), initial=0))
