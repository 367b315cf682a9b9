"""Choose the chat template of a conversation: a model may have several, and users may give others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow.config import EngineConfig
from nanoflow.engine.chat_template import ChatTemplate
from nanoflow.engine.template_renderer import TemplateRenderer
from nanoflow.errors import one_line
from nanoflow.request import RequestError

DEFAULT_NAME = "default"
TOOLS_NAME = "tool_use"


class TemplateFileError(ValueError):
    """A chat template cannot be read; the message is one line that says which and why."""


class ChatTemplates:
    """The chat templates of a tokenizer.

    Args:
        fast: A `transformers` tokenizer.
        given: Template to use instead of the tokenizer's default: Jinja, or the name of one of its own.
        config: How long templates may take, and how much they may write.
    """

    def __init__(self, fast: Any, given: str | None, config: EngineConfig) -> None:
        self._own = fast.chat_template
        self._renderer = TemplateRenderer(
            timeout_s=config.chat_template_timeout_s, max_chars=config.chat_template_max_chars
        )
        self._special_tokens = {
            name: list(map(str, value)) if isinstance(value, list | tuple) else str(value)
            for name, value in fast.special_tokens_map.items()
        }
        usual = choose_template(self._own, given)
        self.usual = None if usual is None else self._new(usual)
        named = self._own.get(TOOLS_NAME) if isinstance(self._own, Mapping) and given is None else None
        self._of_tools = None if named is None else self._new(named)

    def get(self, given: str | None = None, *, has_tools: bool = False) -> ChatTemplate:
        """The default template, or the given one: Jinja, or the name of one of the tokenizer's own.

        With tools it is the one named "tool_use", where the tokenizer has that and no other was given.

        Raises:
            RequestError: There is no template.
        """
        if given is not None:
            return self._new(choose_template(self._own, given) or given)
        if has_tools and self._of_tools is not None:
            return self._of_tools
        if self.usual is None:
            names = ", ".join(map(repr, self._own)) if isinstance(self._own, Mapping) else ""
            problem = f"no chat template named {DEFAULT_NAME!r}, but {names}" if names else "no chat template"
            raise RequestError(f"this model has {problem}; give one (chat_template), or complete a plain prompt")
        return self.usual

    def close(self) -> None:
        """End the processes that render templates, even while they work."""
        self._renderer.close()

    def _new(self, text: str) -> ChatTemplate:
        return ChatTemplate(text, self._special_tokens, self._renderer)


def choose_template(own: str | Mapping[str, str] | None, given: str | None) -> str | None:
    """The template to use.

    Args:
        own: The tokenizer's template, or several by name, of which "default" is used.
        given: Replaces it: the name of one of the tokenizer's own, or a template. None if not given.
    """
    named = own if isinstance(own, Mapping) else {}
    if given is not None:
        return named.get(given, given)
    return own if isinstance(own, str) else named.get(DEFAULT_NAME)


def read_given(given: str | None, own: str | Mapping[str, str] | None, folder: Path) -> str | None:
    """Read the value of `--chat-template`: the name of one of the tokenizer's own, a file, or a template.

    Without a value, this is the template in `chat_template.json` if the tokenizer has none; multimodal models have it
    there.

    Raises:
        TemplateFileError: A file cannot be read.
    """
    if given is None:
        return None if own is not None else _processor_template(folder / "chat_template.json")
    if (isinstance(own, Mapping) and given in own) or "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _cannot_read(given, error) from None


def _processor_template(file: Path) -> str | None:
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        named = {entry["name"]: entry["template"] for entry in found} if isinstance(found, list) else found
        return choose_template(named, None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _cannot_read(str(file), error) from None


def _cannot_read(name: str, error: Exception) -> TemplateFileError:
    return TemplateFileError(f"the chat template {name} cannot be read: {one_line(error)}")
