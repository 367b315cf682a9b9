"""Request bodies of the OpenAI-compatible API, with the bounds of every field.

Optional fields default to None, which means the value that the model recommends, else the default of `SamplingParams`.
Defaults and allowed values of parameters are defined only there (`KINDS`). Unknown fields are refused, except fields of
other servers with values that have no effect (`foreign.py`). `conversation_fields.py` has messages, `responses.py` has
bodies of answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nanoflow.models.generation import NO_DEFAULTS, SamplingDefaults
from nanoflow.parameters import RequestError
from nanoflow.request import KINDS, SamplingParams
from nanoflow.server.body import RequestBody, Text, TokenId, read_ids
from nanoflow.server.conversation_fields import Conversation, Message
from nanoflow.server.foreign import (
    OF_GENERATION,
    OF_STREAMS,
    OF_TOKENS,
    ForeignFields,
)
from nanoflow.server.parameter import Parameter
from nanoflow.server.priority_fields import PriorityFields
from nanoflow.server.prompt_fields import PromptFields
from nanoflow.server.reasoning_fields import ReasoningFields
from nanoflow.structured import SPELLINGS, Structured

MAX_SESSION_ID_CHARS = 256
_SHAPE = "structured_outputs"

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), BeforeValidator(read_ids)]
# `call_bounds.py` bounds their number before this is checked.
Texts = Annotated[list[Text], Field(min_length=1)]
SessionId = Annotated[Text, Field(min_length=1, max_length=MAX_SESSION_ID_CHARS)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]


def _kind_of_prompt(value: Any) -> str:
    """Decide which of its four forms a prompt has, so that an error is about that form."""
    if not isinstance(value, list):
        return "<text>"
    kinds: dict[type, str] = {str: "<texts>", list: "<token id lists>"}
    return kinds.get(type(value[0]), "<token ids>") if value else "<token ids>"


PromptField = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Texts, Tag("<texts>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[TokenIdLists, Tag("<token id lists>")],
    Discriminator(_kind_of_prompt),
]


def listed(prompt: Any) -> list[str | list[int]]:
    """The prompts of a field in any of its forms."""
    is_several = isinstance(prompt, list) and isinstance(prompt[0], str | list)
    return list(prompt) if is_several else [prompt]


class StreamOptions(RequestBody):
    """Options of a stream."""

    foreign: ClassVar[ForeignFields] = OF_STREAMS

    include_usage: bool | None = Field(None, description="Send token counts in a last chunk that has no choices")
    continuous_usage_stats: bool | None = Field(None, description="With include_usage, send them in every chunk too")


class SamplingFields(PriorityFields, PromptFields, RequestBody):
    """What completions and chat completions have in common."""

    foreign: ClassVar[ForeignFields] = OF_GENERATION

    model: Text | None = Field(None, description="Name of the served model; may be left out")
    n: Annotated[int | None, Parameter.of("n")] = None
    temperature: Annotated[float | None, Parameter.of("temperature")] = None
    top_p: Annotated[float | None, Parameter.of("top_p")] = None
    top_k: Annotated[int | None, Parameter.of("top_k")] = Field(None, description="0 or -1 keeps all tokens")
    min_p: Annotated[float | None, Parameter.of("min_p")] = None
    seed: Annotated[int | None, Parameter.of("seed")] = None
    repetition_penalty: Annotated[float | None, Parameter.of("repetition_penalty")] = None
    presence_penalty: Annotated[float | None, Parameter.of("presence_penalty")] = None
    frequency_penalty: Annotated[float | None, Parameter.of("frequency_penalty")] = None
    logit_bias: Annotated[Mapping[int, float] | None, Parameter.of("logit_bias")] = None
    allowed_token_ids: Annotated[Sequence[int] | None, Parameter.of("allowed_token_ids", low=0)] = Field(
        None, description="Only these tokens may be generated"
    )
    bad_words: Annotated[Sequence[str] | None, Parameter.of("bad_words")] = Field(
        None, description="Strings that may not be generated"
    )
    stop: Annotated[Sequence[str] | None, Parameter.of("stop")] = None
    stop_token_ids: Annotated[Sequence[int] | None, Parameter.of("stop_token_ids", low=0)] = None
    ignore_eos: Annotated[bool | None, Parameter.of("ignore_eos")] = None
    min_tokens: Annotated[int | None, Parameter.of("min_tokens")] = None
    prompt_logprobs: Annotated[int | None, Parameter.of("prompt_logprobs")] = None
    skip_special_tokens: Annotated[bool | None, Parameter.of("skip_special_tokens")] = None
    include_stop_str_in_output: Annotated[bool | None, Parameter.of("include_stop_str_in_output")] = None
    response_format: Annotated[Structured | None, Parameter.of_structured("response_format")] = Field(
        None, description="The shape of the answer, as OpenAI has it"
    )
    structured_outputs: Annotated[Structured | None, Parameter.of_structured("structured_outputs")] = Field(
        None, description="The shape of the answer: one of json, regex, choice, grammar, structural_tag, json_object"
    )
    guided_json: Annotated[Structured | None, Parameter.of_structured("guided_json")] = Field(
        None, description="As json in structured_outputs"
    )
    guided_regex: Annotated[Structured | None, Parameter.of_structured("guided_regex")] = Field(
        None, description="As regex in structured_outputs"
    )
    guided_choice: Annotated[Structured | None, Parameter.of_structured("guided_choice")] = Field(
        None, description="As choice in structured_outputs"
    )
    guided_grammar: Annotated[Structured | None, Parameter.of_structured("guided_grammar")] = Field(
        None, description="As grammar in structured_outputs"
    )
    cache_salt: Text | None = Field(
        None, min_length=1, description="Cached pages are shared only between requests that have the same one, or none"
    )
    session_id: SessionId | None = Field(
        None, description="Name of the conversation, for /v1/prefetch; the header x-session-id if not given"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def field_names(self) -> Mapping[str, str]:
        """Field that a parameter of the engine came in, where it has another name."""
        return dict(zip((_SHAPE,), self._shapes, strict=False))

    @property
    def _shapes(self) -> Mapping[str, Structured]:
        """The shapes that are asked for, by field; at most one."""
        return {name: shape for name in SPELLINGS if (shape := getattr(self, name)) is not None}

    @property
    def has_usage_chunk(self) -> bool:
        """True if a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def has_continuous_usage(self) -> bool:
        """True if every chunk of a stream has token counts."""
        return (
            self.has_usage_chunk
            and self.stream_options is not None
            and bool(self.stream_options.continuous_usage_stats)
        )

    @model_validator(mode="after")
    def _check_shape(self) -> SamplingFields:
        if len(self._shapes) > 1:
            first, second, *_ = self._shapes
            raise RequestError(f"{first} and {second} both say what shape the answer has: give one", param=second)
        return self

    @model_validator(mode="after")
    def _check_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is not available in a stream", param="prompt_logprobs")
        return self

    def sampling(self, defaults: SamplingDefaults, **more: Any) -> SamplingParams:
        """Parameters for the engine: the model's defaults, replaced by the given fields, replaced by `more`.

        Raises:
            RequestError: The fields contradict each other.
        """
        # Fields about the prompt's tokens are applied by the server itself.
        common = (SamplingFields.model_fields.keys() & KINDS.keys()) - PromptFields.model_fields.keys()
        given = {name: value for name in common if (value := getattr(self, name)) is not None}
        given |= dict(zip((_SHAPE,), self._shapes.values(), strict=False))
        return defaults.params({**given, **more})


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: PromptField = Field(description="A text, a list of texts, token ids, or a list of token id lists")
    max_tokens: Annotated[int | None, Parameter.of("max_tokens", low=0)] = Field(
        None, description="16 if not given; 0 only with echo"
    )
    echo: bool | None = Field(None, description="Put the prompt before the completion, in text and in logprobs")
    logprobs: Annotated[int | None, Parameter.of("logprobs")] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, in order."""
        return listed(self.prompt)

    @property
    def is_echo_only(self) -> bool:
        """True if only the prompt is asked for, without a completion."""
        return self.max_tokens == 0

    @model_validator(mode="after")
    def _check_echo_only(self) -> CompletionRequest:
        if self.is_echo_only and not self.echo:
            raise RequestError("max_tokens must be at least 1 unless echo is true", param="max_tokens")
        return self

    def to_params(self, *, defaults: SamplingDefaults = NO_DEFAULTS, can_detokenize: bool = True) -> SamplingParams:
        """Parameters for the engine. It always generates a token, which is hidden with `is_echo_only`."""
        more: dict[str, Any] = {"logprobs": self.logprobs, "detokenize": can_detokenize}
        if self.max_tokens is not None:
            more["max_tokens"] = max(self.max_tokens, 1)
        if self.echo and self.logprobs is not None:
            more["prompt_logprobs"] = _more_logprobs(self.logprobs, self.prompt_logprobs)
        return self.sampling(defaults, **more)


def _more_logprobs(one: int, other: int | None) -> int:
    return -1 if -1 in (one, other) else max(one, other or 0)


class ChatCompletionRequest(SamplingFields, Conversation, ReasoningFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    echo: bool | None = Field(None, description="Put a last message of the assistant before the answer")
    max_tokens: Annotated[int | None, Parameter.of("max_tokens")] = Field(
        None, description="Up to the context length if not given"
    )
    max_completion_tokens: Annotated[int | None, Parameter.of("max_completion_tokens", "max_tokens")] = Field(
        None, description="Goes before max_tokens"
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call; true if not given")
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Parameter.of("top_logprobs", "logprobs")] = Field(
        None, description="Needs logprobs=true"
    )

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise RequestError("top_logprobs needs logprobs=true")
        return value

    @property
    def field_names(self) -> Mapping[str, str]:
        """Field that a parameter of the engine came in, where it has another name."""
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        names = {"prompt": "messages", "max_tokens": limit, "logprobs": "top_logprobs"}
        return {**super().field_names, **names, "thinking_token_budget": self.budget_field}

    @property
    def echoed(self) -> str:
        """The text that is put before the answer."""
        last = self.messages[-1]
        return last.text if self.echo and last.role == "assistant" else ""

    def to_params(self, *, defaults: SamplingDefaults = NO_DEFAULTS, can_detokenize: bool = True) -> SamplingParams:
        """Parameters for the engine."""
        return self.sampling(
            defaults,
            detokenize=can_detokenize,
            max_tokens=self.max_completion_tokens or self.max_tokens or defaults.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            thinking_token_budget=self.given_budget,
        )


class TokenizeRequest(Conversation):
    """Body of POST /tokenize: a prompt or messages."""

    foreign: ClassVar[ForeignFields] = OF_TOKENS

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(None, description="True if not given for a prompt, false for messages")
    return_token_strs: bool | None = Field(None, description="Send the tokens as the vocabulary has them too")

    @model_validator(mode="after")
    def _check_one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        return self


class PrefetchRequest(Conversation):
    """Body of POST /v1/prefetch: a prompt, messages, or the session whose next request will come."""

    foreign: ClassVar[ForeignFields] = OF_GENERATION

    model: Text | None = Field(None, description="Name of the served model; may be left out")
    prompt: PromptField | None = Field(None, description="A text or token ids, as the next completion will have")
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="As the next chat completion will have"
    )
    add_special_tokens: bool | None = Field(None, description="True if not given for a prompt, false for messages")
    cache_salt: Text | None = Field(None, min_length=1, description="Of the request that will come")
    session_id: SessionId | None = Field(
        None, description="What the last request with this session_id has left; the header x-session-id if not given"
    )

    @model_validator(mode="after")
    def _check_one_of(self) -> PrefetchRequest:
        given = [name for name in ("prompt", "messages", "session_id") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(
                f"give one of prompt, messages and session_id, not {' and '.join(given)}", param=given[-1]
            )
        count = 1 if self.prompt is None else len(listed(self.prompt))
        if count > 1:
            raise RequestError(f"advice is for one prompt at a time, got {count}", param="prompt")
        return self

    @property
    def only_prompt(self) -> str | list[int] | None:
        """The prompt, also if it is the only one of a list; None if there is none."""
        return None if self.prompt is None else listed(self.prompt)[0]


class DetokenizeRequest(RequestBody):
    """Body of POST /detokenize."""

    foreign: ClassVar[ForeignFields] = OF_TOKENS

    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True), BeforeValidator(read_ids)]
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out; false if not given")
