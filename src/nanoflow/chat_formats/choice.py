"""Which format a model writes: named by the user, or found from the words of its chat template.

A template shows the model how its own earlier calls and thoughts look, so it has the words that the model will write.
`formats.py` has the formats, `names.py` their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from nanoflow.chat_formats.formats import CALLS, HARMONY, REASONING, ChatFormat
from nanoflow.chat_formats.names import AUTO, CALL_NAMES, NONE, REASONING_NAMES


@dataclass(frozen=True, slots=True)
class _Sign:
    """A template is of a format if it has all of `words` and none of `others`."""

    name: str
    words: tuple[str, ...]
    others: tuple[str, ...] = ()

    def is_in(self, template: str) -> bool:
        return all(word in template for word in self.words) and not any(word in template for word in self.others)


# The first that fits counts. In `others` are words of formats that we do not read, where they share a word with ours.
_CALL_SIGNS = (
    _Sign("openai", ("<|channel|>", "<|message|>")),
    _Sign("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    _Sign("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    _Sign("mistral", ("[TOOL_CALLS]",)),
    _Sign("kimi_k2", ("<|tool_calls_section_begin|>",)),
    _Sign("seed_oss", ("<seed:tool_call>", "<function=")),
    _Sign("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    _Sign("glm45", ("<tool_call>", "<arg_key>")),
    _Sign("hermes", ("<tool_call>",), others=("<function=", "<arg_key>", "<parameter=")),
    _Sign("llama3_json", ("<|start_header_id|>", '"parameters"')),
)
_REASONING_SIGNS = (
    _Sign("openai_gptoss", ("<|channel|>", "<|message|>")),
    _Sign("mistral", ("[THINK]",)),
    _Sign("seed_oss", ("</seed:think>",)),
    _Sign("qwen3", ("</think>",)),
)


@lru_cache(16)
def choose_format(template: str, calls: str = AUTO, reasoning: str = AUTO) -> ChatFormat:
    """The format of a model's messages.

    Args:
        template: The model's chat template.
        calls, reasoning: Names of `CALL_NAMES` and `REASONING_NAMES`; "auto" looks at the template, "none" leaves such
            sections in the content.
    """
    calls = _found(_CALL_SIGNS, template) if calls == AUTO else CALL_NAMES.get(calls, NONE)
    reasoning = _found(_REASONING_SIGNS, template) if reasoning == AUTO else REASONING_NAMES.get(reasoning, NONE)
    if calls == "openai" or reasoning == "openai_gptoss":
        # One format has both, and its heads have to be read in any case.
        return ChatFormat(calls=HARMONY.calls if calls == "openai" else None, channels=HARMONY.channels)
    return ChatFormat(calls=CALLS.get(calls), reasoning=REASONING.get(reasoning))


def _found(signs: tuple[_Sign, ...], template: str) -> str:
    return next((sign.name for sign in signs if sign.is_in(template)), NONE)
