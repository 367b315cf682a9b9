"""Bodies of /v1/responses and /v1/messages: the chat completions that they become, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from nanoflow.server.errors import ApiError, invalid_body
from nanoflow.server.late_system import as_user, with_shown_system
from nanoflow.server.message_chat import NAMES as MESSAGE_NAMES
from nanoflow.server.message_chat import chat_fields as message_chat
from nanoflow.server.message_fields import MessageCountRequest, MessageRequest
from nanoflow.server.protocol import ChatCompletionRequest
from nanoflow.server.response_chat import NAMES as RESPONSE_NAMES
from nanoflow.server.response_chat import chat_fields as response_chat
from nanoflow.server.response_chat import input_items
from nanoflow.server.response_fields import ResponseRequest
from nanoflow.server.service import Service
from nanoflow.server.turn import by_names
from tests import templates
from tests.toy_tokenizers import toy_tokenizer

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "é"}'}}


def chat_of_response(**fields: Any) -> Any:
    """The chat completion of a response, checked, without what is not given."""
    body = ResponseRequest.model_validate({"input": "hi", **fields})
    return checked(response_chat(body, input_items(body)))


def chat_of_message(**fields: Any) -> Any:
    body = MessageRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **fields})
    return checked(message_chat(body))


def checked(fields: dict[str, Any]) -> Any:
    given = {name: value for name, value in fields.items() if value is not None}
    ChatCompletionRequest.model_validate(given)
    return given


def text(kind: str, *texts: str) -> list[dict[str, str]]:
    return [{"type": kind, "text": one} for one in texts]


# Responses


def test_items_become_messages() -> None:
    """What the assistant thought, said and called between two results is one message."""
    items = [
        {"role": "developer", "content": "b"},
        {"role": "user", "content": text("input_text", "one", "two")},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": text("reasoning_text", "hm")},
        {"type": "message", "role": "assistant", "content": text("output_text", "I look."), "status": "completed"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"city": "é"}', "id": "fc_1"},
        {"type": "message", "role": "assistant", "content": text("output_text", "Wait.")},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "reasoning", "summary": text("summary_text", "so")},
        {"role": "assistant", "content": "It rains."},
        {"role": "assistant", "content": "Still."},
        {"type": "message", "role": "system", "content": "be brief"},
    ]
    assert chat_of_response(instructions="a", input=items)["messages"] == [
        {"role": "system", "content": text("text", "a", "b")},
        {"role": "user", "content": text("text", "one", "two")},
        {"role": "assistant", "content": "I look.\nWait.", "reasoning": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "reasoning": "so"},
        {"role": "assistant", "content": "Still."},
        {"role": "system", "content": "be brief"},
    ]
    assert chat_of_response(instructions="a")["messages"][0] == {"role": "system", "content": "a"}


def test_items_are_kept_with_ids_and_parts() -> None:
    body = ResponseRequest.model_validate({"input": [{"role": "assistant", "content": "a"}]})
    (item,) = input_items(body)
    assert item.pop("id").startswith("msg_") and item["status"] == "completed"
    assert item["content"] == [{"type": "output_text", "text": "a", "annotations": []}]


def test_fields_of_a_response_become_those_of_a_chat() -> None:
    tool = {"type": "function", "name": "f", "description": "d", "parameters": CITY, "strict": True}
    chat = chat_of_response(
        tools=[tool],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        max_output_tokens=7,
        temperature=0.5,
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        user="u",
    )
    del chat["messages"]
    assert chat == {
        "tools": [
            {"type": "function", "function": {"name": "f", "description": "d", "parameters": CITY, "strict": True}}
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "max_tokens": 7,
        "temperature": 0.5,
        "reasoning_effort": "low",
    }
    schema = {"type": "json_schema", "name": "a", "schema": CITY, "strict": True}
    shape = {"name": "a", "schema": CITY, "strict": True}
    assert chat_of_response(text={"format": schema})["response_format"] == {
        "type": "json_schema",
        "json_schema": shape,
    }
    assert chat_of_response(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    "fields, place, words",
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", "'input_image'"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input.0", "encrypted_content"),
        ({"background": True}, "", "background"),
        ({"conversation": "conv_1"}, "", "conversation"),
        ({"truncation": "auto"}, "", "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include", "logprobs"),
        ({"metadata": {"a": "b" * 513}}, "metadata", "512"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning", "summary"),
        ({"inputs": 1}, "", "did you mean 'input'"),
    ],
)
def test_what_a_response_cannot_have_is_refused_by_name(fields: dict[str, Any], place: str, words: str) -> None:
    check_refused(ResponseRequest, {"input": "hi", **fields}, place, words)


# Messages


def test_blocks_become_messages() -> None:
    """Results of calls are messages of their own, in the order of the blocks."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"city": "é"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": text("text", "rain", "wind")},
                {"type": "tool_result", "tool_use_id": "c2", "content": "none", "is_error": True},
                {"type": "text", "text": "so?"},
            ],
        },
    ]
    chat = chat_of_message(system=text("text", "a"), messages=messages)
    assert chat["messages"] == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "I look.", "reasoning": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": text("text", "rain", "wind")},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: none"},
        {"role": "user", "content": "so?"},
    ]
    assert "continue_final_message" not in chat
    begun = chat_of_message(messages=[messages[0], {"role": "assistant", "content": "It"}])
    assert begun["continue_final_message"] is True


def test_fields_of_a_message_become_those_of_a_chat() -> None:
    chat = chat_of_message(
        tools=[{"name": "f", "input_schema": CITY, "type": "custom"}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["x"],
        top_k=3,
        thinking={"type": "disabled"},
        metadata={"user_id": "u"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"format": {"type": "json_schema", "schema": CITY}, "effort": "low"},
    )
    del chat["messages"]
    assert chat == {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": CITY}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "stop": ("x",),
        "top_k": 3,
        "max_tokens": 5,
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY}},
    }
    named = chat_of_message(tools=[{"name": "f", "input_schema": CITY}], tool_choice={"type": "tool", "name": "f"})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    omitted = chat_of_message(thinking={"type": "adaptive", "display": "omitted"})
    assert omitted["include_reasoning"] is False and omitted["chat_template_kwargs"] == {"enable_thinking": True}


def test_the_default_effort_needs_no_template_that_knows_it() -> None:
    for effort, takes, expected in (("high", False, None), ("high", True, "high"), ("low", False, "low")):
        body = MessageCountRequest.model_validate(
            {"messages": [{"role": "user", "content": "a"}], "output_config": {"effort": effort}}
        )
        assert message_chat(body, takes_effort=takes)["reasoning_effort"] == expected


def test_a_budget_of_thinking_is_passed_on() -> None:
    wanted = {"type": "enabled", "budget_tokens": 1024}
    assert chat_of_message(thinking=wanted)["thinking_token_budget"] == 1024


@pytest.mark.parametrize(
    "fields, place, words",
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0", "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]}, "messages.0", "'user'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'user'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0", "bash_20250124"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice", "name"),
        ({"max_tokens": None}, "max_tokens", "integer"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management", "shorten"),
        ({"mcp_servers": [{}]}, "", "mcp_servers"),
        ({"stop": "x"}, "", "unknown field 'stop'"),
    ],
)
def test_what_a_message_cannot_have_is_refused_by_name(fields: dict[str, Any], place: str, words: str) -> None:
    check_refused(
        MessageRequest, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, **fields}, place, words
    )


def test_tokens_are_counted_without_max_tokens() -> None:
    body = MessageCountRequest.model_validate({"messages": [{"role": "user", "content": "a"}]})
    assert checked(message_chat(body))["messages"] == [{"role": "user", "content": "a"}]
    check_refused(MessageRequest, {"messages": [{"role": "user", "content": "a"}]}, "max_tokens", "required")


def check_refused(model: Any, fields: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(fields)
    (problem, *_) = caught.value.errors()
    loc = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("<"))
    assert loc.startswith(place) and words in problem["msg"]


@pytest.mark.parametrize(
    "model, fields, param, code",
    [
        (ResponseRequest, {"include": ["message.output_text.logprobs"]}, "include", None),
        (ResponseRequest, {"metadata": {"a": "b" * 513}}, "metadata", None),
        (ResponseRequest, {"tool_choice": "any"}, "tool_choice", None),
        (ResponseRequest, {"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.type", None),
        (ChatCompletionRequest, {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", None),
        (ChatCompletionRequest, {"tool_choice": 5}, "tool_choice", None),
        (MessageRequest, {"thread": {"type": "create"}}, "thread", "thread_unsupported_request"),
    ],
)
def test_the_place_of_a_mistake_is_told_once(model: Any, fields: dict[str, Any], param: str, code: str | None) -> None:
    given = {"input": "a"} if model is ResponseRequest else {"messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(ValidationError) as caught:
        model.model_validate({**given, **({"max_tokens": 1} if model is MessageRequest else {}), **fields})
    error = invalid_body([{**problem, "loc": ("body", *problem["loc"])} for problem in caught.value.errors()])
    assert (error.param, error.code) == (param, code) and "literal" not in error.message


def test_errors_name_the_fields_that_were_sent() -> None:
    names = ((r"messages\b.*", "input"), (r"(tools\[\d+\])\.function\b(.*)", r"\1\2"))
    for param, expected in (("messages.3.content", "input"), ("tools[1].function.name", "tools[1].name"), ("n", "n")):
        with pytest.raises(ApiError) as caught, by_names(names):
            raise ApiError(400, f"{param} is wrong", param=param)
        assert caught.value.param == expected and caught.value.message == f"{expected} is wrong"
    for doors_names, field in ((RESPONSE_NAMES, "text.format"), (MESSAGE_NAMES, "output_config.format")):
        for place, expected in (("json_schema.schema", "schema"), ("type", "type")):
            with pytest.raises(ApiError) as caught, by_names(doors_names):
                raise ApiError(400, f"response_format.{place} is wrong", param="response_format")
            assert caught.value.param == field and caught.value.message == f"{field}.{expected} is wrong"


def test_late_system_messages_become_text_of_the_user() -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    tool, answer = {"role": "tool", "tool_call_id": "c", "content": "t"}, {"role": "assistant", "content": "a"}
    assert as_user([system, user, system, answer]) == [
        system,
        {"role": "user", "content": text("text", "u", "s")},
        answer,
    ]
    tokenizer = toy_tokenizer(chat_template=templates.FIRST_SYSTEM)
    service = cast(Service, SimpleNamespace(tokenizer=tokenizer))
    shown = {"messages": [system, {"role": "user", "content": text("text", "u", "s")}]}
    assert with_shown_system(service, {"messages": [system, user, system]}) == shown
    assert with_shown_system(service, {"messages": [system, user]}) == {"messages": [system, user]}
    tokenizer.close()
    assert as_user([user, tool, {**system, "role": "developer"}]) == [user, tool, {"role": "user", "content": "s"}]
