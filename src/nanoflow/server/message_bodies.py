"""Bodies of answers of /v1/messages, as its routes build them and the OpenAPI document shows them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12


class MessageErrorCode(TypedDict):
    """A word for programs."""

    error_code: str


class MessageErrorDetail(TypedDict):
    """What went wrong; `param` names the field, where it is known, and `details` has a code, where there is one."""

    type: str
    message: str
    param: NotRequired[str]
    details: NotRequired[MessageErrorCode]


class MessageError(TypedDict):
    """Body of every answer that is not a success."""

    type: Literal["error"]
    error: MessageErrorDetail


class ThinkingTokens(TypedDict):
    """Of the generated tokens, those of the reasoning: counted by its text, without its marks."""

    thinking_tokens: int


class MessageUsage(TypedDict):
    """Tokens of prompt and answer; `input_tokens` leaves out those that were in the KV cache already."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: NotRequired[ThinkingTokens]


class MessageBody(TypedDict):
    """The assistant's message. Blocks are those of Anthropic's API: text, thinking and tool_use."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    """Tokens of a prompt."""

    input_tokens: int
