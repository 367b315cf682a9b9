"""Render chat templates: Jinja in a sandbox, with the names and filters that `transformers` gives them.

Results are those of `render_jinja_template` in `transformers` for JSON values; a test compares the two. Without that
import, a process starts several times faster and takes half of the memory. `template_process.py` bounds time and
memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "
# Names of the field with a model's reasoning. Templates read different ones, so the first one present fills all.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    /,
    *,
    continue_final_message: bool = False,
    add_generation_prompt: bool = False,
    tools: Any = None,
    documents: Any = None,
    **variables: Any,
) -> str:
    """Text of a conversation.

    Args:
        messages: Each with "role" and "content".
        template: The template, in Jinja.
        continue_final_message: Leave the last message open, to be continued.
        add_generation_prompt: Variable of the template: end with the beginning of an assistant's message.
        tools, documents, variables: Variables of the template.

    Raises:
        Exception: Any exception of the template; ValueError if the last message cannot be left open.
    """
    turns = [_with_all_thoughts(message) for message in messages]
    last = _open_end(turns, template) if continue_final_message else ""
    own = {"messages": turns, "tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    text = _compiled(template).render({**variables, **own})
    return _up_to_open_end(text, last) if continue_final_message else text


def _open_end(turns: list[dict[str, Any]], template: str) -> str:
    """Put a mark at the end of the last message's text; return the text without it."""
    content = turns[-1].get("content") if turns else None
    if content is None:
        raise ValueError('the last message has no "content" to continue')
    if "content" not in template:
        raise ValueError("the chat template shows no content that could be continued")
    if isinstance(content, str):
        turns[-1]["content"] = content + _OPEN_END
        return content
    parts = turns[-1]["content"] = [dict(part) for part in content]
    for part in reversed(parts):
        if "text" in part:
            text: str = part["text"]
            part["text"] = text + _OPEN_END
            return text
    raise ValueError("the last message has no text to continue")


def _up_to_open_end(text: str, last: str) -> str:
    mark = _OPEN_END.strip()
    if last.strip() not in text or mark not in text:
        raise ValueError("the chat template changes or leaves out the last message, which cannot be continued")
    place = text.rindex(mark)
    # If the template has stripped the message, spaces at its end are left out here too.
    return text[:place] if text.startswith(_OPEN_END, place) else text[:place].rstrip()


def _with_all_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    if thought is None:
        return dict(message)
    return {"thinking": thought, **message, "reasoning_content": thought}


@lru_cache
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's text for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  (jinja declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        """The statements up to {% endgeneration %}."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` of a template: a function, so that templates cannot reach the class and its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` of a template; it refuses names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named parameter, so that a template may have a variable called `self`.
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        Namespace.__setitem__(self, name, value)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace keeps no attribute {name!r}: it begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`. Jinja's own would escape characters that are special in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
