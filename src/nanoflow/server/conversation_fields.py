"""Fields of a request body with messages, and how they become a prompt. `engine/conversation.py` checks messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from nanoflow.chat_formats.tools import ToolChoice, read_tool_choice, read_tools
from nanoflow.engine.conversation import MAX_ROLE_CHARS, joined_text, read_tool_calls
from nanoflow.parameters import RequestError
from nanoflow.server.body import ChoiceWord, RequestBody, Text, only_types, word_or_object
from nanoflow.server.foreign import OF_MESSAGES, OF_PARTS, ForeignFields


class TextPart(RequestBody):
    """A part of a message. Other fields are refused later, unless the chat template uses them."""

    model_config = ConfigDict(extra="allow")

    foreign: ClassVar[ForeignFields] = OF_PARTS

    type: Literal["text"]
    text: Text


def _text_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


TextParts = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
ContentField = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[TextParts, Tag("<list>")],
    Discriminator(_text_or_list),
]


class Message(RequestBody):
    """One message of a conversation. The chat template decides which roles exist and how fields are used.

    Other fields are refused later, unless the template uses them.
    """

    model_config = ConfigDict(extra="allow")

    foreign: ClassVar[ForeignFields] = OF_MESSAGES

    role: Annotated[Text, Field(min_length=1, max_length=MAX_ROLE_CHARS)]
    content: ContentField | None = None
    name: Text | None = Field(None, description="Of who speaks")
    tool_calls: list[dict[str, Any]] | None = Field(None, description="Calls that the assistant made, as answers have")
    tool_call_id: Text | None = Field(None, description="Of the call that a tool answers")
    reasoning: Text | None = Field(None, description="What the assistant thought before it answered")
    reasoning_content: Text | None = Field(None, description="Other name of reasoning")

    @property
    def text(self) -> str:
        """The whole content as text, with each part on a line of its own."""
        return joined_text(self.turn["content"])

    @property
    def turn(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {"content": None, **self.model_dump(exclude_none=True)}

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise RequestError(
                "content must be a text or a list of parts; only an assistant's may be null", param="content"
            )
        read_tool_calls("tool_calls", self.tool_calls or (), self.role)
        return self


class FunctionName(RequestBody):
    """Name of a declared function."""

    name: Text


class NamedTool(RequestBody):
    """The function that the model shall call."""

    type: Literal["function"]
    function: FunctionName


ToolChoiceField = Annotated[
    ChoiceWord | Annotated[NamedTool, BeforeValidator(only_types("choices", "function")), Tag("<object>")],
    Discriminator(word_or_object),
]


class Conversation(RequestBody):
    """Messages and how to turn them into a prompt."""

    add_generation_prompt: bool | None = Field(None, description="Open a turn of the assistant; true if not given")
    continue_final_message: bool | None = Field(None, description="Leave the last message open, to be continued")
    chat_template: Text | None = Field(None, description="Jinja; refused unless --trust-request-chat-template")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template, such as enable_thinking"
    )
    tools: list[dict[str, Any]] | None = Field(
        None, description='Functions that the model may call, each {"type": "function", "function": {...}}'
    )
    tool_choice: ToolChoiceField | None = Field(
        None, description="Whether the model calls a function, or which; auto if not given"
    )
    reasoning_effort: Annotated[Text, Field(min_length=1, max_length=32)] | None = Field(
        None, description="How long the model thinks, in the words of its chat template, such as low"
    )

    @property
    def template_options(self) -> dict[str, Any]:
        """Keyword arguments of the chat template: a last message to be continued opens no new turn."""
        is_continued = self.continue_final_message is True
        is_opened = not is_continued if self.add_generation_prompt is None else self.add_generation_prompt
        names = ("chat_template", "chat_template_kwargs", "reasoning_effort")
        given = {name: value for name in names if (value := getattr(self, name))}
        if self.callable_tools:
            given["tools"] = self.callable_tools
        return {"add_generation_prompt": is_opened, "continue_final_message": is_continued, **given}

    @property
    def choice(self) -> ToolChoice:
        """Whether the model calls a function, or which."""
        choice = self.tool_choice
        return read_tool_choice(choice.model_dump() if isinstance(choice, NamedTool) else choice, self.tools or ())

    @property
    def callable_tools(self) -> list[Mapping[str, Any]]:
        """The tools that the model is shown, and that it may call."""
        return self.choice.of(self.tools or ())

    @model_validator(mode="after")
    def _check_tools(self) -> Conversation:
        read_tools(self.tools or ())
        _ = self.choice
        return self

    @model_validator(mode="after")
    def _check_turns(self) -> Conversation:
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other", param="add_generation_prompt"
            )
        return self
