"""The rules of a function's arguments in a grammar: as JSON, or as members between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow.chat_formats.grammar_texts import literal
from nanoflow.chat_formats.tagged import TaggedArguments, is_text, types_of
from nanoflow.structured import Structured

# Between the tokens of JSON. Without a bound a weak model would go on with white space.
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}", "coerce_one_of": True}


def json_value(schema: Mapping[str, Any]) -> str:
    """A JSON value by its schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def shape_rules(name: str, structured: Structured) -> list[str] | None:
    """The rules of a shape, of which the first has this name; None for a grammar, which has rules of its own."""
    if structured.kind == "json":
        return [f"{name}: {json_value(json.loads(structured.text))}"]
    if structured.kind == "choice":
        # One token of the grammar: as alternatives of a rule, only a few could be followed at once.
        return [f"{name}: CHOICE", f"CHOICE: {_one_of(json.loads(structured.text))}"]
    # A slash ends an expression in a grammar, unless it stands behind a backslash.
    pattern = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", structured.text, flags=re.DOTALL)
    return [f"{name}: /{pattern}/"] if structured.kind == "regex" else None


def argument_rules(
    name: str, schema: Mapping[str, Any], tagged: TaggedArguments | None, ids: Mapping[str, int]
) -> list[str]:
    """The rules of arguments.

    Args:
        name: Of the rule; other rules begin with it.
        schema: Of the arguments.
        tagged: How members are written; None for JSON.
        ids: Of special tokens.
    """
    required = schema.get("required") or []
    is_list = isinstance(required, list) and all(isinstance(key, str) for key in required)
    # What is no schema is left to those who refuse it.
    if tagged is None or not is_list:
        return [f"{name}: {json_value({'type': 'object', **schema})}"]
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    members, rules = [], []
    parts = schema.get("properties") or {}
    for place, (key, part) in enumerate({**parts, **{key: {} for key in required if key not in parts}}.items()):
        before, after = tagged.member.split("{value}")
        before, after = literal(before.replace("{name}", key), ids), literal(after, ids)
        member = f"{name}_{place}"
        members.append(member if key in required else f"{member}?")
        value = _value(part, definitions)
        if value is None:
            rules += [f"{member}: {before} {member}_text", f"{member}_text[lazy]: /(?s:.*)/ {after}"]
        else:
            rules.append(f"{member}: {before} {value} {after}")
    written = " ".join(members) or '""'
    return [f"{name}: {written}", *rules]


def _value(schema: Any, definitions: Mapping[str, Any]) -> str | None:
    """A value between tags; None for text without a bound."""
    if isinstance(schema, Mapping) and ("enum" in schema or "const" in schema):
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, list):
            return json_value(schema)
        texts = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in values]
        return f"({_one_of(texts)})"
    if not isinstance(schema, Mapping) or is_text(schema) or "string" in types_of(schema):
        return None
    # Without a type, and with no schema behind a name, it may be text.
    return json_value({**definitions, **schema}) if types_of(schema) or "$ref" in schema else None


def _one_of(texts: Sequence[str]) -> str:
    """Alternatives; none is an error of the grammar."""
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
