"""The content of a message of /v1/messages: its blocks, and the events of a stream that make them.

Pure: what `turn.py` finds in the model's text goes in, JSON comes out. A whole answer is made by the same code as a
stream, so both have the same blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from nanoflow.chat_formats.events import ArgumentsDelta, CallEnded, CallStarted, ContentDelta, Event, ReasoningDelta
from nanoflow.chat_formats.sections import BORDER
from nanoflow.outputs import FinishReason
from nanoflow.server.reading import CALLS_REASON

Block = dict[str, Any]
StreamEvent = dict[str, Any]

# Holds arguments that are no JSON object, as Anthropic's API advises.
INVALID_JSON = "INVALID_JSON"
_SIGNATURE_BYTES = 16
_STOP_REASONS: Mapping[str, str] = {
    FinishReason.STOP: "end_turn",
    FinishReason.LENGTH: "max_tokens",
    CALLS_REASON: "tool_use",
}


def stop_reason(finish_reason: str, stop_sequence: str | None) -> str:
    """Why a message ended, as Anthropic's API says it."""
    is_sequence = stop_sequence is not None and finish_reason == FinishReason.STOP
    return "stop_sequence" if is_sequence else _STOP_REASONS[finish_reason]


@dataclass(slots=True, kw_only=True)
class _Open:
    """The block that grows: as it began, and its text so far."""

    block: Block
    pieces: list[str] = field(default_factory=list)


class MessageContent:
    """The blocks of one message, as they grow.

    Attributes:
        blocks: The blocks that have ended.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: _Open | None = None

    def push(self, events: Iterable[Event]) -> list[StreamEvent]:
        """Take in what is new in the message; returns the events of the stream for it."""
        return [made for event in events for made in self._push(event)]

    def finish(self) -> list[StreamEvent]:
        """End the open block."""
        return list(self._end())

    @property
    def thinking(self) -> str:
        """All of the reasoning."""
        return "".join(block["thinking"] for block in self.blocks if block["type"] == "thinking")

    def _push(self, event: Event) -> Iterator[StreamEvent]:
        match event:
            case ContentDelta(text):
                yield from self._add_text("text", text, text="")
            case ReasoningDelta(text):
                yield from self._add_text("thinking", text, thinking="", signature="")
            case CallStarted(_, call_id, name):
                yield from self._begin("tool_use", id=call_id, name=name, input={})
            case ArgumentsDelta(_, text) if self._open is not None:
                yield self._delta("input_json_delta", "partial_json", text)
            case CallEnded():
                yield from self._end()

    def _add_text(self, kind: str, piece: str, **fields: Any) -> Iterator[StreamEvent]:
        """More text of a kind, in a block of its own if another one is open."""
        if self._open is None or self._open.block["type"] != kind:
            yield from self._begin(kind, **fields)
            if any(block["type"] == kind for block in self.blocks):
                piece = piece.removeprefix(BORDER)
        yield self._delta(f"{kind}_delta", kind, piece)

    def _begin(self, kind: str, **fields: Any) -> Iterator[StreamEvent]:
        yield from self._end()
        self._open = _Open(block={"type": kind, **fields})
        yield {"type": "content_block_start", "index": len(self.blocks), "content_block": self._open.block}

    def _delta(self, kind: str, name: str, text: str) -> StreamEvent:
        assert self._open is not None
        self._open.pieces.append(text)
        return {"type": "content_block_delta", "index": len(self.blocks), "delta": {"type": kind, name: text}}

    def _end(self) -> Iterator[StreamEvent]:
        opened, self._open = self._open, None
        if opened is None:
            return
        index, kind, text = len(self.blocks), opened.block["type"], "".join(opened.pieces)
        whole: Block = {"text": text}
        if kind == "thinking":
            whole = {"thinking": text, "signature": _signature(text)}
            delta = {"type": "signature_delta", "signature": whole["signature"]}
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        elif kind == "tool_use":
            whole = {"input": read_input(text)}
        self.blocks.append({**opened.block, **whole})
        yield {"type": "content_block_stop", "index": index}


def read_input(arguments: str) -> dict[str, Any]:
    """Arguments of a call as an object; what is none is put into one, under `INVALID_JSON`."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: arguments}


def _signature(text: str) -> str:
    """Something to fill the place: clients drop thinking without a signature, and nothing checks it."""
    return blake2b(text.encode("utf-8", "replace"), digest_size=_SIGNATURE_BYTES).hexdigest()
