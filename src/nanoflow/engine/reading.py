"""Reads prompts for an event loop, long ones in a thread. `prompts.py` says what a prompt may be."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sized

from nanoflow.engine.prompts import Prompt, PromptInput, read_prompt
from nanoflow.engine.tokenizer import Tokenizer

# Prompts from this length on are read in a thread: shorter ones take less than a millisecond.
_LONG_TEXT_CHARS = 1024
_LONG_PROMPT_TOKENS = 1 << 16


async def read_prompt_aside(prompt: PromptInput, tokenizer: Tokenizer | None) -> Prompt:
    """`read_prompt`, in a thread if the prompt is long, so that the event loop is not blocked."""
    value = next(iter(prompt.values()), "") if isinstance(prompt, Mapping) else prompt
    limit = _LONG_TEXT_CHARS if isinstance(value, str) else _LONG_PROMPT_TOKENS
    if isinstance(value, Sized) and len(value) >= limit:
        return await asyncio.to_thread(read_prompt, prompt, tokenizer)
    return read_prompt(prompt, tokenizer)
