"""Output of /v1/responses and /v1/messages: a stream has what a whole answer has, however the text comes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.chat_formats.events import Event
from nanoflow.chat_formats.parser import ChatParser
from nanoflow.server.message_events import INVALID_JSON, MessageContent, read_input, stop_reason
from nanoflow.server.response_events import ResponseOutput
from tests.chat_texts import CASES, FORMATS, NAMES

TEXTS = [(form, text) for form, text, _ in CASES.values()]


def parsed(form: str, pieces: list[str]) -> list[list[Event]]:
    """The events of a text that comes in pieces, those of each piece apart."""
    parser = ChatParser(FORMATS[form], names=NAMES, new_id=lambda _style: "call_1")
    return [*map(parser.push, pieces), parser.finish()]


def without_ids(value: Any) -> Any:
    """Ids of items are new each time."""
    return json.loads(re.sub(r"(msg|rs|fc)_[0-9a-f]{32}", r"\1_x", json.dumps(value)))


def response_of(events: list[list[Event]], *, is_cut: bool = False) -> tuple[list[Any], list[Any]]:
    """The items of a response, and those that its stream makes."""
    output = ResponseOutput()
    stream = [event for piece in events for event in output.push(piece)] + output.finish(is_cut=is_cut)
    return output.items, streamed_items(stream)


def streamed_items(stream: list[Any]) -> list[Any]:
    """What a client has that adds up the deltas, and takes only the status from the end of an item."""
    items: list[Any] = []
    for event in stream:
        kind, index = event["type"].removeprefix("response."), event["output_index"]
        if kind == "output_item.added":
            assert index == len(items) and event["item"]["status"] == "in_progress"
            items.append(json.loads(json.dumps(event["item"])))
            continue
        item = items[index]
        assert index == len(items) - 1 and event.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            item["content"].append(dict(event["part"]))
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            assert event["delta"]
            item["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert event["item"] == item
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == item["arguments"] and event["name"] == item["name"]
        elif kind == "content_part.done":
            assert event["part"] == item["content"][0]
        else:
            assert kind in ("output_text.done", "reasoning_text.done")
            assert event["text"] == item["content"][0]["text"]
    return items


def message_of(events: list[list[Event]]) -> tuple[list[Any], list[Any]]:
    """The blocks of a message, and those that its stream makes."""
    content = MessageContent()
    stream = [event for piece in events for event in content.push(piece)] + content.finish()
    return content.blocks, streamed_blocks(stream)


def streamed_blocks(stream: list[Any]) -> list[Any]:
    blocks: list[Any] = []
    arguments: dict[int, str] = {}
    is_open = False
    for event in stream:
        index = event["index"]
        if event["type"] == "content_block_start":
            assert not is_open and index == len(blocks)
            blocks.append(dict(event["content_block"]))
            is_open = True
            continue
        assert is_open and index == len(blocks) - 1
        match event:
            case {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": text}}:
                arguments[index] = arguments.get(index, "") + text
            case {"type": "content_block_delta", "delta": {"type": kind, **rest}}:
                ((name, text),) = rest.items()
                assert kind == f"{name}_delta" and text
                blocks[index][name] += text
            case _:
                assert event["type"] == "content_block_stop"
                is_open = False
                if blocks[index]["type"] == "tool_use":
                    blocks[index]["input"] = read_input(arguments.get(index, ""))
    assert not is_open
    return blocks


@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(TEXTS), cuts=st.lists(st.integers(0, 300), max_size=12))
def test_a_stream_in_any_pieces_is_the_whole_answer(case: tuple[str, str], cuts: list[int]) -> None:
    form, text = case
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    makers: list[Callable[[list[list[Event]]], tuple[list[Any], list[Any]]]] = [response_of, message_of]
    for make in makers:
        whole, _ = make(parsed(form, [text]))
        found, streamed = make(parsed(form, pieces))
        assert without_ids(whole) == without_ids(found)
        assert found == streamed


TWO_CALLS = CASES["hermes two calls"][1]


def test_items_have_the_order_of_the_text() -> None:
    items, _ = response_of(parsed("hermes", [TWO_CALLS]), is_cut=True)
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call", "message"]
    assert [item["status"] for item in items] == ["completed"] * 4 + ["incomplete"]
    # The line break between two texts of a message is none of a text of its own.
    assert [item["content"][0]["text"] for item in (items[1], items[4])] == ["I look.", "Done."]
    blocks, _ = message_of(parsed("hermes", [TWO_CALLS]))
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use", "text"]
    assert blocks[0]["signature"] and blocks[2]["input"]["city"] == "Paris é 東京 🌧" and blocks[4]["text"] == "Done."


def test_a_call_that_is_cut_off_is_incomplete() -> None:
    """Whoever makes the calls of a response must not take such a one for whole."""
    text = TWO_CALLS[: TWO_CALLS.index("Paris")]
    items, streamed = response_of(parsed("hermes", [text]), is_cut=True)
    assert items == streamed and items[-1]["type"] == "function_call"
    assert [item["status"] for item in items] == ["completed", "completed", "incomplete"]


def test_a_response_without_text_has_an_empty_message() -> None:
    items, streamed = response_of([[]])
    assert items == streamed and items[0]["type"] == "message" and items[0]["content"][0]["text"] == ""
    assert message_of([[]]) == ([], [])


@pytest.mark.parametrize(
    "finish, stop, expected",
    [
        ("stop", None, "end_turn"),
        ("stop", "x", "stop_sequence"),
        ("length", None, "max_tokens"),
        ("tool_calls", None, "tool_use"),
        ("tool_calls", "</tool_call>", "tool_use"),
    ],
)
def test_why_a_message_ended(finish: str, stop: str | None, expected: str) -> None:
    assert stop_reason(finish, stop) == expected


def test_arguments_that_are_no_object_are_kept() -> None:
    assert read_input('{"a": 1}') == {"a": 1}
    assert read_input('{"a": oops') == {INVALID_JSON: '{"a": oops'} and read_input("[1]") == {INVALID_JSON: "[1]"}
