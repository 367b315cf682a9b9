"""Bodies of answers, as the routes build them and the OpenAPI document shows them.

They are typed dictionaries, so a chunk of a stream costs one dict and one encoding. `protocol.py` has the bodies of
requests; `errors.py` builds the error body.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """Body of every answer that is not a success."""

    error: ErrorDetail


class PromptTokensDetails(TypedDict):
    """Of the tokens of prompts."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of all prompts and all completions of a call; of the prompts, those that were in the KV cache already."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class RankedLogprob(TypedDict):
    """Log probability of one token at a place of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]


class CompletionLogprobs(TypedDict):
    """Lists with one entry for each token; the first token of an echoed prompt has no log probability.

    A token is named by its text, a part of a character by its bytes ("bytes:\\xe2\\x9c"). If alternatives have the same
    name, those after the first are named by their id ("token_id:7"). `text_offset` counts characters of the text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One completion, or what is new in it in a stream.

    What was not asked for is null in a whole answer and absent in a stream. The token ids of the prompt come once.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int] | None]
    prompt_token_ids: NotRequired[list[int] | None]
    prompt_logprobs: NotRequired[PromptLogprobs | None]


class CompletionResponse(TypedDict):
    """Answer of /v1/completions; a stream sends these with `usage` null until the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    """A probable token; `bytes` are its own, also those of a part of a character, which `token` shows as U+FFFD."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """The chosen token and the most probable ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """One entry for each token."""

    content: list[ChatLogprob]


class CalledFunction(TypedDict):
    """Which function is called, with arguments as the model wrote them: JSON, unless it made a mistake."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call that the client shall make; the message with its result has `tool_call_id` from here."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """The assistant's message; what it does not have is null. The content is null only beside calls or reasoning."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None
    reasoning_content: str | None
    tool_calls: list[ToolCall] | None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | None


class ChatCompletionResponse(TypedDict):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None


class CalledFunctionDelta(TypedDict):
    """What is new in a call; the name comes once."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """What is new in a call; id and type come once."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class ChatDelta(TypedDict, total=False):
    """What is new in a message; the role comes once. `reasoning` is vLLM's newer name of `reasoning_content`."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChatChunkChoice(TypedDict):
    """What is new in one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    """One event of a stream of /v1/chat/completions; the first one has the token ids of the prompt."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


class ModelCard(TypedDict):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(TypedDict):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(TypedDict):
    """Token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(TypedDict):
    """Text of token ids."""

    prompt: str


class PrefetchResponse(TypedDict):
    """How much is cached for a request that will come: in the device's memory, and asked for from lower tiers."""

    object: Literal["prefetch"]
    num_tokens: int
    num_cached_tokens: int
    num_prefetched_tokens: int


class TokenizerInfo(TypedDict):
    """Configuration of the tokenizer: what its tokenizer_config.json has, and the chat template in use."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    tokenizer_class: str


class HealthResponse(TypedDict):
    """The engine is alive."""

    status: Literal["ok"]
    heartbeat_age_s: float
    num_running: int
    num_waiting: int


class VersionResponse(TypedDict):
    """Version of nanoflow."""

    version: str


class RootResponse(TypedDict):
    """Where to go from here."""

    name: str
    model: str
    api: str
    docs: str


class Embedding(TypedDict):
    """The vector of one input: its numbers, or their bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingResponse(TypedDict):
    """Body of an answer with vectors."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: Usage
