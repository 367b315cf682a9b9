"""Literals and free texts of a grammar, in the dialect of Lark that llguidance reads. `grammar.py` has the rules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

ANY_TEXT = "/(?s:.*)/"


def literal(text: str, ids: Mapping[str, int]) -> str:
    """A text as the grammar writes it, with special tokens by their ids."""
    parts = _parts(text, ids)
    written = [f"<[{ids[part]}]>" if part in ids else json.dumps(part, ensure_ascii=False) for part in parts if part]
    return " ".join(written) or '""'


def begins_with_token(text: str, ids: Mapping[str, int]) -> bool:
    """True if a text begins with a special token, which no free text has."""
    return next((part in ids for part in _parts(text, ids) if part), False)


def free_text_rules(marks: Sequence[str]) -> list[str]:
    """The terminals ANY, any text, and FREE, any text without these marks."""
    any_rule = f"ANY: {ANY_TEXT}"
    if not marks:
        return [any_rule, "FREE: ANY"]
    alternatives = " | ".join(json.dumps(mark, ensure_ascii=False) for mark in marks)
    return [any_rule, f"MARKED: ANY ({alternatives}) ANY", "FREE: ANY & ~MARKED"]


def thought_rule(closer: str, ids: Mapping[str, int]) -> str:
    """The rule of any text up to a closer, with it."""
    if closer in ids:
        return f"thought: {ANY_TEXT} {literal(closer, ids)}"
    return f"thought[suffix={json.dumps(closer)}]: {ANY_TEXT}"


def _parts(text: str, ids: Mapping[str, int]) -> list[str]:
    """The text, cut at the names of special tokens."""
    names = sorted((name for name in ids if name in text), key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
