"""Search for stop strings in text that arrives in pieces.

The result does not depend on how the text is split into pieces. Tokens are not used here.

The search is by Aho and Corasick ("Efficient string matching", 1975). The stop strings form a tree of their prefixes.
After each character the search is at the node of the longest prefix with which the text ends. The work is linear in the
length of the text, whatever the number and length of the strings; each character is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """A prefix of a stop string.

    Attributes:
        text_of: A stop string with this prefix.
        depth: Length of the prefix.
        fallback: The node of the longest shorter prefix with which this one ends; None for the root.
        match: The longest stop string with which this prefix ends; None if there is none.
        children: Nodes by the next character. Those of the deepest nodes are added when a search first gets there.
    """

    text_of: str = ""
    depth: int = 0
    fallback: _Node | None = None
    match: str | None = None
    children: dict[str, _Node] = field(default_factory=dict)


class StopStrings:
    """The tree of some stop strings; requests with the same strings may share it, in one thread.

    Args:
        stops: Non-empty strings.

    Attributes:
        root: The empty prefix, where a search begins.
        first_chars: First characters of the stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.root = _Node()
        self.first_chars = frozenset(stop[0] for stop in stops)
        # The strings that are longer than the tree is deep, each with its deepest node.
        self._growing = [(stop, self.root) for stop in stops]
        self._depth = 0
        self._grow()

    def step(self, node: _Node, char: str) -> _Node:
        """The node after a search at `node` has read one more character."""
        while True:
            following = node.children.get(char)
            if following is not None:
                if following.depth == self._depth and self._growing:
                    self._grow()
                return following
            if node.fallback is None:
                return node
            node = node.fallback

    def held(self, node: _Node) -> _Node:
        """The node of the longest prefix with which the text ends and that may grow: `node` unless it is a leaf."""
        while not node.children and node.fallback is not None:
            node = node.fallback
        return node

    def _grow(self) -> None:
        """Add one level to the tree. So long strings cost only as much as their prefixes that occur."""
        level, self._growing = self._growing, []
        self._depth += 1
        for stop, parent in level:
            char = stop[self._depth - 1]
            node = parent.children.get(char)
            if node is None:
                fallback = self.root if parent.fallback is None else self._child(parent.fallback, char)
                node = parent.children[char] = _Node(stop, self._depth, fallback, fallback.match)
            if len(stop) == self._depth:
                node.match = stop
            else:
                self._growing.append((stop, node))

    def _child(self, node: _Node, char: str) -> _Node:
        """As `step`, within the levels that exist."""
        while char not in node.children and node.fallback is not None:
            node = node.fallback
        return node.children.get(char, node)


class StopFilter:
    """Passes text on, but withholds what is, or may become, a stop string.

    The stop string that is complete first ends the text; if several are complete at one place, the longest.

    Args:
        stops: The request's stop strings.
        keeps_stop: Whether the stop string is part of the text.

    Attributes:
        found: The stop string that ended the text; None before.
    """

    __slots__ = ("_keeps_stop", "_node", "_stops", "found")

    def __init__(self, stops: StopStrings, *, keeps_stop: bool = False) -> None:
        self.found: str | None = None
        self._stops = stops
        self._keeps_stop = keeps_stop
        # The text held back is the prefix of this node.
        self._node = stops.root

    def push(self, piece: str, *, may_stop: bool = True) -> str:
        """The text to show now.

        Args:
            piece: The next piece of the text.
            may_stop: False ignores stop strings that end in this piece.
        """
        stops, held = self._stops, self._node
        if held.depth == 0 and stops.first_chars.isdisjoint(piece):
            return piece
        node, step = held, stops.step
        for num_read, char in enumerate(piece, start=1):
            node = step(node, char)
            if node.match is not None and may_stop:
                self.found, self._node = node.match, stops.root
                num_hidden = 0 if self._keeps_stop else len(node.match)
                return _first_chars(held, piece, held.depth + num_read - num_hidden)
        self._node = stops.held(node)
        return _first_chars(held, piece, held.depth + len(piece) - self._node.depth)

    def flush(self) -> str:
        """The text held back, at the end of the text."""
        held, self._node = self._node, self._stops.root
        return held.text_of[: held.depth]


def _first_chars(held: _Node, piece: str, num_chars: int) -> str:
    """The first characters of the text held back and of the piece behind it."""
    if num_chars <= held.depth:
        return held.text_of[:num_chars]
    return held.text_of[: held.depth] + piece[: num_chars - held.depth]
