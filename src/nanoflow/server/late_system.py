"""System messages behind the first message, which some chat templates leave out, as texts of the user.

Clients of /v1/responses and /v1/messages that write code send them. Chat completions refuse them for such templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow.engine.conversation import text_part
from nanoflow.engine.template_renderer import ChatTemplateError
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.server.errors import user_errors
from nanoflow.server.service import Service

Message = dict[str, Any]
_ROLES = ("system", "developer")


def with_shown_system(service: Service, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chat completion, with late system messages in a form that the model's template shows.

    Runs the template the first time that there are any, so it may take a while.
    """
    messages: Sequence[Message] = fields["messages"]
    is_late = any(message["role"] in _ROLES for message in messages[1:])
    if not is_late or _shows_late_system(service, has_tools=bool(fields.get("tools"))):
        return dict(fields)
    return {**fields, "messages": as_user(messages)}


def as_user(messages: Sequence[Message]) -> list[Message]:
    """The messages, with each late system message as parts of the user's message before it, or as one of the user."""
    found: list[Message] = []
    for place, message in enumerate(messages):
        if not place or message["role"] not in _ROLES:
            found.append(message)
        elif found[-1]["role"] == "user":
            found[-1] = {**found[-1], "content": [*_parts(found[-1]["content"]), *_parts(message["content"])]}
        else:
            found.append({**message, "role": "user"})
    return found


def _parts(content: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [text_part(content)] if isinstance(content, str) else content


def _shows_late_system(service: Service, *, has_tools: bool) -> bool:
    tokenizer = service.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        return True
    with user_errors("messages"):
        template = tokenizer.chat_templates.get(None, has_tools=has_tools)
    try:
        return template.shows_late_system
    except ChatTemplateError:  # then the conversation itself is refused, and the error says more
        return True
