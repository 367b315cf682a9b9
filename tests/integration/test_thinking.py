"""A bound on reasoning, end to end: the section is closed where the bound is reached, and the answer goes on."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow import LLM, RequestError, SamplingParams
from nanoflow.scheduler.gain import Gain
from tests.driving import expect_less
from tests.templates import CALLING

OPEN = {"opens": True}
MESSAGES = [{"role": "user", "content": "def f(a, b, a, b, a, b):"}]
BUDGETS = (0, 11)


def completions(llm: LLM, budget: int | None, **params: Any) -> list[list[int]]:
    given = {"max_tokens": 24, "temperature": 0.0, **params}
    sampling = SamplingParams(thinking_token_budget=budget, **given)
    (output,) = llm.chat(MESSAGES, sampling, chat_template_kwargs=OPEN)
    return [one.token_ids for one in output.outputs]


def test_reasoning_is_closed_at_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts, which may go beyond the bound; without any in the test below."""
    monkeypatch.setattr(Gain, "allows", lambda *_: True)
    with LLM(chat_template=CALLING, max_num_seqs=4, max_model_len=256, speculative="ngram:4:3:1") as llm:
        closing = llm.tokenizer.encode("</think>", add_special_tokens=False)
        (free,) = completions(llm, None)
        assert completions(llm, 1000) == [free]
        for budget in BUDGETS:
            (bounded,) = completions(llm, budget)
            assert bounded[:budget] == free[:budget] and len(bounded) == 24
            assert bounded[budget:][: len(closing)] == closing
        several = completions(llm, 7, n=2, temperature=1.0, seed=1)
        assert all(one[7:][: len(closing)] == closing for one in several) and several[0] != several[1]
        # A stop string may be the mark itself.
        assert len(completions(llm, 7, stop=["</think>"])[0]) == 7 + len(closing)
        # A grammar that has no place for the mark goes first.
        (held,) = completions(llm, 7, structured_outputs={"regex": "[a-z]{60}"}, max_tokens=12)
        assert llm.tokenizer.decode(held).isalpha()
        stats = {each.name: getattr(each, "value", 0) for each in llm.get_metrics()}
        assert any("draft" in name and value for name, value in stats.items()), stats


def test_preempted_requests_keep_their_bound() -> None:
    with LLM(chat_template=CALLING, num_pages=14, page_size=16, max_num_seqs=6, max_model_len=112) as small:
        closing = small.tokenizer.encode("</think>", add_special_tokens=False)
        expect_less(small._engine, 8)
        params = SamplingParams(thinking_token_budget=30, max_tokens=60, temperature=0.0)
        outputs = small.chat([MESSAGES] * 6, params, chat_template_kwargs=OPEN)
        num_preemptions = next(each for each in small.get_metrics() if "preemption" in each.name)
    assert getattr(num_preemptions, "value", 0) > 0
    for output in outputs:
        assert output.outputs[0].token_ids[30:][: len(closing)] == closing


def test_without_marks_of_reasoning_it_is_refused() -> None:
    with LLM(max_num_seqs=2, max_model_len=128) as llm, pytest.raises(RequestError, match="thinking_token_budget"):
        llm.chat(MESSAGES, SamplingParams(thinking_token_budget=3))
