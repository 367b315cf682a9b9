"""Sessions: the pages of the last request of each conversation that has a name, to ask for them before its next turn.

Only keys are kept, 32 bytes a page: whether the pages are still there, and where, is known to `reuse.py`. The sessions
used longest ago are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.kvcache.keys import split


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The last request of a session.

    Attributes:
        page_keys: Keys of its full pages, prompt and completion, one after the other.
        num_tokens: Tokens of its prompt and completion.
    """

    page_keys: bytes
    num_tokens: int

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The key of each page."""
        return split(self.page_keys)


class Sessions:
    """The sessions that are remembered.

    Args:
        most: So many at most; 0 remembers none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._last: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        """Number of sessions."""
        return len(self._last)

    def remember(self, name: str | None, keys: Sequence[bytes], num_tokens: int) -> None:
        """A request of this session has left full pages with these keys; without a name nothing is remembered."""
        if name is None:
            return
        self._last[name] = Session(page_keys=b"".join(keys), num_tokens=num_tokens)
        self._last.move_to_end(name)
        if len(self._last) > self._most:
            self._last.popitem(last=False)

    def find(self, name: str) -> Session | None:
        """A session, which counts as used just now; None if it is not remembered."""
        session = self._last.get(name)
        if session is not None:
            self._last.move_to_end(name)
        return session
