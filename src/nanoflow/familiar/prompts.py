"""Typed mappings for prompts, and unique request ids, with vLLM's names.

`engine/prompts.py` says what a prompt may be; these have the same keys.
"""

from __future__ import annotations

import uuid
from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids, and optionally its text, which is only shown."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


def random_uuid() -> str:
    """A unique label: 32 hexadecimal digits."""
    return uuid.uuid4().hex
