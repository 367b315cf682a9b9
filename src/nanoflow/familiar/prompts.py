"""Prompts as mappings with a type, and labels of requests, as users of vLLM write them.

What a prompt may be says `engine/prompts.py`; these are dictionaries of the same keys.
"""

from __future__ import annotations

import uuid
from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids, and the text that they stand for if it is to be shown."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


def random_uuid() -> str:
    """A label that no other request has: 32 hexadecimal digits."""
    return uuid.uuid4().hex
