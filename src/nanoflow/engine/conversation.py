"""Check conversations, from `LLM.chat` and over HTTP alike: what a message may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanoflow.parameters import RequestError, did_you_mean, shown

ChatMessage = Mapping[str, Any]
Content = str | Sequence[Mapping[str, Any]]
Conversation = Sequence[ChatMessage]

MAX_ROLE_CHARS = 64
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content")
_PART_FIELDS = ("type", "text")
# Joins the texts of a message's parts for templates that take only one text.
PART_BORDER = "\n"


def read_messages(messages: Conversation, *, takes: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Check messages. An assistant's message without content gets an empty one, as with tool calls.

    Args:
        messages: Each with "role" and "content": a text, or a list of parts {"type": "text", "text": ...}. Of
            `MESSAGE_FIELDS` the others may be there. A field that is None counts as absent.
        takes: Whether the chat template uses a further field; only then may messages and parts have it.

    Raises:
        RequestError: A message is invalid, or has a field that nothing would use; the error names its place.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"a conversation is a list of messages, got {type(messages).__name__}")
    if not messages:
        raise RequestError("a conversation has at least one message")
    return [_read_message(place, message, takes) for place, message in enumerate(messages)]


def joined_text(content: Content | None) -> str:
    """Content as one text, with each part on a line of its own."""
    if content is None or isinstance(content, str):
        return content or ""
    return PART_BORDER.join(part["text"] for part in content)


def text_part(text: str) -> dict[str, str]:
    """A part of content that is text."""
    return {"type": "text", "text": text}


def _read_message(place: int, message: Any, takes: Callable[[str], bool]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{place}] must be a mapping with role and content, got {type(message).__name__}")
    _refuse_unknown(f"messages[{place}]", message, MESSAGE_FIELDS, takes)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not 0 < len(role) <= MAX_ROLE_CHARS:
        raise RequestError(
            f"messages[{place}].role must be a text of 1 to {MAX_ROLE_CHARS} characters, got {role!r:.99}"
        )
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        content = _read_parts(f"messages[{place}].content", content, takes)
    given = {name: value for name, value in message.items() if value is not None}
    calls = read_tool_calls(f"messages[{place}].tool_calls", given.pop("tool_calls", ()), role)
    if calls:
        given["tool_calls"] = calls
    return {**given, "content": content}


def read_tool_calls(name: str, calls: Any, role: str) -> list[dict[str, Any]]:
    """Check the calls of an earlier message, as an answer has them.

    Args:
        name: Of the field, for errors.
        calls: Each {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}; the arguments are JSON
            as text, or an object.
        role: Who has made them: the assistant.

    Returns:
        The calls, with arguments as text. A list without calls is empty.

    Raises:
        RequestError: A call is something else.
    """
    if calls and role != "assistant":
        raise RequestError(f"{name}: only messages of the assistant have calls, not those of role {shown(role)}")
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise RequestError(f"{name} must be a list, got {type(calls).__name__}")
    return [_read_call(f"{name}[{place}]", call) for place, call in enumerate(calls)]


def _read_call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise RequestError(f"{name} must be a call of type 'function' with a function")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"{name}.function.name must be a text, got {shown(function.get('name'))}")
    if not isinstance(call.get("id", ""), str):
        raise RequestError(f"{name}.id must be a text, got {shown(call['id'])}")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{name}.function.arguments must be JSON: {error}") from None
    if arguments is not None and not isinstance(arguments, str):
        raise RequestError(f"{name}.function.arguments must be JSON as text, got {type(arguments).__name__}")
    own = {"type": "function", "function": {**function, "arguments": arguments or "{}"}}
    return {**call, **own}


def _read_parts(name: str, content: Any, takes: Callable[[str], bool]) -> list[dict[str, Any]]:
    if isinstance(content, bytes | Mapping) or not isinstance(content, Sequence):
        raise RequestError(f"{name} must be a text or a list of parts, got {type(content).__name__}")
    if not content:
        raise RequestError(f"{name} has no part")
    return [_read_part(f"{name}[{place}]", part, takes) for place, part in enumerate(content)]


def _read_part(name: str, part: Any, takes: Callable[[str], bool]) -> dict[str, Any]:
    if isinstance(part, str):
        return text_part(part)
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        kind = repr(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"{name} must be a part of type 'text', got {kind}")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{name}.text must be a text, got {type(part.get('text')).__name__}")
    _refuse_unknown(name, part, _PART_FIELDS, takes)
    return {**{name: value for name, value in part.items() if value is not None}, "type": "text"}


def _refuse_unknown(name: str, fields: Mapping[Any, Any], known: Sequence[str], takes: Callable[[str], bool]) -> None:
    """Refuse fields that would be ignored."""
    for field, value in fields.items():
        if field not in known and value is not None and not takes(str(field)):
            raise RequestError(f"{name}: unknown field {shown(field)}{did_you_mean(str(field), known) or ''}")
