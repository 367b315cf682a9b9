"""The bound on reasoning, token by token, against what a whole text says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.chat_formats.formats import CALLS, HARMONY, REASONING, ChatFormat
from nanoflow.chat_formats.marks import reasoning_marks
from nanoflow.engine.prompts import Prompt
from nanoflow.engine.reasoning import thinking_limit
from nanoflow.request import RequestError, SamplingParams
from nanoflow.thinking import Thinking, ThinkingLimit
from tests.templates import CALLING
from tests.toy_tokenizers import toy_tokenizer

CLOSING = (900, 901)


def limit(form: ChatFormat, max_tokens: int, *, is_open: bool = False) -> ThinkingLimit:
    marks = reasoning_marks(form)
    assert marks is not None
    return ThinkingLimit(
        max_tokens=max_tokens,
        opener=marks.opener,
        closers=marks.closers,
        closing_ids=CLOSING,
        is_open=is_open,
        is_anywhere=marks.is_anywhere,
    )


def forced_after(bound: ThinkingLimit, pieces: Iterable[str]) -> int | None:
    """Behind how many tokens a token is forced for the first time; None if it never is."""
    state = Thinking.begin(bound)
    for place, piece in enumerate(pieces):
        if state.forced:
            return place
        state = state.after(place, piece.encode())
    return None


TAGS = ChatFormat(reasoning=REASONING["qwen3"])


@pytest.mark.parametrize(
    ("form", "is_open", "pieces", "max_tokens", "place"),
    [
        (TAGS, True, "abcdef", 3, 3),
        (TAGS, True, "abcdef", 0, 0),
        (TAGS, True, ["a", "b", "</think>", "c", "d", "e"], 3, None),
        (TAGS, True, ["a", "b</th", "ink>\n\n", "c", "d", "e"], 3, None),
        (TAGS, False, ["\n<think>", "a", "b", "c", "d"], 2, 3),
        (TAGS, False, ["<th", "ink>a", "b", "c", "d"], 1, 3),
        (TAGS, False, ["<think>", "a"], 0, 1),
        (TAGS, False, ["Hi <think>", "a", "b", "c", "d"], 1, None),
        (TAGS, True, ["</think>", "<think>", "a", "b", "c"], 1, None),
        (HARMONY, False, ["<|channel|>", "analysis", "<|message|>", "a", "b", "c"], 2, 5),
        (HARMONY, False, ["<|channel|>", "final", "<|message|>", "a", "b", "c"], 2, None),
        (
            HARMONY,
            False,
            ["<|channel|>analysis<|message|>", "a", "<|end|>", "<|channel|>analysis<|message|>", "b", "c"],
            2,
            5,
        ),
    ],
)
def test_where_reasoning_is_closed(
    form: ChatFormat, is_open: bool, pieces: Any, max_tokens: int, place: int | None
) -> None:
    assert forced_after(limit(form, max_tokens, is_open=is_open), pieces) == place


def test_what_is_forced_comes_once_and_then_nothing_is_bounded() -> None:
    state = Thinking.begin(limit(TAGS, 1, is_open=True)).after(7, b"a")
    assert state.forced == CLOSING
    state = state.after(CLOSING[0], b"</thi")
    assert state.forced == CLOSING[1:] and not state.is_over
    assert state.after(CLOSING[1], b"nk>").is_over


def test_with_channels_the_bound_is_of_all_sections() -> None:
    state = Thinking.begin(limit(HARMONY, 1))
    for piece in ("<|channel|>analysis<|message|>", "a"):
        state = state.after(1, piece.encode())
    assert state.forced == CLOSING
    for token_id in CLOSING:
        state = state.after(token_id, b"")
    assert not state.is_over and not state.forced
    assert state.after(1, b"<|channel|>analysis<|message|>").forced == CLOSING


@settings(max_examples=60, deadline=None)
@given(text=st.text("a<think/> \n", max_size=30), places=st.lists(st.integers(1, 40), max_size=6))
def test_marks_are_found_however_tokens_cut_them(text: str, places: list[int]) -> None:
    text = f"<think>{text}</think>{text}"
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    state = Thinking.begin(limit(TAGS, 1000))
    for start, end in itertools.pairwise(ends):
        state = state.after(1, text[start:end].encode())
    assert state.is_over


def test_a_limit_is_read_from_the_model_and_the_prompt() -> None:
    tokenizer = toy_tokenizer(chat_template=CALLING)

    def read(text: str, form: ChatFormat | None = None, budget: int | None = 2, **more: Any) -> ThinkingLimit | None:
        prompt = Prompt(text=None, token_ids=tokenizer.encode(text), form=form, **more)
        return thinking_limit(prompt, SamplingParams(thinking_token_budget=budget), tokenizer)

    assert read("[assistant]", budget=None) is read("[assistant]", budget=-1) is None
    opened, plain = read("[assistant]<think>\n"), read("[assistant]")
    assert opened is not None and opened.is_open and opened.max_tokens == 2
    assert tokenizer.decode(opened.closing_ids) == "</think>"
    assert plain is not None and not plain.is_open
    r1 = read("[assistant]", ChatFormat(reasoning=REASONING["deepseek_r1"]))
    assert r1 is not None and r1.is_open
    closed = read("", ChatFormat(reasoning=REASONING["deepseek_r1"]), is_reasoning=False)
    assert closed is not None and not closed.is_open
    with pytest.raises(RequestError, match="thinking_token_budget needs a model whose reasoning") as caught:
        read("", ChatFormat(calls=CALLS["hermes"]))
    assert caught.value.param == "thinking_token_budget"
    tokenizer.close()
