"""The body of /v1/messages as that of a chat completion: its blocks as messages, its tools as functions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanoflow.server.message_fields import (
    MessageCountRequest,
    MessageParam,
    MessageRequest,
    TextBlock,
    Thinking,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
)
from nanoflow.server.turn import Names

Message = dict[str, Any]

# Where the fields of the chat completion come from.
NAMES: Names = (
    (r"max_(completion_)?tokens$", "max_tokens"),
    (r"stop$", "stop_sequences"),
    (r"response_format\b(?:\.json_schema\b)?(.*)", r"output_config.format\1"),
    (r"reasoning_effort$", "output_config.effort"),
    (r"thinking_token_budget$", "thinking.budget_tokens"),
    (r"(tools\[\d+\])\.function\.parameters\b(.*)", r"\1.input_schema\2"),
    (r"(tools\[\d+\])\.function\b(.*)", r"\1\2"),
)
_CHOICES: Mapping[str, str] = {"auto": "auto", "any": "required", "none": "none"}
_ERROR = "Error: "
# By Anthropic's API the same as none. Some clients always send it.
DEFAULT_EFFORT = "high"


def chat_fields(body: MessageCountRequest, *, takes_effort: bool = True) -> dict[str, Any]:
    """The fields of the chat completion.

    Args:
        body: The body.
        takes_effort: Whether the model's chat template knows reasoning efforts; if not, the default has no effect.
    """
    choice, config = body.tool_choice, body.output_config
    effort = None if config is None else config.effort
    named = choice is not None and choice.type == "tool"
    return {
        "model": body.model,
        "messages": messages_of(body),
        "tools": [_chat_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": None
        if choice is None
        else {"type": "function", "function": {"name": choice.name}}
        if named
        else _CHOICES[choice.type],
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "reasoning_effort": None if effort == DEFAULT_EFFORT and not takes_effort else effort,
        "response_format": None if config is None else _chat_format(config.format),
        **_continued(body.messages[-1]),
        **_thinking(body.thinking, body.chat_template_kwargs),
        **(_sampling(body) if isinstance(body, MessageRequest) else {}),
    }


def messages_of(body: MessageCountRequest) -> list[Message]:
    """The messages of a conversation; results of calls become messages of their own."""
    system = [] if body.system is None else [{"role": "system", "content": _content(body.system)}]
    return [*system, *(made for message in body.messages for made in _messages(message))]


def _sampling(body: MessageRequest) -> dict[str, Any]:
    same = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "cache_salt", "session_id")
    return {**{name: getattr(body, name) for name in same}, "stop": body.stop_sequences or None}


def _messages(message: MessageParam) -> Iterator[Message]:
    content = message.content
    if isinstance(content, str):
        yield {"role": message.role, "content": content}
    elif message.role == "assistant":
        yield _assistant(content)
    else:
        yield from _user(message.role, content)


def _user(role: str, blocks: Sequence[Any]) -> Iterator[Message]:
    """Results in their order, each a message, and the texts between them."""
    texts: list[TextBlock] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            if texts:
                yield {"role": role, "content": _content(texts)}
                texts = []
            yield _result(block)
        else:
            texts.append(block)
    if texts or not blocks:
        yield {"role": role, "content": _content(texts)}


def _assistant(blocks: Sequence[Any]) -> Message:
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    message: Message = {"role": "assistant", "content": _content(texts) if texts else None}
    if any(thoughts):
        message["reasoning"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _result(block: ToolResultBlock) -> Message:
    content = _content(block.content or "")
    if block.is_error:
        first = {"type": "text", "text": _ERROR.rstrip()}
        content = _ERROR + content if isinstance(content, str) else [first, *content]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _content(content: str | Sequence[TextBlock]) -> str | list[dict[str, str]]:
    """Content of a chat's message; a single block is its text."""
    if isinstance(content, str):
        return content
    if len(content) < 2:
        return content[0].text if content else ""
    return [{"type": "text", "text": block.text} for block in content]


def _continued(last: MessageParam) -> dict[str, Any]:
    """A last message of the assistant is continued, if it ends with text."""
    ends_with_text = isinstance(last.content, str) or (bool(last.content) and last.content[-1].type == "text")
    return {"continue_final_message": True} if last.role == "assistant" and ends_with_text else {}


def _thinking(thinking: Thinking | None, variables: Mapping[str, Any] | None) -> dict[str, Any]:
    if thinking is None:
        return {"chat_template_kwargs": variables}
    return {
        "chat_template_kwargs": {"enable_thinking": thinking.type != "disabled", **(variables or {})},
        "include_reasoning": False if thinking.display == "omitted" else None,
        "thinking_token_budget": thinking.budget_tokens,
    }


def _chat_tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    more = {"description": tool.description, "strict": tool.strict}
    given = {name: value for name, value in more.items() if value is not None}
    return {"type": "function", "function": {**function, **given}}


def _chat_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") != "json_schema":
        return None if given is None else dict(given)
    rest = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": {"name": "answer", **rest}}
