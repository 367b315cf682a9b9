"""The bodies of POST /v1/messages and /v1/messages/count_tokens (Anthropic's Messages API).

`message_chat.py` translates them to chat completions, whose fields have their bounds in `protocol.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from nanoflow.parameters import RequestError
from nanoflow.server.body import RequestBody, Text, WholeNumber, only_types
from nanoflow.server.foreign import Foreign, ForeignFields
from nanoflow.server.parameter import Parameter
from nanoflow.server.protocol import SessionId

_CACHE = Foreign(None, "caches of prompts do not change an answer")
_OF_BLOCKS: ForeignFields = {
    "cache_control": _CACHE,
    "citations": Foreign(([], {"enabled": False}), "notes on the text"),
    "caller": Foreign(({"type": "direct"},), "calls by programs"),
    "toolset_name": Foreign((), "groups of tools"),
}
_OF_TOOLS: ForeignFields = {
    "cache_control": _CACHE,
    "allowed_callers": Foreign((["direct"],), "calls by programs"),
    "defer_loading": Foreign((False,), "tools that are shown later"),
    "eager_input_streaming": Foreign(None, "arguments are always sent as they come"),
    "input_examples": Foreign(([],), "examples of arguments"),
}
OF_MESSAGE_REQUESTS: ForeignFields = {
    "cache_control": _CACHE,
    "billing_policy": Foreign(None, "who pays"),
    "compaction": Foreign((), "conversations that are shortened"),
    "container": Foreign((), "programs that the server runs"),
    "diagnostics": Foreign(None, "wishes about caches, which do not change an answer"),
    "fallback_credit_token": Foreign(None, "who pays"),
    "fallbacks": Foreign(([], "default"), "other models for what the model declines"),
    "inference_geo": Foreign((), "places of servers"),
    "mcp_servers": Foreign(([],), "tools that the server calls"),
    "metadata": Foreign(None, "labels of the client's"),
    "service_tier": Foreign(None, "none of Anthropic's tiers changes something"),
    "speed": Foreign(("standard",), "answers that come sooner"),
    "betas": Foreign(None, "what is not there is refused by name"),
    # By this code Anthropic's clients know that they have to send the whole conversation each time.
    "thread": Foreign((), "conversations that are kept", code="thread_unsupported_request"),
    "user_profile_id": Foreign(None, "a label of the client's"),
    "workspace_id": Foreign(None, "a label of the client's"),
}
"""Fields of bodies of /v1/messages."""


class TextBlock(RequestBody):
    """Text."""

    foreign: ClassVar[ForeignFields] = _OF_BLOCKS

    type: Literal["text"]
    text: Text


class ThinkingBlock(RequestBody):
    """What the assistant thought, as an answer has it; the signature is not looked at."""

    foreign: ClassVar[ForeignFields] = {**_OF_BLOCKS, "signature": Foreign(None, "nothing checks it")}

    type: Literal["thinking"]
    thinking: Text


class ToolUseBlock(RequestBody):
    """A call that the assistant made."""

    foreign: ClassVar[ForeignFields] = _OF_BLOCKS

    type: Literal["tool_use"]
    id: Text
    name: Annotated[Text, Field(min_length=1)]
    input: dict[str, Any]


def _text_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


_Blocks = list[Annotated[TextBlock, BeforeValidator(only_types("blocks", "text"))]]
TextContent = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[_Blocks, Tag("<list>")], Discriminator(_text_or_list)
]


class ToolResultBlock(RequestBody):
    """The result of a call."""

    foreign: ClassVar[ForeignFields] = _OF_BLOCKS

    type: Literal["tool_result"]
    tool_use_id: Text
    content: TextContent | None = None
    is_error: bool | None = Field(None, description="The text of the result then begins with `Error: ` for the model")


_BLOCKS: Mapping[str, type[RequestBody]] = {
    "text": TextBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
    "thinking": ThinkingBlock,
}


def _kind_of_block(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in _BLOCKS else "<text>"


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")],
    Discriminator(_kind_of_block),
    BeforeValidator(only_types("blocks", *_BLOCKS)),
]
BlockContent = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Block], Field(fail_fast=True), Tag("<list>")],
    Discriminator(_text_or_list),
]
# Blocks that a message of a role may have.
_OF_ROLE: Mapping[str, frozenset[str]] = {
    "user": frozenset({"text", "tool_result"}),
    "assistant": frozenset({"text", "tool_use", "thinking"}),
    "system": frozenset({"text"}),
}


class MessageParam(RequestBody):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: BlockContent

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: Any, info: Any) -> Any:
        role = info.data.get("role")
        for block in content if isinstance(content, list) and role else ():
            if block.type not in _OF_ROLE[role]:
                raise RequestError(f"a message of role {role!r} has no blocks of type {block.type!r}")
        return content


class Tool(RequestBody):
    """A function that the model may call."""

    foreign: ClassVar[ForeignFields] = _OF_TOOLS

    type: Literal["custom"] | None = None
    name: Text
    description: Text | None = None
    input_schema: dict[str, Any] = Field(description="JSON schema of the arguments, an object")
    strict: bool | None = None


class AnyToolChoice(RequestBody):
    """Whether the model calls a function, or which."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = Field(None, description="Of the function, with `tool`")
    disable_parallel_tool_use: bool | None = Field(None, description="True: at most one call")

    @model_validator(mode="after")
    def _check_name(self) -> AnyToolChoice:
        if (self.name is not None) != (self.type == "tool"):
            raise RequestError("name: a function is named with type 'tool', and only there", param="name")
        return self


class Thinking(RequestBody):
    """Whether the model thinks before it answers, by the variable `enable_thinking` of its chat template."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: WholeNumber | None = Field(None, ge=0, description="Most tokens of it")
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted leaves it out; otherwise all of it is there"
    )


class OutputConfig(RequestBody):
    """The shape of the answer."""

    effort: Annotated[Text, Field(min_length=1, max_length=32)] | None = Field(
        None, description="How long the model thinks, in the words of its chat template; `high` is the default"
    )
    format: dict[str, Any] | None = Field(None, description='{"type": "json_schema", "schema": ...}')


class MessageCountRequest(RequestBody):
    """Body of POST /v1/messages/count_tokens."""

    foreign: ClassVar[ForeignFields] = OF_MESSAGE_REQUESTS

    messages: Annotated[list[MessageParam], Field(min_length=1, fail_fast=True)]
    model: Text | None = Field(None, description="Name of the served model; may be left out")
    system: TextContent | None = Field(None, description="A system message before everything")
    tools: list[Annotated[Tool, BeforeValidator(only_types("tools", "custom"))]] | None = None
    tool_choice: AnyToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: dict[str, Any] | None = Field(
        None, description="Only edits that change nothing: clear_thinking_20251015 that keeps all"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template")

    @field_validator("context_management")
    @classmethod
    def _check_edits(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        edits = value.get("edits", [])
        harmless = {"type": "clear_thinking_20251015", "keep": "all"}
        if set(value) - {"edits"} or not isinstance(edits, list) or any(edit != harmless for edit in edits):
            raise RequestError("context_management: this server does not shorten conversations")
        return value


class MessageRequest(MessageCountRequest):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Parameter.of("max_tokens")]
    stream: bool | None = None
    stop_sequences: Annotated[Sequence[str] | None, Parameter.of("stop_sequences", "stop")] = None
    temperature: Annotated[float | None, Parameter.of("temperature")] = None
    top_p: Annotated[float | None, Parameter.of("top_p")] = None
    top_k: Annotated[int | None, Parameter.of("top_k")] = None
    min_p: Annotated[float | None, Parameter.of("min_p")] = None
    seed: Annotated[int | None, Parameter.of("seed")] = None
    cache_salt: Text | None = Field(None, min_length=1, description="As in chat completions")
    session_id: SessionId | None = Field(None, description="As in chat completions")

    @field_validator("max_tokens")
    @classmethod
    def _check_max_tokens(cls, value: int | None) -> int:
        if value is None:
            raise RequestError("max_tokens must be an integer, got None")
        return value
