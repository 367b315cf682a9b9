"""What a call may ask for: sums over prompts, messages and completions count, and each bound is an option."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from benchmarks.common.stub_facts import stub_facts

from nanoflow.bounds import ServerBounds
from nanoflow.config import ConfigError, ServerConfig
from nanoflow.server.call_bounds import CallBounds
from nanoflow.server.errors import ApiError

FACTS = dataclasses.replace(stub_facts(), vocab_size=500, max_model_len=100)


def problem_of(body: Any, *, generates: bool = True, **bounds: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call_bounds(**bounds).check(body, generates=generates)
    return caught.value


def call_bounds(**bounds: Any) -> CallBounds:
    return CallBounds(bounds=ServerBounds(**bounds), facts=FACTS, longest_token_chars=10)


@pytest.mark.parametrize(
    ("body", "bounds", "status", "param"),
    [
        ({"prompt": ["a"] * 5}, {"max_prompts": 4}, 400, "prompt"),
        ({"prompt": [[1]] * 5}, {"max_prompts": 4}, 400, "prompt"),
        ({"prompt": ["a"] * 5, "n": 3}, {"max_call_choices": 14}, 400, "n"),
        ({"prompt": "a", "n": 15}, {"max_call_choices": 14}, 400, "n"),
        ({"messages": [], "n": 15}, {"max_call_choices": 14}, 400, "n"),
        ({"prompt": ["abcd"] * 5}, {"max_call_chars": 19}, 413, "prompt"),
        ({"prompt": "a" * 1001}, {}, 400, "prompt"),
        ({"prompt": ["a", "a" * 1001]}, {}, 400, "prompt"),
        ({"messages": [{"content": "ab"}] * 5}, {"max_call_chars": 9}, 413, "messages"),
        ({"messages": [{"content": [{"text": "ab"}, {"text": "cd"}]}] * 5}, {"max_call_chars": 19}, 413, "messages"),
        ({"messages": [{"content": "", "name": "abcd"}] * 5}, {"max_call_chars": 19}, 413, "messages"),
        ({"messages": [{}] * 5}, {"max_messages": 4}, 400, "messages"),
        ({"messages": [{"content": [{}] * 3}] * 2}, {"max_messages": 5}, 400, "messages"),
        ({"stop": ["a"] * 3}, {"max_stop_strings": 2}, 400, "stop"),
        ({"stop": "abcd"}, {"max_stop_chars": 3}, 400, "stop"),
        ({"stop": ["ab", "cd"]}, {"max_stop_chars": 3}, 400, "stop"),
        ({"stop": ["ab"], "bad_words": ["cd"]}, {"max_stop_chars": 3}, 400, "bad_words"),
        ({"bad_words": ["a"] * 3}, {"max_bad_words": 2}, 400, "bad_words"),
        ({"stop_token_ids": [1] * 3}, {"max_stop_token_ids": 2}, 400, "stop_token_ids"),
        ({"logit_bias": {"1": 1, "2": 2}}, {"max_logit_bias": 1}, 400, "logit_bias"),
        ({"allowed_token_ids": [1] * 501}, {}, 400, "allowed_token_ids"),
        ({"allowed_token_ids": [1] * 5}, {"max_allowed_token_ids": 4}, 400, "allowed_token_ids"),
        ({"prompt": "a", "max_tokens": 10, "logprobs": 4}, {"max_call_scores": 49}, 400, "logprobs"),
        ({"prompt": "a", "max_tokens": 10, "logprobs": 4, "n": 2}, {"max_call_scores": 99}, 400, "logprobs"),
        ({"prompt": ["a"] * 2, "max_tokens": 10, "logprobs": 4}, {"max_call_scores": 99}, 400, "logprobs"),
        ({"prompt": [1] * 90, "echo": True, "logprobs": 1}, {"max_call_scores": 211}, 400, "logprobs"),
        ({"prompt": [1] * 90, "prompt_logprobs": 1}, {"max_call_scores": 179}, 400, "prompt_logprobs"),
        ({"prompt": [1], "prompt_logprobs": -1}, {"max_call_scores": 499}, 400, "prompt_logprobs"),
        ({"messages": [{}], "logprobs": True, "top_logprobs": 3}, {"max_call_scores": 399}, 400, "logprobs"),
    ],
)
def test_too_much_is_refused_and_names_its_field(
    body: dict[str, Any], bounds: dict[str, Any], status: int, param: str
) -> None:
    problem = problem_of(body, **bounds)
    assert (problem.status, problem.param) == (status, param)
    assert param in problem.message or "log probabilities" in problem.message or "completions" in problem.message
    # One more is enough: the bound itself is let in.
    call_bounds(**{name: value + 1 for name, value in bounds.items()} or {"max_allowed_token_ids": 501}).check(
        body, generates=False
    )


def test_a_prompt_that_is_cut_or_only_tokenised_may_be_longer_than_the_context() -> None:
    body = {"prompt": "a" * 1001}
    assert problem_of(body).code == "context_length_exceeded"
    assert "maximum context length" in problem_of(body).message
    call_bounds().check(body, generates=False)
    call_bounds().check({**body, "truncate_prompt_tokens": 5})


def test_nothing_is_known_of_tokens_nothing_is_refused_by_them() -> None:
    CallBounds(bounds=ServerBounds(), facts=FACTS).check({"prompt": "a" * 100_000})


@pytest.mark.parametrize(
    "body",
    [
        *(None, [], "a", 5, {}, {"prompt": None}, {"prompt": {}}, {"prompt": [None] * 9}, {"n": True, "prompt": "a"}),
        *({"n": "7"}, {"messages": 5}, {"messages": [5, None, {"content": 7}]}, {"stop": {"a": "b"}}, {"stop": [5]}),
        *({"logprobs": "all", "max_tokens": -4}, {"logprobs": [1], "prompt_logprobs": {}}, {"logit_bias": 5}),
        *({"echo": "x", "logprobs": 1.5, "prompt": [[], None]}, {"top_logprobs": 5, "logprobs": None}),
    ],
)
def test_wrong_types_are_left_to_the_model_of_the_body(body: Any) -> None:
    call_bounds().check(body)


@pytest.mark.parametrize(
    ("text", "bounds", "status"),
    [
        (b"[" * 6 + b"]" * 6, {"max_json_depth": 5}, 400),
        (b'{"a":' * 6 + b"1" + b"}" * 6, {"max_json_depth": 5}, 400),
        (b"[1,2,3,4,5,6]", {"max_json_items": 12}, 413),
        (b"[[],[]]", {"max_json_items": 24}, 413),
    ],
)
def test_json_is_refused_by_its_shape(text: bytes, bounds: dict[str, int], status: int) -> None:
    with pytest.raises(ApiError) as caught:
        call_bounds(**bounds).check_text(text)
    assert caught.value.status == status
    call_bounds(**{name: value + 1 for name, value in bounds.items()}).check_text(text)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_stop_strings": 17}, "max_stop_strings may be at most 16"),
        ({"max_body_bytes": 0}, "max_body_bytes must be positive"),
        ({"max_queued_requests": -1}, "max_queued_requests must not be negative"),
        ({"header_timeout_s": -1.0}, "header_timeout_s must be positive"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**bounds)
