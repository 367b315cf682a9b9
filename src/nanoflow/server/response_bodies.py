"""Bodies of answers of /v1/responses, as its routes build them and the OpenAPI document shows them."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class InputTokensDetails(TypedDict):
    """Of the tokens of the prompt, those that were in the KV cache already."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """Of the generated tokens, those of the reasoning: counted by its text, without its marks."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens of prompt and answer."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class FailedDetail(TypedDict):
    """Why a response failed in the middle of its stream."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseBody(TypedDict):
    """A response; times are in seconds since 1970. Items and tools are those of OpenAI's API."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    background: Literal[False]
    error: FailedDetail | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class DeletedResponse(TypedDict):
    """A response is forgotten."""

    id: str
    object: Literal["response.deleted"]
    deleted: Literal[True]


class InputItems(TypedDict):
    """A page of the items that a request had as its input."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
