"""Background requests in a real engine: left out of iterations for a while, they get the tokens that they get alone."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.engine.prompts import Prompt, make_requests, read_prompt, with_names
from nanoflow.request import RequestError, SamplingParams
from tests.fake_engine import fake_facts
from tests.left_out import tokens_alone_and_beside


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6],
        {"prompt_token_ids": [5, 6]},
        {"prompt_token_ids": [5, 6], "priority": 7},
        Prompt(text=None, token_ids=[5]),
    ],
)
def test_every_form_of_a_prompt_takes_a_priority_to_its_requests(prompt: Any) -> None:
    params = SamplingParams(n=2, max_tokens=1)
    for priority in (-1, "batch"):
        read = read_prompt(with_names(prompt, priority=priority), None)
        requests = make_requests(
            read, params, facts=fake_facts(), first_id=0, first_seed=0, eos_token_ids=(), arrival_s=0.0
        )
        assert [request.priority for request in requests] == [priority] * 2
    assert read_prompt(with_names([5], cache_salt="s", priority=None), None).priority == 0


def test_a_priority_is_an_integer_or_batch() -> None:
    for wrong in ("low", 1.5, True, 2**31):
        with pytest.raises(RequestError, match="priority must be"):
            read_prompt({"prompt_token_ids": [1], "priority": wrong}, None)


def test_requests_that_were_left_out_get_the_same_tokens() -> None:
    alone, beside, num_without = tokens_alone_and_beside("cpu")
    assert beside == alone and all(len(tokens) == 12 for tokens in alone)
    assert num_without > 5
