"""What a prompt says of the model's reasoning, and the bound on it that a request asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nanoflow.chat_formats.choice import choose_format
from nanoflow.chat_formats.formats import ChatFormat
from nanoflow.chat_formats.marks import reasoning_marks
from nanoflow.engine.prompts import Prompt
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.request import RequestError, SamplingParams
from nanoflow.thinking import ThinkingLimit

# As many of the prompt's last tokens show whether its template has opened a section of reasoning.
_NUM_LAST_TOKENS = 32
_NAME = "thinking_token_budget"


class _Decodes(Protocol):
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


def opens_reasoning(form: ChatFormat, tokenizer: _Decodes, prompt: Sequence[int]) -> bool | None:
    """Whether a prompt ends inside a section of reasoning: False if it has just closed one, None if it has no mark."""
    tags = form.reasoning
    if tags is None:
        return None
    text = tokenizer.decode(prompt[-_NUM_LAST_TOKENS:], skip_special_tokens=False).rstrip()
    return True if text.endswith(tags.opener) else False if text.endswith(tags.closer) else None


def thinking_limit(prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer | None) -> ThinkingLimit | None:
    """The bound on reasoning that parameters ask for, in the model's format; None if they ask for none.

    Raises:
        RequestError: It is not known how the model writes its reasoning.
    """
    budget = params.thinking_token_budget
    if budget is None:
        return None
    form = prompt.form
    if form is None and tokenizer is not None and (usual := tokenizer.chat_templates.usual) is not None:
        form = choose_format(usual.text)
    marks = None if form is None else reasoning_marks(form)
    if form is None or marks is None or tokenizer is None:
        raise RequestError(
            f"{_NAME} needs a model whose reasoning can be told from its answer: its chat template has no such marks",
            param=_NAME,
        )
    is_reasoning = prompt.is_reasoning
    if prompt.form is None:
        is_reasoning = opens_reasoning(form, tokenizer, prompt.token_ids)
    is_assumed = form.reasoning is not None and form.reasoning.is_assumed
    return ThinkingLimit(
        max_tokens=budget,
        opener=marks.opener,
        closers=marks.closers,
        closing_ids=tuple(tokenizer.encode(marks.closing, add_special_tokens=False)),
        is_open=is_assumed if is_reasoning is None else is_reasoning,
        is_anywhere=marks.is_anywhere,
    )


def chat_prompt(tokenizer: Tokenizer, token_ids: list[int], chat_template: str | None, *, has_tools: bool) -> Prompt:
    """The prompt of a conversation that this template has rendered."""
    form = choose_format(tokenizer.chat_templates.get(chat_template, has_tools=has_tools).text)
    is_reasoning = opens_reasoning(form, tokenizer, token_ids)
    return Prompt(text=None, token_ids=token_ids, form=form, is_reasoning=is_reasoning)
