"""Reads prompts and checks grammars for an event loop, in threads if that takes time.

`prompts.py` says what a prompt may be, `grammar_checks.py` what a grammar may cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sized

from nanoflow.engine.grammar_checks import GrammarChecks
from nanoflow.engine.prompts import Prompt, PromptInput, read_prompt
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.request import SamplingParams

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


async def read_request_aside(
    prompt: PromptInput, params: SamplingParams, tokenizer: Tokenizer | None, checks: GrammarChecks
) -> tuple[Prompt, SamplingParams]:
    """The prompt as `read_prompt_aside` reads it, and the parameters as `GrammarChecks.checked` returns them."""
    return await read_prompt_aside(prompt, tokenizer), await checks.checked_aside(params)
