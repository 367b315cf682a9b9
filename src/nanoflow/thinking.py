"""A bound on how long a model reasons before it answers: how far its reasoning is, token by token.

`ThinkingLimit` is what a request asks for. `Thinking` is the state of one completion: a value, which every token
replaces by the next one. When the bound is reached it names the tokens that close the reasoning, one after the other.
Nothing here knows of masks or devices (`executor/constraints.py`), or of formats (`chat_formats/formats.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingLimit:
    """A bound on the reasoning of a completion.

    Attributes:
        max_tokens: Tokens that reasoning may have, all its sections together.
        opener: Text that begins a section.
        closers: Texts that end one.
        closing_ids: The tokens that end it when the bound is reached.
        is_open: Whether the completion begins inside a section.
        is_anywhere: Whether sections may begin anywhere; if not, there is one, at the beginning.
    """

    max_tokens: int
    opener: str
    closers: tuple[str, ...]
    closing_ids: tuple[int, ...]
    is_open: bool
    is_anywhere: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How far the reasoning of a completion is.

    Attributes:
        limit: Its bound.
        is_open: The last token is inside a section.
        num_tokens: Tokens inside sections so far.
        tail: The last bytes, among which a mark may begin.
        forced: Tokens that must come next.
        is_over: There is no more reasoning to bound.
    """

    limit: ThinkingLimit
    is_open: bool
    num_tokens: int = 0
    tail: bytes = b""
    forced: tuple[int, ...] = ()
    is_over: bool = False

    @staticmethod
    def begin(limit: ThinkingLimit) -> Thinking:
        """The state before the first token."""
        return _bounded(Thinking(limit=limit, is_open=limit.is_open))

    def after(self, token_id: int, data: bytes) -> Thinking:
        """The state behind one token more, whose bytes are `data`."""
        if self.is_over:
            return self
        if self.forced and token_id == self.forced[0]:
            rest = self.forced[1:]
            return replace(self, forced=rest) if rest else self._closed(b"")
        tail = self.tail + data
        return self._inside(tail) if self.is_open else self._outside(tail)

    def without_force(self) -> Thinking:
        """The state if the reasoning may not be closed, as a grammar demands something else: it is not bounded."""
        return replace(self, forced=(), is_over=True)

    def _inside(self, tail: bytes, num_new: int = 1) -> Thinking:
        """In a section, with the last bytes of it, of which some tokens are new."""
        closers = [closer.encode() for closer in self.limit.closers]
        ends = [place + len(closer) for closer in closers if (place := tail.find(closer)) >= 0]
        if ends:
            return self._closed(tail[min(ends) :])
        kept = max(map(len, closers)) - 1
        return _bounded(replace(self, num_tokens=self.num_tokens + num_new, tail=tail[-kept:] if kept else b""))

    def _outside(self, tail: bytes) -> Thinking:
        opener = self.limit.opener.encode()
        if self.limit.is_anywhere:
            if opener in tail:
                return replace(self, is_open=True)._inside(tail[tail.index(opener) + len(opener) :], 0)
            return replace(self, tail=tail[-(len(opener) - 1) :])
        text = tail.lstrip()
        if text.startswith(opener):
            return replace(self, is_open=True)._inside(text[len(opener) :], 0)
        return replace(self, tail=text, is_over=not opener.startswith(text))

    def _closed(self, tail: bytes) -> Thinking:
        """Behind a section."""
        return replace(self, is_open=False, tail=tail, forced=(), is_over=not self.limit.is_anywhere)


def _bounded(state: Thinking) -> Thinking:
    """The state, with the tokens that close the reasoning if its bound is reached."""
    is_reached = state.is_open and state.num_tokens >= state.limit.max_tokens
    return replace(state, forced=state.limit.closing_ids) if is_reached else state
