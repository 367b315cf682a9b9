"""The body of /v1/responses as that of a chat completion, and the items of its input as messages.

Items are plain JSON here, each with an id, as they are kept and shown: those of a request and those of earlier answers
become messages by the same rules.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanoflow.engine.conversation import PART_BORDER
from nanoflow.server.response_fields import NamedFunction, ReasoningItem, ResponseRequest
from nanoflow.server.turn import Names

Item = dict[str, Any]
Message = dict[str, Any]

# Where the fields of the chat completion come from.
NAMES: Names = (
    (r"messages\b.*", "input"),
    (r"max_(completion_)?tokens$", "max_output_tokens"),
    (r"response_format\b(?:\.json_schema\b)?(.*)", r"text.format\1"),
    (r"reasoning_effort$", "reasoning.effort"),
    (r"(tools\[\d+\])\.function\b(.*)", r"\1\2"),
)
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_PART_OF_ROLE = {"assistant": "output_text"}


def new_response_id() -> str:
    """An id for a response."""
    return f"resp_{uuid.uuid4().hex}"


def new_item_id(kind: str) -> str:
    """An id for an item, such as "msg_5f..."."""
    return f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"


def input_items(body: ResponseRequest) -> list[Item]:
    """The items of a body's own input, in the form in which items are kept and listed."""
    if isinstance(body.input, str):
        return [_message_item("user", body.input)]
    return [_kept(item.model_dump(exclude_none=True), item) for item in body.input]


# Fields that chat completions have too, with the same meaning.
_SAME = (
    *("model", "parallel_tool_calls", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("chat_template_kwargs", "cache_salt", "session_id", "priority", "service_tier"),
)


def chat_fields(body: ResponseRequest, items: Iterable[Item]) -> dict[str, Any]:
    """The fields of the chat completion.

    Args:
        body: The body.
        items: All of the conversation: those of earlier responses, then its own.
    """
    text_format = None if body.text is None else body.text.format
    choice = body.tool_choice
    named = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedFunction) else choice
    return {
        **{name: getattr(body, name) for name in _SAME},
        "messages": messages_of(body.instructions, items),
        "max_tokens": body.max_output_tokens,
        "tools": [_chat_tool(tool.model_dump(exclude_none=True)) for tool in body.tools or ()] or None,
        "tool_choice": named,
        "response_format": _chat_format(text_format),
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
    }


def messages_of(instructions: str | None, items: Iterable[Item]) -> list[Message]:
    """The messages of a conversation.

    What the assistant said, thought and called between two other items is one message. System and developer messages
    at the beginning are one message with the instructions, since templates take one.
    """
    opening: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    messages: list[Message] = []
    for item in items:
        if item["type"] == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text_content(item["output"])})
        elif item["type"] != "message" or item["role"] == "assistant":
            _add_to_assistant(messages, item)
        else:
            is_opening = item["role"] in ("system", "developer") and not messages
            message = {"role": item["role"], "content": _text_content(item["content"])}
            (opening if is_opening else messages).append(message)
    return [*_merged(opening), *messages]


def _merged(opening: Sequence[Message]) -> Sequence[Message]:
    if len(opening) < 2:
        return opening
    parts = [_parts(message["content"]) for message in opening]
    return [{"role": "system", "content": [part for several in parts for part in several]}]


def _add_to_assistant(messages: list[Message], item: Item) -> None:
    """Add an item to the assistant's message that is last, or begin another one."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    # A text without calls ends a message, unless a call comes next.
    if last is None or (item["type"] != "function_call" and last["content"] is not None and "tool_calls" not in last):
        last = {"role": "assistant", "content": None}
        messages.append(last)
    match item["type"]:
        case "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
        case "reasoning":
            text = _text(item.get("content") or item.get("summary") or ())
            if text:
                last["reasoning"] = _joined(last.get("reasoning"), text)
        case _:
            last["content"] = _joined(last["content"], _text(item["content"]))


def _joined(before: str | None, text: str) -> str:
    return text if before is None else before + PART_BORDER + text


def _text(parts: Sequence[Mapping[str, Any]]) -> str:
    return PART_BORDER.join(part["text"] for part in parts)


def _text_content(parts: str | Sequence[Mapping[str, Any]]) -> str | list[dict[str, str]]:
    """Content of a chat's message; a single part is its text."""
    if isinstance(parts, str):
        return parts
    return parts[0]["text"] if len(parts) == 1 else _parts(parts)


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return [{"type": "text", "text": text} for text in texts]


def _kept(item: Item, model: Any) -> Item:
    """An item of the input with an id, and with content in the form that lists of items have."""
    kind = item["type"]
    if kind == "message":
        return _message_item(item["role"], item["content"])
    more: Item = {} if isinstance(model, ReasoningItem) else {"status": "completed"}
    return {"id": new_item_id(kind), **item, **more}


def _message_item(role: str, content: str | Sequence[Mapping[str, Any]]) -> Item:
    kind = _PART_OF_ROLE.get(role, "input_text")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    notes: Item = {"annotations": []} if kind == "output_text" else {}
    parts = [{"type": kind, "text": text, **notes} for text in texts]
    return {"id": new_item_id("message"), "type": "message", "status": "completed", "role": role, "content": parts}


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _chat_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") != "json_schema":
        return None if given is None else dict(given)
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
