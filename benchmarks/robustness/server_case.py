"""A case of a suite of requests to a server: what is asked, and what is wrong with the answer.

`server_cases.py` has the cases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jsonschema

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one choice of an answer has.

    Attributes:
        text: Its content, or the text of a completion.
        reasoning: Its reasoning.
        calls: Name and arguments of each call.
        reason: Why it ended.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to a request.

    Attributes:
        status: Of HTTP.
        messages: Its choices, in order.
        error: Of the body, if it is one.
        body: The whole body; of a stream it is empty.
    """

    status: int
    messages: tuple[Message, ...] = ()
    error: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


Check = Callable[[Reply], str | None]
"""Says in a line what is wrong with a reply; None if nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request.

    Attributes:
        name: Says what is tried.
        area: What it is about.
        body: The body; with "messages" a chat completion, else a completion.
        check: Of the reply.
        lacks: Why the case is known to fail; None for one that has to pass.
        needs_copying: Whether the model has to copy what it has seen, which the embedded model does not.
    """

    name: str
    area: Literal["structured output", "tools"]
    body: Body
    check: Check
    lacks: str | None = None
    needs_copying: bool = False


def read_reply(status: int, text: str, *, is_stream: bool) -> Reply:
    """The reply that a response is."""
    if status != 200:
        return Reply(status=status, error=json.loads(text).get("error", {}))
    if not is_stream:
        body = json.loads(text)
        return Reply(status=status, messages=tuple(map(_message, body["choices"])), body=body)
    choices: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        if line.startswith("data: {"):
            for part in json.loads(line[6:])["choices"]:
                _add(choices.setdefault(part["index"], {"message": {"tool_calls": []}}), part)
    return Reply(status=status, messages=tuple(_message(choices[index]) for index in sorted(choices)))


def _add(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    message, delta = choice["message"], part.get("delta", {"content": part.get("text")})
    for name in ("content", "reasoning"):
        message[name] = (message.get(name) or "") + (delta.get(name) or "")
    for call in delta.get("tool_calls") or ():
        if call["index"] == len(message["tool_calls"]):
            message["tool_calls"].append({"function": {"name": call["function"]["name"], "arguments": ""}})
        made = message["tool_calls"][call["index"]]["function"]
        made["arguments"] += call["function"].get("arguments", "")
    choice["finish_reason"] = part.get("finish_reason")


def _message(choice: Mapping[str, Any]) -> Message:
    message = choice.get("message", {"content": choice.get("text")})
    calls = message.get("tool_calls") or ()
    return Message(
        text=message.get("content") or "",
        reasoning=message.get("reasoning") or "",
        calls=tuple((call["function"]["name"], call["function"]["arguments"]) for call in calls),
        reason=choice.get("finish_reason"),
    )


def refused(param: str | None = None) -> Check:
    """The request is refused with status 400, because of this field."""

    def check(reply: Reply) -> str | None:
        if reply.status != 400:
            return f"status {reply.status}"
        found = str(reply.error.get("param"))
        return None if param is None or found.startswith(param) else f"param {found!r}"

    return check


def each(problem: Callable[[Message], str | None], *, count: int = 1) -> Check:
    """There are so many choices, and each is as it should be."""

    def check(reply: Reply) -> str | None:
        if reply.status != 200:
            return f"status {reply.status}: {reply.error.get('message')}"
        if len(reply.messages) != count:
            return f"{len(reply.messages)} choices"
        return next(filter(None, map(problem, reply.messages)), None)

    return check


def valid(schema: Mapping[str, Any], *, reason: str = "stop") -> Callable[[Message], str | None]:
    """The text is JSON of this schema."""

    def check(message: Message) -> str | None:
        return _ended(message, reason) or _invalid(message.text, schema)

    return check


def matches(pattern: str, *, reason: str = "stop") -> Callable[[Message], str | None]:
    """The text matches a regular expression."""

    def check(message: Message) -> str | None:
        is_right = re.fullmatch(pattern, message.text, re.DOTALL)
        return _ended(message, reason) or (None if is_right else f"text {message.text!r}")

    return check


def calls(
    schemas: Mapping[str, Mapping[str, Any]], *, most: int | None = None, reason: str = "tool_calls"
) -> Callable[[Message], str | None]:
    """There are calls, of these functions, whose arguments match the schemas."""

    def check(message: Message) -> str | None:
        if not message.calls or (most is not None and len(message.calls) > most):
            return f"{len(message.calls)} calls, text {message.text!r}"
        for name, arguments in message.calls:
            problem = f"a call of {name}" if name not in schemas else _invalid(arguments, schemas[name])
            if problem:
                return problem
        return _ended(message, reason)

    return check


def text_alone(message: Message) -> str | None:
    """There are no calls."""
    return f"calls {message.calls}" if message.calls else None


def both(*checks: Check) -> Check:
    """All of them."""
    return lambda reply: next(filter(None, (check(reply) for check in checks)), None)


def _ended(message: Message, reason: str) -> str | None:
    return None if message.reason == reason else f"ended by {message.reason}"


def _invalid(text: str, schema: Mapping[str, Any]) -> str | None:
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {str(error).splitlines()[0]}"
    return None
