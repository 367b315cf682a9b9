"""The body of POST /v1/responses (OpenAI's Responses API), and the items of its input.

`response_chat.py` translates it to a chat completion, whose fields have their bounds in `protocol.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from nanoflow.parameters import RequestError, shown
from nanoflow.server.body import ChoiceWord, RequestBody, Text, only_types, word_or_object
from nanoflow.server.foreign import OF_STREAMS, Foreign, ForeignFields
from nanoflow.server.parameter import Parameter
from nanoflow.server.priority_fields import PriorityFields
from nanoflow.server.protocol import SessionId

MAX_LABELS, MAX_LABEL_CHARS, MAX_LABEL_TEXT_CHARS = 16, 64, 512
_ENCRYPTED = "reasoning.encrypted_content"

_OF_ANSWERS: ForeignFields = {
    "id": Foreign(None, "a label of the client's"),
    "status": Foreign(None, "how far an earlier answer came"),
    "caller": Foreign(None, "who called; only the model does"),
    "namespace": Foreign((), "groups of tools"),
    "async": Foreign((False,), "calls whose results come later"),
    "phase": Foreign(None, "a label of an earlier answer"),
}
_OF_PARTS: ForeignFields = {
    "annotations": Foreign(([],), "notes on the text"),
    "logprobs": Foreign(None, "numbers of an earlier answer"),
    "prompt_cache_breakpoint": Foreign(None, "caches of prompts do not change an answer"),
}
_OF_TOOLS: ForeignFields = {
    "allowed_callers": Foreign((["direct"],), "calls by programs"),
    "defer_loading": Foreign((False,), "tools that are shown later"),
    "output_schema": Foreign((), "the shape of results"),
    "async": Foreign((False,), "calls whose results come later"),
}
OF_RESPONSES: ForeignFields = {
    "background": Foreign((False,), "responses that are made while nobody waits"),
    "background_options": Foreign((), "responses that are made while nobody waits"),
    "conversation": Foreign((), "conversations that are kept; previous_response_id goes on from a response"),
    "context_management": Foreign(([],), "conversations that are shortened"),
    "image": Foreign((), "input that is no text"),
    "max_tool_calls": Foreign(None, "there are no tools that the server calls"),
    "moderation": Foreign((), "judgements of texts"),
    "prompt": Foreign((), "prompts that are kept"),
    "access_programs": Foreign((), "programs of OpenAI's"),
    "truncation": Foreign(("disabled",), "conversations that are shortened"),
    "top_logprobs": Foreign((0,), "log probabilities; chat completions have them"),
    "prompt_cache_key": Foreign(None, "caches of prompts do not change an answer"),
    "prompt_cache_options": Foreign(None, "caches of prompts do not change an answer"),
    "prompt_cache_retention": Foreign(None, "caches of prompts do not change an answer"),
    "safety_identifier": Foreign(None, "a label of the client's"),
    "client_metadata": Foreign(None, "labels of the client's"),
    "request_id": Foreign(None, "a label of the client's; the answer has an id of the server's"),
}
"""Fields of bodies of /v1/responses."""


class InputPart(RequestBody):
    """A part of a message or of a result; its text is all that counts."""

    foreign: ClassVar[ForeignFields] = _OF_PARTS

    type: Literal["input_text", "output_text", "text"]
    text: Text


def _text_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


_Part = Annotated[InputPart, BeforeValidator(only_types("parts", "input_text", "output_text", "text"))]
Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[_Part], Field(min_length=1, fail_fast=True), Tag("<list>")],
    Discriminator(_text_or_list),
]


class MessageItem(RequestBody):
    """A message of anybody."""

    foreign: ClassVar[ForeignFields] = _OF_ANSWERS

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCallItem(RequestBody):
    """A call that the model has made."""

    foreign: ClassVar[ForeignFields] = _OF_ANSWERS

    type: Literal["function_call"]
    call_id: Text
    name: Annotated[Text, Field(min_length=1)]
    arguments: Text


class FunctionOutputItem(RequestBody):
    """The result of a call."""

    foreign: ClassVar[ForeignFields] = {**_OF_ANSWERS, "name": Foreign(None, "the call has it")}

    type: Literal["function_call_output"]
    call_id: Text
    output: Content


class ReasoningPart(RequestBody):
    """A part of the model's reasoning."""

    type: Literal["reasoning_text", "summary_text", "text"]
    text: Text


class ReasoningItem(RequestBody):
    """What the model has thought, as an answer has it; the summary counts where there is no content."""

    foreign: ClassVar[ForeignFields] = {
        **_OF_ANSWERS,
        "encrypted_content": Foreign((), "reasoning that only its server can read"),
    }

    type: Literal["reasoning"]
    summary: list[ReasoningPart] = Field(default_factory=list)
    content: list[ReasoningPart] | None = None


_ITEMS: Mapping[str, type[RequestBody]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
    "reasoning": ReasoningItem,
}


def _kind_of_item(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return f"<{kind}>" if kind in _ITEMS else "<message>"


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(_kind_of_item),
    BeforeValidator(only_types("items", *_ITEMS)),
]
InputField = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Item], Field(fail_fast=True), Tag("<list>")],
    Discriminator(_text_or_list),
]


class FunctionTool(RequestBody):
    """A function that the model may call."""

    foreign: ClassVar[ForeignFields] = _OF_TOOLS

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments, an object")
    strict: bool | None = None


class NamedFunction(RequestBody):
    """The function that the model shall call."""

    type: Literal["function"]
    name: Text


ToolChoiceField = Annotated[
    ChoiceWord | Annotated[NamedFunction, BeforeValidator(only_types("choices", "function")), Tag("<object>")],
    Discriminator(word_or_object),
]


class ReasoningOptions(RequestBody):
    """How the model thinks."""

    foreign: ClassVar[ForeignFields] = {
        "summary": Foreign(("auto",), "summaries; answers have the reasoning itself"),
        "generate_summary": Foreign(("auto",), "summaries; answers have the reasoning itself"),
        "context": Foreign(("auto",), "which reasoning the model is shown; its chat template decides"),
        "mode": Foreign(("standard",), "ways to think"),
    }

    effort: Annotated[Text, Field(min_length=1, max_length=32)] | None = Field(
        None, description="How long the model thinks, in the words of its chat template"
    )


class TextOptions(RequestBody):
    """The shape of the text."""

    foreign: ClassVar[ForeignFields] = {"verbosity": Foreign(("medium",), "length of the answer")}

    format: dict[str, Any] | None = Field(None, description="Of type text, json_object or json_schema")


class ResponseStreamOptions(RequestBody):
    """Options of a stream."""

    foreign: ClassVar[ForeignFields] = OF_STREAMS


class ResponseRequest(PriorityFields):
    """Body of POST /v1/responses."""

    foreign: ClassVar[ForeignFields] = OF_RESPONSES

    input: InputField = Field(description="A text of the user, or a list of items")
    model: Text | None = Field(None, description="Name of the served model; may be left out")
    instructions: Text | None = Field(None, description="A system message before everything; not carried over")
    previous_response_id: Annotated[Text, Field(min_length=1, max_length=100)] | None = Field(
        None, description="A kept response whose conversation goes on"
    )
    store: bool | None = Field(None, description="Keep the response, so that others can go on from it; true")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int | None, Parameter.of("max_output_tokens", "max_tokens")] = Field(
        None, description="Up to the context length if not given"
    )
    tools: list[Annotated[FunctionTool, BeforeValidator(only_types("tools", "function"))]] | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call; true if not given")
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    metadata: dict[Text, Text] | None = Field(
        None, max_length=MAX_LABELS, description=f"Up to {MAX_LABELS} labels, which the response has too"
    )
    user: Text | None = Field(None, description="A label of the client's, which the response has too")
    include: list[Text] | None = Field(None, description=f"{_ENCRYPTED} has no effect: items have their reasoning")
    temperature: Annotated[float | None, Parameter.of("temperature")] = None
    top_p: Annotated[float | None, Parameter.of("top_p")] = None
    top_k: Annotated[int | None, Parameter.of("top_k")] = None
    min_p: Annotated[float | None, Parameter.of("min_p")] = None
    seed: Annotated[int | None, Parameter.of("seed")] = None
    stop: Annotated[Sequence[str] | None, Parameter.of("stop")] = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template")
    cache_salt: Text | None = Field(None, min_length=1, description="As in chat completions")
    session_id: SessionId | None = Field(None, description="As in chat completions")

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name, text in (value or {}).items():
            if len(name) > MAX_LABEL_CHARS or len(text) > MAX_LABEL_TEXT_CHARS:
                most = f"{MAX_LABEL_CHARS} characters, and a text of {MAX_LABEL_TEXT_CHARS}"
                raise RequestError(f"metadata: a name has at most {most}")
        return value

    @field_validator("include")
    @classmethod
    def _check_include(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name != _ENCRYPTED:
                raise RequestError(f"include: {shown(name)} is not offered by this server")
        return value
