"""The calls of a message as events: their places and ids, and which of them are passed on. `parser.py` finds them."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field

from nanoflow.chat_formats.events import ArgumentsDelta, CallEnded, CallStarted, Event
from nanoflow.chat_formats.formats import IdStyle
from nanoflow.chat_formats.json_scan import JsonScan

_ALPHABET = string.ascii_letters + string.digits


def new_call_id(style: IdStyle) -> str:
    """An id for a call, which no other call has."""
    if style is IdStyle.NINE:
        return "".join(secrets.choice(_ALPHABET) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


@dataclass(slots=True)
class OpenCall:
    """The call whose arguments are being read.

    Attributes:
        index: Its place among the calls of the message; None if it is not passed on.
        scan: Finds the end of its arguments.
        is_empty: Whether nothing of its arguments has come.
    """

    index: int | None
    scan: JsonScan = field(default_factory=JsonScan)
    is_empty: bool = True


@dataclass(slots=True, kw_only=True)
class Calls:
    """The calls of one message; each method returns the events to pass on.

    Attributes:
        ids: How their ids look.
        new_id: Makes an id.
        most: Calls after so many are dropped; None for no limit.
        current: The call that is open; None if there is none.
        num_started: Calls that were passed on.
    """

    ids: IdStyle
    new_id: Callable[[IdStyle], str]
    most: int | None
    current: OpenCall | None = None
    num_started: int = 0

    def start(self, name: str, written_id: str | None = None) -> list[Event]:
        """A call of this function begins, with the id that the model has written, if it has written one."""
        if self.most is not None and self.num_started >= self.most:
            self.current = OpenCall(None)
            return []
        self.current = OpenCall(self.num_started)
        self.num_started += 1
        return [CallStarted(self.num_started - 1, written_id or self.new_id(self.ids), name)]

    def add(self, text: str) -> list[Event]:
        """More of its arguments."""
        call = self.current
        if call is None or not text:
            return []
        call.is_empty = False
        return [] if call.index is None else [ArgumentsDelta(call.index, text)]

    def end(self, *, is_whole: bool) -> list[Event]:
        """The call ends, if one is open."""
        call, self.current = self.current, None
        return [] if call is None or call.index is None else [CallEnded(call.index, is_whole)]
