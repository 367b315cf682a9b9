"""The grammar of a message that has to call a function: in the model's format, with arguments by their schema.

The grammar is text in the dialect of Lark that llguidance reads (`%json` takes a JSON schema, `<[7]>` is the token 7).
Nothing here compiles or applies it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow.chat_formats.formats import ChatFormat, Writing
from nanoflow.chat_formats.tools import Calling, ToolChoice

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# Between the tokens of JSON. Without a bound a weak model would go on with white space.
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}", "coerce_one_of": True}
_ANY_TEXT = "/(?s:.*)/"


def grammar_of(
    form: ChatFormat,
    tools: Sequence[Mapping[str, Any]],
    choice: ToolChoice,
    *,
    special: Mapping[str, int] | None = None,
    is_reasoning: bool | None = None,
    is_parallel: bool = True,
) -> str | None:
    """The grammar of a message.

    Args:
        form: How the model writes calls and reasoning.
        tools: Declared functions, checked.
        choice: Which of them have to be called.
        special: Ids of the tokenizer's special tokens by name: where the format has such a name, the grammar takes the
            token and not its text.
        is_reasoning: As for `ChatParser`. Reasoning may come before the calls.
        is_parallel: Whether there may be several calls.

    Returns:
        The grammar; None if no call is required, or the format has none.
    """
    if choice.calling is not Calling.REQUIRED or form.calls is None:
        return None
    ids = special or {}
    callable_tools = choice.of(tools)
    rules = [f"start: {_before(form, ids, is_reasoning)}message"]
    writings = form.calls.writings
    rules += [f"message: {' | '.join(f'message_{i}' for i in range(len(writings)))}"]
    for place, writing in enumerate(writings):
        call = " | ".join(_call(writing, tool, f"arguments_{i}", ids) for i, tool in enumerate(callable_tools))
        more = (
            f" ({_literal(writing.between, ids)} call_{place})*" if is_parallel and writing.between is not None else ""
        )
        begin, end = _literal(writing.begin, ids), _literal(writing.end, ids)
        rules += [f"message_{place}: {begin} call_{place}{more} {end}", f"call_{place}: {call}"]
    for place, tool in enumerate(callable_tools):
        schema = tool["function"].get("parameters") or ANY_OBJECT
        rules.append(
            f"arguments_{place}: %json {json.dumps({'type': 'object', **schema, 'x-guidance': _JSON_OPTIONS})}"
        )
    return "\n".join((*rules, *_reasoning_rules(form, ids))) + "\n"


def _before(form: ChatFormat, ids: Mapping[str, int], is_reasoning: bool | None) -> str:
    """What stands before the calls: reasoning that has been opened, or may be."""
    if form.channels is not None:
        return "reasoning* "
    tags = form.reasoning
    if tags is None or is_reasoning is False:
        return ""
    if is_reasoning or tags.is_assumed:
        return "reasoning "
    return f"({_literal(tags.opener, ids)} reasoning)? "


def _reasoning_rules(form: ChatFormat, ids: Mapping[str, int]) -> list[str]:
    """Rules of a section of reasoning, up to the text that closes it."""
    channels, tags = form.channels, form.reasoning
    if channels is not None:
        opener = _literal(f"{channels.openers[-1]}{channels.reasoning[0]}{channels.head.end}", ids)
        # What comes next begins with who speaks.
        after = _literal(f"{channels.openers[0]}assistant", ids)
        return [f"reasoning: {opener} thought {after}", _thought(channels.closers[0], ids)]
    return [] if tags is None else [r"reasoning: thought /\s{0,4}/", _thought(tags.closer, ids)]


def _thought(closer: str, ids: Mapping[str, int]) -> str:
    """The rule of any text up to a closer, with it."""
    if closer in ids:
        return f"thought: {_ANY_TEXT} {_literal(closer, ids)}"
    return f"thought[suffix={json.dumps(closer)}]: {_ANY_TEXT}"


def _call(writing: Writing, tool: Mapping[str, Any], arguments: str, ids: Mapping[str, int]) -> str:
    """The call of one function."""
    before, after = writing.call.replace("{name}", tool["function"]["name"]).split("{arguments}")
    return f"{_literal(before, ids)} {arguments} {_literal(after, ids)}"


def _literal(text: str, ids: Mapping[str, int]) -> str:
    """A text as the grammar writes it, with special tokens by their ids."""
    names = sorted((name for name in ids if name in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    written = [f"<[{ids[part]}]>" if part in ids else json.dumps(part, ensure_ascii=False) for part in parts if part]
    return " ".join(written) or '""'
