"""The output of a response: its items, and the events of a stream that make them.

Pure: what `turn.py` finds in the model's text goes in, JSON comes out. A whole answer is made by the same code as a
stream, so both have the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoflow.chat_formats.events import ArgumentsDelta, CallEnded, CallStarted, ContentDelta, Event, ReasoningDelta
from nanoflow.chat_formats.sections import BORDER
from nanoflow.server.response_chat import Item, new_item_id

StreamEvent = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class _Open:
    """The item that grows.

    Attributes:
        index: Its place in the output.
        item: The item, without its text.
        pieces: The text so far.
    """

    index: int
    item: Item
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def about(self, kind: str, **more: Any) -> StreamEvent:
        """An event about the item."""
        return {"type": f"response.{kind}", "item_id": self.item["id"], "output_index": self.index, **more}


def _text_part(text: str) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _reasoning_part(text: str) -> Item:
    return {"type": "reasoning_text", "text": text}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A kind of items with parts.

    Attributes:
        part: Makes their only part of a text.
        event: Name of the events about its text.
        more: Further fields of these events.
    """

    part: Callable[[str], Item]
    event: str
    more: Mapping[str, Any]


_KINDS: Mapping[str, _Kind] = {
    "message": _Kind(part=_text_part, event="output_text", more={"logprobs": []}),
    "reasoning": _Kind(part=_reasoning_part, event="reasoning_text", more={}),
}


class ResponseOutput:
    """The items of one response, as they grow.

    Attributes:
        items: The items that have ended.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._open: _Open | None = None

    def push(self, events: Iterable[Event]) -> list[StreamEvent]:
        """Take in what is new in the message; returns the events of the stream for it."""
        return [made for event in events for made in self._push(event)]

    def finish(self, *, is_cut: bool) -> list[StreamEvent]:
        """End the open item; a response without any gets an empty message.

        Args:
            is_cut: Whether the text was cut off, so that the last item is incomplete.
        """
        opened = [] if self.items or self._open else self._begin("message", role="assistant")
        return [*opened, *self._end("incomplete" if is_cut else "completed")]

    @property
    def reasoning(self) -> str:
        """All of the reasoning."""
        return "".join(part["text"] for item in self.items if item["type"] == "reasoning" for part in item["content"])

    def _push(self, event: Event) -> Iterator[StreamEvent]:
        match event:
            case ContentDelta(text):
                yield from self._add_text("message", text, role="assistant")
            case ReasoningDelta(text):
                yield from self._add_text("reasoning", text, summary=[])
            case CallStarted(_, call_id, name):
                yield from self._end()
                yield from self._begin("function_call", call_id=call_id, name=name)
            case ArgumentsDelta(_, text) if self._open is not None:
                self._open.pieces.append(text)
                yield self._open.about("function_call_arguments.delta", delta=text)
            case CallEnded(_, is_whole):
                yield from self._end("completed" if is_whole else "incomplete")

    def _add_text(self, kind: str, text: str, **fields: Any) -> Iterator[StreamEvent]:
        if self._open is None or self._open.item["type"] != kind:
            yield from self._end()
            if any(item["type"] == kind for item in self.items):
                text = text.removeprefix(BORDER)
            yield from self._begin(kind, **fields)
        assert self._open is not None
        self._open.pieces.append(text)
        form = _KINDS[kind]
        yield self._open.about(f"{form.event}.delta", content_index=0, delta=text, **form.more)

    def _begin(self, kind: str, **fields: Any) -> list[StreamEvent]:
        item = {"id": new_item_id(kind), "type": kind, "status": "in_progress", **fields}
        self._open = _Open(index=len(self.items), item=item)
        empty: Item = {"arguments": ""} if kind == "function_call" else {"content": []}
        added = {"type": "response.output_item.added", "output_index": len(self.items), "item": {**item, **empty}}
        if kind == "function_call":
            return [added]
        return [added, self._open.about("content_part.added", content_index=0, part=_KINDS[kind].part(""))]

    def _end(self, status: str = "completed") -> list[StreamEvent]:
        opened, self._open = self._open, None
        if opened is None:
            return []
        kind, text = opened.item["type"], opened.text
        if kind == "function_call":
            whole: Item = {"arguments": text}
            events = [opened.about("function_call_arguments.done", name=opened.item["name"], arguments=text)]
        else:
            form = _KINDS[kind]
            part = form.part(text)
            whole = {"content": [part]}
            events = [
                opened.about(f"{form.event}.done", content_index=0, text=text, **form.more),
                opened.about("content_part.done", content_index=0, part=part),
            ]
        item = {**opened.item, **whole, "status": status}
        self.items.append(item)
        return [*events, {"type": "response.output_item.done", "output_index": opened.index, "item": item}]
