"""Request bodies: what is taken, what is refused, and with which words."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from nanoflow.engine.conversation import MESSAGE_FIELDS
from nanoflow.request import RequestError, SamplingParams
from nanoflow.server.body import RequestBody
from nanoflow.server.conversation_fields import Message, TextPart
from nanoflow.server.errors import ApiError, invalid_body
from nanoflow.server.foreign import OF_GENERATION, OF_MESSAGES, OF_PARTS, OF_STREAMS, OF_TOKENS
from nanoflow.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingFields,
    StreamOptions,
    TokenizeRequest,
)

USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "a", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [USER], **fields})


def error_of(body: dict[str, Any], kind: type[RequestBody] = CompletionRequest) -> ApiError:
    """The error for a body that is refused."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return invalid_body([{**problem, "loc": ("body", *problem["loc"])} for problem in caught.value.errors()])


def refusal(**fields: Any) -> str:
    """The message for a body of completions that is refused."""
    return error_of({"prompt": "a", **fields}).message


def test_a_bare_body_takes_the_defaults_of_sampling_params() -> None:
    assert completion().to_params() == SamplingParams()


def test_a_bare_chat_runs_to_the_context_end() -> None:
    assert chat().to_params() == SamplingParams(max_tokens=None)


def test_null_means_not_given() -> None:
    nulls = dict.fromkeys(SamplingFields.model_fields)
    assert completion(**nulls).to_params() == SamplingParams()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_four_forms_of_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt",
    [None, 5, {}, [], [[]], ["a", 1], [1, "a"], [1, [2]], [1.5], [True], [-1], [2**31], [None], "\ud800"],
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert refusal(prompt=prompt).startswith("prompt")


BAD_VALUES: dict[str, list[Any]] = {
    "temperature": [-0.1, 101, "1", True, math.nan, math.inf, 10**400, []],
    "top_p": [-0.1, 1.1],
    "n": [0, 129, 1.5, "1", True],
    "seed": [2**64, -(2**63) - 1, 0.5],
    "logprobs": [-2, 2**31, True],
    "top_k": [-2, 2.5, 2**63, True],
    "min_p": [-0.1, 1.1, "0"],
    "repetition_penalty": [0, 101, "1"],
    "presence_penalty": [-2.1, 2.1, False],
    "frequency_penalty": [-2.1, 2.1, [1]],
    "min_tokens": [-1, 2**31, 1.5],
    "prompt_logprobs": [-2, 2**31, 0.5],
    "ignore_eos": [1, "true", 0.0],
    "skip_special_tokens": [0, "no"],
    "include_stop_str_in_output": [1, {}],
    "allowed_token_ids": [[1.5], "12", [2**31], {"1": 1}],
    "bad_words": ["abc", [""], [1], ["x"] * 129],
    "stop": ["", ["a"] * 17, [""], [1], 5, "\ud800"],
    "logit_bias": [{"a": 1}, {"1": 101}, {"-1": 0}, {"1": None}, [1], {str(i): 0 for i in range(301)}],
    "stop_token_ids": [[-1], ["a"], 5],
    "stream_options": [{"include_usage": "yes"}, 1],
    "max_tokens": [-1, 2**31, "5"],
    "stream": ["true", 1],
    "model": [5, ["a"], "\udfff"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    assert refusal(**{name: value}).startswith(name)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{}]},
        {"structural_tag": {"type": "structural_tag"}},
        {"best_of": 2},
        {"suffix": "end"},
        {"functions": [{}]},
        {"use_beam_search": True},
    ],
)
def test_what_would_change_the_meaning_is_refused(fields: dict[str, Any]) -> None:
    assert refusal(**fields) == f"{next(iter(fields))} is not supported by this server"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"best_of": 1, "suffix": None},
        {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "priority": 0},
        {"parallel_tool_calls": True, "guided_json": None, "chat_template": None, "documents": []},
    ],
)
def test_what_changes_nothing_is_ignored(fields: dict[str, Any]) -> None:
    assert completion(**fields).to_params() == SamplingParams()


def test_best_of_n_is_n() -> None:
    assert completion(n=3, best_of=3).to_params() == SamplingParams(n=3)
    for n, best_of in ((3, 1), (3, 4), (2, 2.5), (1, True)):
        assert refusal(n=n, best_of=best_of) == "best_of is not supported by this server"


# Fields that a body has not

BODIES: dict[type[RequestBody], dict[str, Any]] = {
    CompletionRequest: {"prompt": "a"},
    ChatCompletionRequest: {"messages": [USER]},
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [1]},
    StreamOptions: {},
    Message: USER,
    TextPart: {"type": "text", "text": "a"},
}


def _is_open(kind: type[RequestBody]) -> bool:
    """True if other fields than its own are for the chat template: `test_chat_template.py`."""
    return kind in (Message, TextPart)


@pytest.mark.parametrize("kind", [kind for kind in BODIES if not _is_open(kind)], ids=lambda kind: kind.__name__)
def test_an_unknown_field_is_refused_with_the_nearest_name(kind: type[RequestBody]) -> None:
    real = next(iter(kind.model_fields))
    wrong = real + "x" + real[-1]
    error = error_of({**BODIES[kind], wrong: None}, kind)
    assert error.message == f"unknown field {wrong!r}; did you mean {real!r}?" and error.param == wrong


@pytest.mark.parametrize("name", ["zzzz", "", "\ud800", "{0}", "{message}", "a" * 10_000])
def test_any_unknown_name_is_refused_in_short(name: str) -> None:
    error = error_of({"prompt": "a", name: 1})
    assert error.message.startswith("unknown field ") and len(error.message) < 300
    json.dumps(error.body(), ensure_ascii=False).encode()


def test_the_place_of_an_unknown_field_is_told() -> None:
    messages = [USER, {"role": "user", "content": [{"type": "text", "text": "a", "image_url": 1}]}]
    error = error_of({"messages": messages}, ChatCompletionRequest)
    assert (error.param, error.message) == (
        "messages.1.content.0.image_url",
        "messages.1.content.0: image_url is not supported by this server",
    )
    fields = {"stream": True, "stream_options": {"include_usge": True}}
    assert refusal(**fields) == "stream_options: unknown field 'include_usge'; did you mean 'include_usage'?"


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_foreign_fields_are_taken_at_harmless_values_alone(kind: type[RequestBody]) -> None:
    for name, field in kind.foreign.items():
        if name in kind.model_fields:
            continue
        for value in (None, *(field.harmless or ())):
            kind.model_validate({**BODIES[kind], name: value})
        if field.harmless is None:
            kind.model_validate({**BODIES[kind], name: {"any": ["thing"]}})
        else:
            error = error_of({**BODIES[kind], name: {"any": ["thing"]}}, kind)
            assert (error.message, error.param) == (f"{name} is not supported by this server", name)


def test_every_foreign_field_has_a_reason_and_stands_in_the_document() -> None:
    for table in (OF_GENERATION, OF_TOKENS, OF_STREAMS, OF_MESSAGES, OF_PARTS):
        assert all(field.reason and not field.reason.endswith(".") for field in table.values())
    for kind in BODIES:
        schema = kind.model_json_schema()
        assert schema["additionalProperties"] is _is_open(kind)
        assert schema["properties"].keys() == kind.model_fields.keys() | kind.foreign.keys()


@pytest.mark.parametrize("value", [True, 1.5, "1", [1]])
def test_harmless_means_the_very_value(value: Any) -> None:
    assert refusal(best_of=value) == "best_of is not supported by this server"
    assert refusal(store=0 if value is True else value) == "store is not supported by this server"


def test_an_earlier_answer_is_a_message() -> None:
    """As the client of OpenAI writes what it got."""
    nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    assert chat(messages=[USER, {"role": "assistant", "content": "a", **nulls}]).messages[1].text == "a"


def test_the_name_of_who_speaks_reaches_the_template() -> None:
    assert chat(messages=[{**USER, "name": "Ada"}]).messages[0].turn == {**USER, "name": "Ada"}
    assert chat().messages[0].turn == USER


# Both doors


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in SamplingFields.model_fields for value in BAD_VALUES.get(name, [])]
)
def test_both_doors_refuse_in_the_same_words(name: str, value: Any) -> None:
    if name in ("model", "stream", "stream_options") or value == [-1]:
        return
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert refusal(**{name: value}) == str(caught.value)


def test_fields_that_do_not_go_together() -> None:
    assert refusal(stream_options={"include_usage": True}) == "stream_options needs stream=true"
    assert refusal(prompt_logprobs=1, stream=True) == "prompt_logprobs is not available in a stream"
    assert refusal(max_tokens=0) == "max_tokens must be at least 1 unless echo is true"
    with pytest.raises(ValueError, match="min_tokens"):
        completion(min_tokens=9, max_tokens=3).to_params()


def test_echo_scores_the_prompt() -> None:
    params = completion(echo=True, logprobs=3, max_tokens=0).to_params()
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (1, 3, 3)
    assert completion(echo=True).to_params().prompt_logprobs is None


def test_sampling_fields_reach_the_engine() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "seed": -7,
        "logit_bias": {"3": -100, "4": 1.5},
        "stop": "end",
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 2,
        "skip_special_tokens": False,
    }
    expected = SamplingParams(**{**fields, "logit_bias": {3: -100, 4: 1.5}})
    assert completion(**fields).to_params() == expected


def test_chat_limits_and_logprobs() -> None:
    assert chat(max_tokens=5).to_params().max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).to_params().max_tokens == 7
    assert chat(logprobs=True).to_params().logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).to_params().logprobs == 4
    with pytest.raises(ValidationError, match="top_logprobs needs logprobs=true"):
        chat(top_logprobs=4)


def test_all_log_probabilities_may_be_asked_for() -> None:
    """How many a server gives is the engine's to say."""
    assert completion(logprobs=-1).to_params().logprobs == -1
    assert completion(logprobs=-1, prompt_logprobs=3, echo=True).to_params().prompt_logprobs == -1
    assert completion(logprobs=3, prompt_logprobs=-1, echo=True).to_params().prompt_logprobs == -1
    assert chat(logprobs=True, top_logprobs=-1).to_params().logprobs == -1


def test_top_p_may_be_zero() -> None:
    assert completion(top_p=0).to_params().top_p == 0


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"truncate_prompt_tokens": 2}, [4, 5]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, [4, 5]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [1, 2]),
        ({"truncate_prompt_tokens": 4}, [2, 3, 4, 5]),
        ({"truncate_prompt_tokens": -1}, [2, 3, 4, 5]),
        ({"truncation_side": "right"}, [1, 2, 3, 4, 5]),
    ],
)
def test_a_prompt_may_be_truncated(fields: dict[str, Any], kept: list[int]) -> None:
    assert completion(**fields).truncated([1, 2, 3, 4, 5], 4) == kept


def test_what_cannot_be_kept_of_a_prompt_is_refused() -> None:
    assert refusal(truncate_prompt_tokens=0).startswith("truncate_prompt_tokens: a prompt has at least 1 token")
    assert refusal(truncate_prompt_tokens=-2).startswith("truncate_prompt_tokens")
    assert refusal(truncation_side="middle").startswith("truncation_side")
    with pytest.raises(ValueError, match="truncate_prompt_tokens is 5, and there is room for 4 tokens"):
        completion(truncate_prompt_tokens=5).truncated([1, 2, 3, 4, 5], 4)


def test_template_options_are_passed_on_if_given() -> None:
    kwargs = {"enable_thinking": False, "depth": {"a": [1, None]}}
    assert chat(chat_template_kwargs=kwargs).template_options["chat_template_kwargs"] == kwargs
    assert chat(chat_template="{{ x }}").template_options["chat_template"] == "{{ x }}"
    for wrong in (5, "a", [1]):
        with pytest.raises(ValidationError, match="chat_template_kwargs"):
            chat(chat_template_kwargs=wrong)


def test_an_assistant_may_say_nothing_and_templates_get_every_field() -> None:
    (message,) = chat(messages=[{"role": "assistant", "content": None, "reasoning": "7"}]).messages
    assert (message.text, message.turn) == ("", {"role": "assistant", "content": None, "reasoning": "7"})
    assert chat(messages=[{"role": "assistant"}]).messages[0].turn == {"role": "assistant", "content": None}
    part, answer = {"type": "text", "text": "a"}, {"role": "tool", "name": "f", "tool_call_id": "7"}
    assert chat(messages=[{**answer, "content": [part]}]).messages[0].turn == {**answer, "content": [part]}
    assert Message.model_fields.keys() == set(MESSAGE_FIELDS)


def test_what_is_echoed_is_the_assistants() -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert chat(messages=[USER, answer], echo=True).echoed == "a\nb"
    assert chat(messages=[USER, answer]).echoed == ""
    assert chat(messages=[answer, USER], echo=True).echoed == ""


def test_content_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "a\nb"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": []},
        {"role": "", "content": "a"},
        {"role": "w" * 65, "content": "a"},
        {"role": 5, "content": "a"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": "a", "tool_calls": [{}]},
    ],
)
def test_other_messages_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(messages=[message])


def test_a_continued_message_opens_no_new_turn() -> None:
    assert chat().template_options == {"add_generation_prompt": True, "continue_final_message": False}
    continued = chat(continue_final_message=True)
    assert continued.template_options == {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(ValidationError, match="exclude each other"):
        chat(continue_final_message=True, add_generation_prompt=True)


def test_tokenize_takes_one_of_two() -> None:
    for body in ({}, {"prompt": "a", "messages": [USER]}):
        with pytest.raises(ValidationError, match="either prompt or messages"):
            TokenizeRequest.model_validate(body)


def test_long_token_lists_fail_fast() -> None:
    assert refusal(prompt=[1, *["x"] * 100_000]).startswith("prompt.1: ")


def test_error_bodies_can_always_be_encoded_and_stay_short() -> None:
    body = ApiError(400, "bad \ud800 " + "x" * 100_000, param="\udfff").body()
    assert len(json.dumps(body, ensure_ascii=False).encode()) < 2000
