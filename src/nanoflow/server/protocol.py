"""Request bodies of the OpenAI-compatible API, with the bounds of every field.

Optional fields default to None, which means "as `SamplingParams` has it": defaults live there alone. Unknown fields are
ignored, except those that would change what an answer means (UNSUPPORTED). Bodies of answers: `responses.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nanoflow.engine.conversation import MAX_ROLE_CHARS, joined_text
from nanoflow.request import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_STOP_STRINGS, SamplingParams
from nanoflow.server.prompt_fields import INT32_MAX, PromptFields

MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
INT64_MAX = 2**63 - 1

# Field: values that mean the same as leaving it out. Anything else is refused rather than silently not done.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "tool_calls": (None, []),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None, {}),
    "modalities": (None, [], ["text"]),
    "audio": (None,),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "suffix": (None, ""),
    "prompt_embeds": (None,),
}

# Fields that SamplingParams takes under the same name.
_SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "stop_token_ids", "ignore_eos"),
    *("min_tokens", "prompt_logprobs", "skip_special_tokens", "include_stop_str_in_output"),
)


def _check_unicode(text: str) -> str:
    """Refuse lone surrogates: JSON can escape them, but they are no characters and nothing after us can encode them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode: it has a lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
StopString = Annotated[Text, Field(min_length=1)]
NumLogprobs = Annotated[int, Field(ge=-1, le=INT32_MAX, description="-1: all; at most as many as --max-logprobs")]


def _kind_of_prompt(value: Any) -> str:
    """Name the one form of the four that a prompt can only be, so that an error speaks of that form."""
    if not isinstance(value, list):
        return "<text>"
    kinds: dict[type, str] = {str: "<texts>", list: "<token id lists>"}
    return kinds.get(type(value[0]), "<token ids>") if value else "<token ids>"


def _text_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


PromptField = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Texts, Tag("<texts>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[TokenIdLists, Tag("<token id lists>")],
    Discriminator(_kind_of_prompt),
]
StopField = Annotated[
    Annotated[StopString, Tag("<text>")]
    | Annotated[Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)], Tag("<list>")],
    Discriminator(_text_or_list),
]


class RequestBody(BaseModel):
    """What every body keeps to: JSON types are taken as they are (no "5" for 5), numbers are finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name, harmless in UNSUPPORTED.items():
                if name in body and body[name] not in harmless:
                    raise ValueError(f"{name} is not supported by this server")
        return body


class StreamOptions(RequestBody):
    """Extras of a stream."""

    include_usage: bool | None = Field(None, description="Send token counts in a last chunk that has no choices")
    continuous_usage_stats: bool | None = Field(None, description="With include_usage, send them in every chunk too")


class SamplingFields(PromptFields, RequestBody):
    """What completions and chat completions have in common."""

    model: Text | None = Field(None, description="Name of the served model; may be left out")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1, description="0 keeps the most probable token alone")
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX, description="0 or -1 keeps all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,10}$", description="A token id")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    stop: StopField | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    prompt_logprobs: NumLogprobs | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and ignored")

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
    def _check_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is not available in a stream")
        return self

    def sampling(self, **more: Any) -> SamplingParams:
        """Parameters for the engine: the fields that were given, and `more` on top.

        Raises:
            ValueError: Fields that do not go together.
        """
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            given["logit_bias"] = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
        return SamplingParams(**{**given, **more})


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: PromptField = Field(description="A text, a list of texts, token ids, or a list of token id lists")
    max_tokens: int | None = Field(None, ge=0, le=INT32_MAX, description="16 if not given; 0 only with echo")
    echo: bool | None = Field(None, description="Put the prompt before the completion, in text and in logprobs")
    logprobs: NumLogprobs | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, in order."""
        match self.prompt:
            case [str() | list(), *_] as several:
                return list(several)  # type: ignore[arg-type]
            case one:
                return [one]  # type: ignore[list-item]

    @property
    def is_echo_only(self) -> bool:
        """True if the prompt is all that is asked for."""
        return self.max_tokens == 0

    @model_validator(mode="after")
    def _check_echo_only(self) -> CompletionRequest:
        if self.is_echo_only and not self.echo:
            raise ValueError("max_tokens must be at least 1 unless echo is true")
        return self

    def to_params(self, *, can_detokenize: bool = True) -> SamplingParams:
        """Parameters for the engine, which always generates a token: with `is_echo_only` it is to be hidden."""
        more: dict[str, Any] = {"logprobs": self.logprobs, "detokenize": can_detokenize}
        if self.max_tokens is not None:
            more["max_tokens"] = max(self.max_tokens, 1)
        if self.echo and self.logprobs is not None:
            more["prompt_logprobs"] = _more_logprobs(self.logprobs, self.prompt_logprobs)
        return self.sampling(**more)


def _more_logprobs(one: int, other: int | None) -> int:
    return -1 if -1 in (one, other) else max(one, other or 0)


class TextPart(RequestBody):
    """A piece of a message. What else it holds is for the chat template."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: Text


ContentField = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Annotated[list[TextPart], Field(min_length=1)], Tag("<list>")],
    Discriminator(_text_or_list),
]


class Message(RequestBody):
    """One turn of a conversation. Which roles there are, and what else it holds, is for the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[Text, Field(min_length=1, max_length=MAX_ROLE_CHARS)]
    content: ContentField | None = None

    @property
    def text(self) -> str:
        """The whole content; parts stand on lines of their own."""
        return joined_text(self.turn["content"])

    @property
    def turn(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {"content": None, **self.model_dump(exclude_none=True)}

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content must be a text or a list of parts; only an assistant's may be null")
        return self


class Conversation(RequestBody):
    """Messages and how to turn them into a prompt."""

    add_generation_prompt: bool | None = Field(None, description="Open a turn of the assistant; true if not given")
    continue_final_message: bool | None = Field(None, description="Leave the last message open, to be continued")
    chat_template: Text | None = Field(None, description="Jinja; refused unless --trust-request-chat-template")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template, such as enable_thinking"
    )

    @property
    def template_options(self) -> dict[str, Any]:
        """Keyword arguments of the chat template: a last message to be continued opens no new turn."""
        is_continued = self.continue_final_message is True
        is_opened = not is_continued if self.add_generation_prompt is None else self.add_generation_prompt
        given = {name: value for name in ("chat_template", "chat_template_kwargs") if (value := getattr(self, name))}
        return {"add_generation_prompt": is_opened, "continue_final_message": is_continued, **given}

    @model_validator(mode="after")
    def _check_turns(self) -> Conversation:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        return self


class ChatCompletionRequest(SamplingFields, Conversation):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    echo: bool | None = Field(None, description="Put a last message of the assistant before the answer")
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX, description="Up to the context length if not given")
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX, description="Goes before max_tokens")
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = Field(None, description="Needs logprobs=true")

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs=true")
        return value

    @property
    def echoed(self) -> str:
        """What is put before the answer."""
        last = self.messages[-1]
        return last.text if self.echo and last.role == "assistant" else ""

    def to_params(self, *, can_detokenize: bool = True) -> SamplingParams:
        """Parameters for the engine."""
        return self.sampling(
            detokenize=can_detokenize,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class TokenizeRequest(Conversation):
    """Body of POST /tokenize: a prompt or messages."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = Field(None, description="True if not given for a prompt, false for messages")
    return_token_strs: bool | None = Field(None, description="Send the tokens as the vocabulary has them too")

    @model_validator(mode="after")
    def _check_one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(RequestBody):
    """Body of POST /detokenize."""

    model: Text | None = None
    tokens: list[TokenId]
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out; false if not given")
