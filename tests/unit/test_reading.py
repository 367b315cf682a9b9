"""What a chat completion has of the model's text, apart from HTTP."""

from __future__ import annotations

import pytest

from nanoflow.outputs import FinishReason
from nanoflow.server.generation import Delta
from nanoflow.server.reading import Reading
from tests.chat_texts import NAMES, THINKS_HERMES

WHOLE = '<tool_call>{"name": "add", "arguments": {"a": 1}}'
READING = Reading(form=THINKS_HERMES, names=NAMES)


def delta(text: str, reason: FinishReason | None = None, stop: str | int | None = None) -> Delta:
    return Delta(is_first=False, text=text, token_ids=[1], logprobs=None, finish_reason=reason, stop_reason=stop)


@pytest.mark.parametrize(
    "text, reason, stop, expected",
    [
        (WHOLE + "</tool_call>", FinishReason.STOP, None, "tool_calls"),
        (WHOLE, FinishReason.STOP, "</tool_call>", "tool_calls"),
        (WHOLE[:-4], FinishReason.STOP, "1", "stop"),
        (WHOLE[:-4], FinishReason.STOP, 7, "tool_calls"),
        (WHOLE, FinishReason.LENGTH, None, "length"),
        ("text", FinishReason.STOP, None, "stop"),
        (WHOLE, FinishReason.ABORT, None, "abort"),
    ],
)
def test_why_a_message_ended(text: str, reason: FinishReason, stop: str | int | None, expected: str) -> None:
    """A stop string may cut a call off: then the message has not ended with a call."""
    assert READING.begin().read(delta(text, reason, stop)).finish_reason == expected


def test_a_call_in_pieces_has_its_name_once() -> None:
    reader = READING.begin()
    assert reader.read(delta("<tool_call>")).is_empty
    (first,) = reader.read(delta('{"name": "add", "arguments": {"a"')).calls
    assert first["function"] == {"name": "add", "arguments": '{"a"'} and first["index"] == 0 and first["id"]
    assert reader.read(delta(": 1}")).calls == [{"index": 0, "function": {"arguments": ": 1}"}}]
    assert reader.read(delta("}</tool_call>", FinishReason.STOP)).calls == []
