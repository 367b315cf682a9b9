"""A model's chat template: renders a conversation as text. `template_choice.py` chooses among several templates.

A template is a program written by the model's maker. Most templates support neither every role nor every form of
content. We find out by rendering messages of made-up words once: whether the template takes content as text or as
parts, which roles it knows, and whether it would leave out a message. `template_renderer.py` runs templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from nanoflow.chat_formats.tools import read_tools
from nanoflow.engine.conversation import Conversation, joined_text, read_messages, text_part
from nanoflow.engine.template_environment import THOUGHTS
from nanoflow.engine.template_renderer import ChatTemplateError, ChatTemplateLimitError
from nanoflow.request import RequestError

# Variables that the engine sets, or that would change what `render` returns; callers may not give them.
RESERVED = frozenset(
    (
        *("messages", "conversation", "conversations", "chat_template", "add_generation_prompt", "tools"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "return_dict", "return_tensors"),
        *("return_assistant_tokens_mask", "padding", "truncation", "max_length", "sanitize_control_tokens"),
    )
)
COMMON_ROLES = frozenset(("system", "user", "assistant"))
# A role, and the one that takes its place in templates that do not know it.
SYNONYMS = {"developer": "system"}
# Size of the caches of a template: by role, and by the sequence of roles of a conversation.
_MAX_KEPT = 1024
_KWARGS = "chat_template_kwargs"
# A made-up call. Mistral's templates refuse ids of another length.
_CALL_ID, _FUNCTION = "call00001", "nanoflow_function"
_TOOL = {
    "type": "function",
    "function": {"name": _FUNCTION, "description": "", "parameters": {"type": "object", "properties": {}}},
}


# Role of each message, and whether it has calls of tools.
Shape = tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template takes messages with calls.

    Attributes:
        has_objects: Arguments are objects, of which the template makes text; otherwise JSON as text.
        no_text: The content of a message that has none. If it is None, the template shows no text beside calls.
    """

    has_objects: bool
    no_text: str | None


_CALL_FORMS = tuple(CallForm(has_objects, no_text) for no_text in ("", None) for has_objects in (True, False))


class Renderer(Protocol):
    """What runs templates."""

    def render(self, job: Mapping[str, Any]) -> str:
        """Text of a conversation; ChatTemplateError if the template refuses it."""


class ChatTemplate:
    """A template, and what was found out about it. Methods may be called from several threads.

    Args:
        text: The template, in Jinja.
        special_tokens: Name to text of special tokens, as variables of the template.
        renderer: Runs the template.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, Any], renderer: Renderer) -> None:
        self.text = text
        self._special_tokens = special_tokens
        self._renderer = renderer
        self._known_roles: dict[str, bool] = {}
        self._shapes_shown: set[Shape] = set()

    def render(
        self,
        messages: Conversation,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
    ) -> str:
        """Text of a conversation.

        Args:
            messages: See `read_messages`.
            add_generation_prompt: End with what opens the assistant's answer.
            continue_final_message: Leave the last message open, to be continued; not with `add_generation_prompt`.
            kwargs: Further variables of the template.
            tools: Functions that the model may call; see `read_tools`.
            reasoning_effort: How long the model shall think, in the template's words.

        Raises:
            RequestError: A message or an argument is invalid, or the template refuses the messages, does not know a
                role, tools or reasoning efforts, or leaves a message out; the error says which.
        """
        own = read_kwargs(kwargs, self._special_tokens)
        own |= self._known("tools", list(map(dict, read_tools(tools))) if tools else None)
        own |= self._known("reasoning_effort", reasoning_effort)
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other", param="add_generation_prompt"
            )
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        try:
            turns = [self._adapted(message) for message in read_messages(messages, takes=self._mentions)]
            text = self._run(turns, {**own, **options})
            self._check_all_shown(tuple((turn["role"], bool(turn.get("tool_calls"))) for turn in turns), own)
        except ChatTemplateLimitError as error:
            raise RequestError(f"the chat template was stopped: {error}") from None
        except ChatTemplateError as error:
            raise RequestError(f"the chat template refuses the messages: {error}") from None
        return text

    @cached_property
    def takes_text(self) -> bool:
        """True if a content may be one text."""
        word = _word(0)
        return word in (self._try([{"role": "user", "content": word}]) or "")

    @cached_property
    def takes_parts(self) -> bool:
        """True if content may be a list of parts, and the template shows only the texts of these."""
        words = [_word(0), _word(1)]
        text = self._try([{"role": "user", "content": [*map(text_part, words)]}])
        # Quotes would mean that the template prints the list itself.
        return text is not None and all(
            word in text and f"'{word}'" not in text and f'"{word}"' not in text for word in words
        )

    @cached_property
    def call_form(self) -> CallForm | None:
        """How a message with calls has to be given so that they are shown; None if the template shows no calls."""
        return next((form for form in _CALL_FORMS if self._shows_call(form)), None)

    @cached_property
    def shows_late_system(self) -> bool:
        """True if a system message between two of the user is shown."""
        return self._shows((("system", False), ("user", False), ("system", False), ("user", False)), 2)

    @cached_property
    def _takes_thought_beside_text(self) -> bool:
        """True if a message with calls may have both text and reasoning, as gpt-oss's may not."""
        (user, message) = self._made_up((("user", False), ("assistant", True)))
        return self._try([user, {**message, "content": _word(2), "reasoning_content": _word(3)}]) is not None

    def _shows_call(self, form: CallForm) -> bool:
        arguments: Any = {_word(0): _word(1)} if form.has_objects else json.dumps({_word(0): _word(1)})
        message = {"role": "assistant", "content": form.no_text, "tool_calls": [_made_up_call(arguments)]}
        text = self._try([*self._made_up((("user", False),)), message]) or ""
        # In single quotes: the template prints an object as Python does.
        return all(word in text for word in (_FUNCTION, _word(0), _word(1))) and f"'{_word(0)}'" not in text

    def _known(self, name: str, value: Any) -> dict[str, Any]:
        """A variable that only some templates have; empty if it is not given."""
        if value is None:
            return {}
        if not self._mentions(name):
            raise RequestError(
                f"the chat template of this model does not know {name} (--chat-template gives another)", param=name
            )
        return {name: value}

    def _mentions(self, field: str) -> bool:
        """True if the template may look at a field of messages or parts."""
        return re.search(rf"\b{re.escape(field)}\b", self.text) is not None

    def _run(self, turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        job = {"messages": turns, "chat_template": self.text, **self._special_tokens, **options}
        return self._renderer.render(job)

    def _try(self, turns: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any] | None = None) -> str | None:
        """The text of made-up messages in lower case; None if the template refuses them.

        A template for conversations with tools may need some: it gets a made-up one if it refuses messages without.
        """
        for more in ({}, *([{"tools": [_TOOL]}] if not kwargs and self._mentions("tools") else [])):
            try:
                return self._run(turns, {**(kwargs or {}), **more, "add_generation_prompt": False}).lower()
            except ChatTemplateLimitError:
                raise
            except ChatTemplateError:
                continue
        return None

    def _adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as the template takes it."""
        role, content = message["role"], message["content"]
        if role not in COMMON_ROLES and not self._knows(role):
            if role not in SYNONYMS:
                raise RequestError(f"the chat template does not know the role {role!r}")
            role = SYNONYMS[role]
        adapted = {**message, "role": role, "content": self._adapted_content(content)}
        calls, form = message.get("tool_calls"), self.call_form if message.get("tool_calls") else None
        if not calls:
            return adapted
        if form is None:
            raise RequestError("the chat template of this model does not show calls of tools, which the messages have")
        if form.no_text is not None and content and not self._takes_thought_beside_text:
            adapted = _joined_thought(adapted, joined_text(content))
        if form.no_text is None or not adapted["content"]:
            adapted["content"] = form.no_text
        adapted["tool_calls"] = [_adapted_call(call, form) for call in calls]
        return adapted

    def _adapted_content(self, content: Any) -> Any:
        if isinstance(content, str):
            return content if self.takes_text or not self.takes_parts else [text_part(content)]
        return content if self.takes_parts else joined_text(content)

    def _knows(self, role: str) -> bool:
        """True if messages of this role are shown at some place: first, after the user or after the assistant."""
        known = self._known_roles.get(role)
        if known is None:
            user, own = ("user", False), (role, False)
            layouts: tuple[Shape, ...] = ((own, user), (user, own), (user, ("assistant", role == "tool"), own))
            known = any(self._shows(layout, layout.index(own)) for layout in layouts)
            if len(self._known_roles) < _MAX_KEPT:
                self._known_roles[role] = known
        return known

    def _shows(self, shape: Shape, place: int) -> bool:
        return _word(place) in (self._try(self._made_up(shape)) or "")

    def _made_up(self, shape: Shape) -> list[dict[str, Any]]:
        """Messages of made-up words; a tool's messages answer the call before them."""
        messages: list[dict[str, Any]] = []
        for place, (role, has_calls) in enumerate(shape):
            message = {"role": role, "content": self._adapted_content(_word(place))}
            form = self.call_form if has_calls else None
            if form is not None:
                message |= {"tool_calls": [_made_up_call({} if form.has_objects else "{}")], "content": form.no_text}
            if role == "tool":
                message |= {"tool_call_id": _CALL_ID, "name": _FUNCTION}
            messages.append(message)
        return messages

    def _check_all_shown(self, shape: Shape, kwargs: Mapping[str, Any]) -> None:
        """Refuse a conversation of which the template would silently leave out a message."""
        if shape not in self._shapes_shown:
            place = self._first_dropped(shape, kwargs)
            if place is not None:
                raise ChatTemplateError(f"it would leave out messages[{place}], of role {shape[place][0]!r}")
            if len(self._shapes_shown) < _MAX_KEPT:
                self._shapes_shown.add(shape)

    def _first_dropped(self, shape: Shape, kwargs: Mapping[str, Any]) -> int | None:
        text = self._try(self._made_up(shape), kwargs)
        # Many templates show no text beside calls.
        texts = [place for place, (_, has_calls) in enumerate(shape) if not has_calls]
        hidden = [] if text is None else [place for place in texts if _word(place) not in text]
        # A template that shows no message at all does not use messages.
        return hidden[0] if 0 < len(hidden) < len(texts) else None


def read_kwargs(kwargs: Mapping[str, Any] | None, special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Check further variables of a template.

    Raises:
        RequestError: A variable is set by the engine, or is no JSON value; the message names it.
    """
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping) or any(not isinstance(name, str) for name in kwargs):
        raise RequestError("chat_template_kwargs must be a mapping of names to values", param=_KWARGS)
    for name, value in kwargs.items():
        if name in RESERVED or name in special_tokens:
            raise RequestError(f"chat_template_kwargs cannot hold {name!r}: the engine sets it", param=_KWARGS)
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            message = f"chat_template_kwargs.{name} must be a JSON value: {error}"
            raise RequestError(message, param=_KWARGS) from None
    return dict(kwargs)


def _word(place: int) -> str:
    """A word that no template has."""
    return f"nanoflow-message-{place}."


def _made_up_call(arguments: Any) -> dict[str, Any]:
    return {"id": _CALL_ID, "type": "function", "function": {"name": _FUNCTION, "arguments": arguments}}


def _adapted_call(call: dict[str, Any], form: CallForm) -> dict[str, Any]:
    """A call with arguments as the template takes them. What a model wrote in place of an object stays text."""
    function = call["function"]
    if form.has_objects:
        with suppress(ValueError, RecursionError):
            arguments = json.loads(function["arguments"])
            if isinstance(arguments, dict):
                function = {**function, "arguments": arguments}
    return {**call, "function": function}


def _joined_thought(message: dict[str, Any], text: str) -> dict[str, Any]:
    """A message with its text behind its reasoning, as a part of it; unchanged if there is no reasoning."""
    thought = next((message[name] for name in THOUGHTS if message.get(name)), None)
    if thought is None:
        return message
    others = {name: value for name, value in message.items() if name not in THOUGHTS}
    return {**others, "reasoning_content": f"{thought}\n{text}", "content": ""}
