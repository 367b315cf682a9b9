"""What a chat completion has of the model's text: content, reasoning and calls, in a stream and as a whole.

`chat_formats/parser.py` finds them. A whole answer is read by the same code as a stream, in one piece.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoflow.chat_formats.choice import choose_format
from nanoflow.chat_formats.events import ArgumentsDelta, CallEnded, CallStarted, ContentDelta, Event, ReasoningDelta
from nanoflow.chat_formats.formats import ChatFormat
from nanoflow.chat_formats.grammar import answer_grammar, grammar_of
from nanoflow.chat_formats.parser import ChatParser
from nanoflow.chat_formats.tools import Calling, tool_names
from nanoflow.engine.prompts import Prompt
from nanoflow.engine.reasoning import opens_reasoning
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import FinishReason
from nanoflow.request import SamplingParams
from nanoflow.server.backend import AnyPrompt
from nanoflow.server.errors import ApiError, user_errors
from nanoflow.server.generation import Delta
from nanoflow.server.protocol import ChatCompletionRequest
from nanoflow.server.responses import ChatDelta, ChatMessage, ToolCall, ToolCallDelta
from nanoflow.server.service import Service
from nanoflow.structured import Structured

CALLS_REASON = "tool_calls"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the messages of one call are read.

    Attributes:
        form: The format.
        names: Functions that may be called.
        parameters: Schemas of their arguments, by name.
        is_required: Whether a message without a call is an error.
        is_reasoning: Whether the prompt has opened a section of reasoning; None if it says nothing about it.
        hidden: Names of special tokens that are left out of texts.
        max_calls: Calls after so many are dropped; None for no limit.
        shows_reasoning: Whether answers have the reasoning.
    """

    form: ChatFormat
    names: Sequence[str] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    is_required: bool = False
    is_reasoning: bool | None = None
    hidden: frozenset[str] = frozenset()
    max_calls: int | None = None
    shows_reasoning: bool = True

    def begin(self) -> MessageReader:
        """A reader of one message."""
        parser = ChatParser(
            self.form,
            names=self.names,
            parameters=self.parameters,
            is_reasoning=self.is_reasoning,
            hidden=self.hidden,
            max_calls=self.max_calls,
        )
        return MessageReader(parser, self)


@dataclass(slots=True, kw_only=True)
class Found:
    """What is new in a message. Of a whole message it is all of it, so its calls have ids and names.

    Attributes:
        content, reasoning: New text.
        calls: New calls, and more of the arguments of earlier ones.
        events: All of these in the order of the text.
        finish_reason: Why the message ended; None if it has not.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def is_content(self) -> bool:
        """True if it has content alone."""
        return not (self.reasoning or self.calls or self.finish_reason)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to send."""
        return self.is_content and not self.content

    @property
    def delta(self) -> ChatDelta:
        """What a chunk of a stream has."""
        delta: ChatDelta = {"content": self.content} if self.content or not (self.reasoning or self.calls) else {}
        if self.reasoning:
            delta["reasoning"] = delta["reasoning_content"] = self.reasoning
        if self.calls:
            delta["tool_calls"] = self.calls
        return delta

    def message(self, echoed: str = "") -> ChatMessage:
        """The whole message, behind an echoed text."""
        text = echoed + self.content
        return {
            "role": "assistant",
            "content": text or (None if self.calls or self.reasoning else ""),
            "refusal": None,
            "reasoning": self.reasoning or None,
            "reasoning_content": self.reasoning or None,
            "tool_calls": [_whole(call) for call in self.calls] or None,
        }


class MessageReader:
    """Reads one message as it comes."""

    __slots__ = ("_is_last_whole", "_num_calls", "_parser", "_reading")

    def __init__(self, parser: ChatParser, reading: Reading) -> None:
        self._parser, self._reading = parser, reading
        self._num_calls = 0
        self._is_last_whole = False

    def read(self, delta: Delta) -> Found:
        """Read what is new in a completion.

        Raises:
            ApiError: A call is required, and the message has ended without one (500).
        """
        events = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.finish()
        found = Found()
        for event in events:
            self._add(found, event)
        found.finish_reason = delta.finish_reason
        if delta.finish_reason is FinishReason.STOP:
            # A stop string may also have cut a call off.
            if self._is_last_whole or (self._num_calls and not isinstance(delta.stop_reason, str)):
                found.finish_reason = CALLS_REASON
            elif self._reading.is_required:
                message = "tool_choice requires a call, but the model has written none"
                raise ApiError(500, message, param="tool_choice", code="tool_call_missing")
        return found

    def _add(self, found: Found, event: Event) -> None:
        if self._reading.shows_reasoning or not isinstance(event, ReasoningDelta):
            found.events.append(event)
        match event:
            case ContentDelta(text):
                found.content += text
            case ReasoningDelta(text) if self._reading.shows_reasoning:
                found.reasoning += text
            case CallStarted(index, call_id, name):
                self._num_calls += 1
                call: ToolCallDelta = {
                    "index": index,
                    "id": call_id,
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
                found.calls.append(call)
            case ArgumentsDelta(index, text):
                if not found.calls or found.calls[-1]["index"] != index:
                    found.calls.append({"index": index, "function": {"arguments": ""}})
                found.calls[-1]["function"]["arguments"] += text
            case CallEnded(_, is_whole):
                self._is_last_whole = is_whole


def found_in(delta: Delta, reader: MessageReader | None) -> Found:
    """What is new in a message; without a reader all text is content."""
    if reader is not None:
        return reader.read(delta)
    events: list[Event] = [ContentDelta(delta.text)] if delta.text else []
    return Found(content=delta.text, events=events, finish_reason=delta.finish_reason)


def _whole(call: ToolCallDelta) -> ToolCall:
    function = call["function"]
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": function["arguments"]},
    }


def reading_of(service: Service, body: ChatCompletionRequest, params: SamplingParams) -> Reading | None:
    """How the messages of a call are read; None if the whole text is content.

    Raises:
        ApiError: There are tools, and the format of the model's calls is not known (400).
    """
    tokenizer = service.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        return None
    tools, choice, config = body.callable_tools, body.choice, service.config
    with user_errors("messages"):
        template = tokenizer.chat_templates.get(body.chat_template, has_tools=bool(tools)).text
    form = choose_format(template, config.tool_call_parser, config.reasoning_parser)
    if tools and form.calls is None:
        message = (
            "tools: in which format this model writes calls cannot be told from its chat template; the server's option "
            "--tool-call-parser names it"
        )
        raise ApiError(400, message, param="tools")
    if form.is_plain or (not tools and form.reasoning is None and form.channels is None):
        return None
    return Reading(
        form=form,
        names=tool_names(tools),
        parameters={tool["function"]["name"]: tool["function"].get("parameters") for tool in tools},
        is_required=choice.calling is Calling.REQUIRED,
        hidden=frozenset(tokenizer.special_names) if params.skip_special_tokens else frozenset(),
        max_calls=1 if body.parallel_tool_calls is False else None,
        shows_reasoning=body.include_reasoning is not False,
    )


def after_prompt(reading: Reading, service: Service, body: ChatCompletionRequest, prompt: Sequence[int]) -> Reading:
    """The same, with what the prompt says of reasoning: its template may have opened it, or closed it already."""
    tags = reading.form.reasoning
    if tags is not None and body.continue_final_message:
        text = body.messages[-1].text
        opened, closed = text.rfind(tags.opener), text.rfind(tags.closer)
        is_reasoning = opened > closed if max(opened, closed) >= 0 else None
    else:
        is_reasoning = opens_reasoning(reading.form, service.tokenizer, prompt)
    return dataclasses.replace(reading, is_reasoning=is_reasoning)


def with_form(prompt: list[int], reading: Reading | None, params: SamplingParams) -> AnyPrompt:
    """A prompt, with what is known of how the model goes on, if its reasoning is to be bounded."""
    if params.thinking_token_budget is None:
        return prompt
    # Without a reading there are no marks, and the request is refused.
    form = ChatFormat() if reading is None else reading.form
    is_reasoning = None if reading is None else reading.is_reasoning
    return Prompt(text=None, token_ids=prompt, form=form, is_reasoning=is_reasoning)


def params_for(
    reading: Reading, service: Service, body: ChatCompletionRequest, params: SamplingParams
) -> SamplingParams:
    """Parameters of the engine: the text has the special tokens that mark calls and reasoning.

    A grammar holds the model to a required call, and arguments to their schema: those of required calls, and those of
    strict functions.

    Raises:
        ApiError: The call also asks for another shape of the text, with which calls cannot be (400).
    """
    params, tokenizer = dataclasses.replace(params, skip_special_tokens=False), service.tokenizer
    special = tokenizer.mark_names if isinstance(tokenizer, Tokenizer) else {}
    grammar = grammar_of(
        reading.form,
        body.callable_tools,
        body.choice,
        special=special,
        is_reasoning=reading.is_reasoning,
        is_parallel=body.parallel_tool_calls is not False,
        answer=_answer_schema(params.structured_outputs),
    )
    if grammar is None:
        return dataclasses.replace(params, structured_outputs=_behind_reasoning(reading, params, special))
    if params.structured_outputs is not None and body.choice.calling is Calling.REQUIRED:
        message = "tool_choice asks for a call, which is no text of another shape: leave one of them out"
        raise ApiError(400, message, param="tool_choice")
    if params.structured_outputs is not None and _answer_schema(params.structured_outputs) is None:
        message = "beside strict functions the answer can have a JSON schema, but no other shape"
        raise ApiError(400, message, param=body.field_names["structured_outputs"])
    parts = () if params.structured_outputs is None else (params.structured_outputs,)
    return dataclasses.replace(params, structured_outputs=Structured(kind="grammar", text=grammar, parts=parts))


def _behind_reasoning(reading: Reading, params: SamplingParams, special: Mapping[str, int]) -> Structured | None:
    """The shape of a whole text whose answer has a shape: reasoning may come before it."""
    structured = params.structured_outputs
    if structured is None:
        return None
    grammar = answer_grammar(reading.form, structured, special=special, is_reasoning=reading.is_reasoning)
    return structured if grammar is None else Structured(kind="grammar", text=grammar, parts=(structured,))


def _answer_schema(structured: Structured | None) -> Mapping[str, Any] | None:
    """The JSON schema of an answer; None if it has no shape, or another."""
    if structured is None or structured.kind != "json":
        return None
    schema: Mapping[str, Any] = json.loads(structured.text)
    return schema
