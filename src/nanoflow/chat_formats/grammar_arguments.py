"""The rules of a function's arguments in a grammar: as JSON, or as members between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nanoflow.chat_formats.grammar_texts import literal
from nanoflow.chat_formats.tagged import TaggedArguments, is_text, types_of
from nanoflow.structured import Structured

# Between the tokens of JSON. Without a bound a weak model would go on with white space.
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}", "coerce_one_of": True}


def json_value(schema: Mapping[str, Any]) -> str:
    """A JSON value by its schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def shape_rule(structured: Structured) -> str | None:
    """A shape as the right side of a rule; None for a grammar, which has rules of its own."""
    if structured.kind == "json":
        return json_value(json.loads(structured.text))
    if structured.kind == "choice":
        return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(structured.text))
    # A slash ends an expression in a grammar, unless it stands behind a backslash.
    pattern = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", structured.text, flags=re.DOTALL)
    return f"/{pattern}/" if structured.kind == "regex" else None


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
    if tagged is None:
        return [f"{name}: {json_value({'type': 'object', **schema})}"]
    required = schema.get("required") or ()
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    members, rules = [], []
    for place, (key, part) in enumerate((schema.get("properties") or {}).items()):
        before, after = (literal(text, ids) for text in tagged.member.replace("{name}", key).split("{value}"))
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
        texts = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in values]
        return "(" + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts) + ")"
    if not isinstance(schema, Mapping) or is_text(schema) or "string" in types_of(schema):
        return None
    # Without a type, and with no schema behind a name, it may be text.
    return json_value({**definitions, **schema}) if types_of(schema) or "$ref" in schema else None
