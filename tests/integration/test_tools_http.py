"""Calls of tools and reasoning over HTTP: what the official client gets, whole and as a stream, over several turns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from nanoflow.config import ServerConfig
from tests.fake_server import error_of, served
from tests.pages import blocks
from tests.scripted_engine import ScriptedEngine
from tests.templates import ANY_ROLE, CALLING, CALLING_TEXT
from tests.toy_tokenizers import EOS, toy_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD = {"type": "function", "function": {"name": "add"}}
TOOLS = [WEATHER, ADD]
USER = {"role": "user", "content": "weather?"}
PARIS, SUM = '{"city": "Paris é🌧"}', '{"a": 1,  "b": [2]}'
TWO_CALLS = (
    "<think>\nLet me look.\n</think>\n\nOne moment.\n"
    f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "add", "arguments": {SUM}}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(toy_tokenizer(chat_template=CALLING))


@pytest.fixture(scope="module")
def http(engine: ScriptedEngine) -> Iterator[httpx.Client]:
    with served(engine) as root_url, httpx.Client(base_url=root_url, timeout=10) as client:
        yield client
    engine.tokenizer.close()


@pytest.fixture
def client(http: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{str(http.base_url).rstrip('/')}/v1", api_key="none", max_retries=0)


def ask(http: httpx.Client, engine: ScriptedEngine, text: str, **fields: Any) -> Any:
    """The only choice of an answer in which the model says `text`."""
    engine.texts.append(text)
    answer = http.post("/v1/chat/completions", json={"messages": [USER], **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def streamed(http: httpx.Client, engine: ScriptedEngine, text: str, **fields: Any) -> Any:
    """The sum of the chunks of a stream, in the shape of a whole choice."""
    engine.texts.append(text)
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    choice: dict[str, Any] = {"message": message}
    with http.stream("POST", "/v1/chat/completions", json={"messages": [USER], **fields, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    for chunk in map(json.loads, lines[:-1]):
        if "error" in chunk:
            return chunk["error"]
        (part,) = chunk["choices"]
        delta = part["delta"]
        message["content"] += delta.get("content", "")
        message["reasoning_content"] += delta.get("reasoning_content", "")
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"]) and call["type"] == "function"
                message["tool_calls"].append({"id": call["id"], "type": "function", "function": call["function"]})
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        choice["finish_reason"] = part["finish_reason"]
    return choice


def plain(choice: Any) -> Any:
    """What two answers to the same must have in common."""
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"] or ()]
    return message["content"] or "", message["reasoning_content"] or "", calls, choice["finish_reason"]


# The official client


def test_two_calls_at_once_reach_the_client(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.texts.append(TWO_CALLS)
    answer = client.chat.completions.create(model="toy", messages=[USER], tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "One moment."
    assert choice.message.reasoning_content == choice.message.reasoning == "Let me look."
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [("get_weather", PARIS), ("add", SUM)]
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)
    assert f"[tools]{json.dumps(WEATHER)}{json.dumps(ADD)}" in engine.prompts[-1]
    # Marks of calls may be special tokens, so the engine is asked for these.
    assert engine.seen_params[-1].skip_special_tokens is False


def test_a_stream_of_the_client_has_the_same(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.texts.append(TWO_CALLS)
    with client.chat.completions.stream(model="toy", messages=[USER], tools=TOOLS) as stream:
        answer = stream.get_final_completion()
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "One moment."
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [("get_weather", PARIS), ("add", SUM)]


def test_results_of_tools_come_back_in_the_next_turn(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.texts += [TWO_CALLS, "<think>ok</think>It rains."]
    messages: list[Any] = [USER]
    first = client.chat.completions.create(model="toy", messages=messages, tools=TOOLS).choices[0].message
    messages.append(first)
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": f"result {place}"}
        for place, call in enumerate(first.tool_calls)
    ]
    second = client.chat.completions.create(model="toy", messages=messages, tools=TOOLS).choices[0]
    assert second.finish_reason == "stop" and second.message.content == "It rains."
    assert engine.prompts[-1].endswith(
        "[user]weather?[assistant]<think>Let me look.</think>One moment."
        f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>'
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call>'
        "[tool]result 0[tool]result 1[assistant]"
    )


# Whole answers and streams


@pytest.mark.parametrize(
    "text, fields, expected",
    [
        ("<think>hm</think>Hi", {}, ("Hi", "hm", [], "stop")),
        ("<think>hm</think>Hi", {"include_reasoning": False}, ("Hi", "", [], "stop")),
        (
            TWO_CALLS,
            {"parallel_tool_calls": False},
            ("One moment.", "Let me look.", [("get_weather", PARIS)], "tool_calls"),
        ),
        (TWO_CALLS, {"max_tokens": 4}, ("", "Let ", [], "length")),
        (TWO_CALLS, {"max_tokens": 33}, ("One moment.", "Let me look.", [("get_weather", "")], "length")),
        ('<tool_call>{"name": "rm"}</tool_call>', {}, ('<tool_call>{"name": "rm"}</tool_call>', "", [], "stop")),
        (
            '<tool_call>{"name": "add"}</tool_call>',
            {"tool_choice": "none"},
            ('<tool_call>{"name": "add"}</tool_call>', "", [], "stop"),
        ),
        (
            '<tool_call>{"name": "add"}</tool_call>',
            {"tool_choice": "required"},
            ("", "", [("add", "{}")], "tool_calls"),
        ),
        ("a" + EOS + "b", {}, ("ab", "", [], "stop")),
        ("a" + EOS + "b", {"skip_special_tokens": False}, (f"a{EOS}b", "", [], "stop")),
    ],
)
def test_a_stream_and_a_whole_answer_have_the_same(
    http: httpx.Client, engine: ScriptedEngine, text: str, fields: dict[str, Any], expected: Any
) -> None:
    whole = plain(ask(http, engine, text, tools=TOOLS, **fields))
    assert whole == plain(streamed(http, engine, text, tools=TOOLS, **fields))
    if fields.get("max_tokens") != 33:
        assert whole == expected
    else:
        content, reasoning, ((name, arguments),), reason = whole
        assert (content, reasoning, name, reason) == ("One moment.", "Let me look.", "get_weather", "length")
        assert PARIS.startswith(arguments)


def test_without_content_it_is_null_beside_calls(http: httpx.Client, engine: ScriptedEngine) -> None:
    assert ask(http, engine, '<tool_call>{"name": "add"}</tool_call>', tools=TOOLS)["message"]["content"] is None
    message = ask(http, engine, "", tools=TOOLS)["message"]
    assert (message["content"], message["tool_calls"], message["reasoning"]) == ("", None, None)


def test_the_prompt_may_have_opened_or_closed_the_reasoning(http: httpx.Client, engine: ScriptedEngine) -> None:
    opened = ask(http, engine, "hm</think>Hi", chat_template_kwargs={"opens": True})
    assert plain(opened) == ("Hi", "hm", [], "stop")
    closed = ask(http, engine, "a </think> b", chat_template_kwargs={"enable_thinking": False})
    assert plain(closed) == ("a </think> b", "", [], "stop")
    messages = [USER, {"role": "assistant", "content": "<think>so "}]
    continued = ask(http, engine, "far</think>Hi", messages=messages, continue_final_message=True)
    assert plain(continued) == ("Hi", "far", [], "stop")


def test_a_named_function_is_the_only_one_that_the_model_sees(http: httpx.Client, engine: ScriptedEngine) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    answer = ask(http, engine, '<tool_call>{"name": "add"}</tool_call>', tools=TOOLS, tool_choice=choice)
    assert plain(answer)[2] == [("add", "{}")] and "get_weather" not in engine.prompts[-1]
    ask(http, engine, "no", tools=TOOLS, tool_choice="none")
    assert "[tools]" not in engine.prompts[-1]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_required_call_that_does_not_come_is_an_error(
    http: httpx.Client, engine: ScriptedEngine, choice: Any
) -> None:
    engine.texts.append("I will not.")
    answer = http.post("/v1/chat/completions", json={"messages": [USER], "tools": TOOLS, "tool_choice": choice})
    assert answer.status_code == 500 and error_of(answer)["code"] == "tool_call_missing"
    assert streamed(http, engine, "I will not.", tools=TOOLS, tool_choice=choice)["code"] == "tool_call_missing"
    assert plain(ask(http, engine, "I will not.", tools=TOOLS, tool_choice=choice, max_tokens=2))[3] == "length"


def test_the_effort_reaches_the_template(http: httpx.Client, engine: ScriptedEngine) -> None:
    ask(http, engine, "Hi", reasoning_effort="low")
    assert "[low][assistant]" in engine.prompts[-1]


def test_tokens_of_a_stream_are_all_there(http: httpx.Client, engine: ScriptedEngine) -> None:
    """Also of tokens whose text is held back."""
    engine.texts.append(TWO_CALLS)
    body = {"messages": [USER], "tools": TOOLS, "stream": True, "return_token_ids": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    ids = [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", ())]
    assert ids == list(range(-(-len(TWO_CALLS) // 3)))


# What is refused


def without_name(**function: Any) -> list[Any]:
    return [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"tools": [{"type": "web"}]}, "tools[0].type", "must be 'function'"),
        ({"tools": without_name(name="a b")}, "tools[0].function.name", "1 to 64 letters"),
        ({"tools": without_name(name="a" * 65)}, "tools[0].function.name", "1 to 64 letters"),
        ({"tools": [ADD, WEATHER, ADD]}, "tools[2].function.name", "as that of tools[0]"),
        (
            {"tools": without_name(name="f", parameters={"type": "string"})},
            "tools[0].function.parameters",
            "invalid schema for function 'f'",
        ),
        ({"tools": without_name(name="f", parameters=[1])}, "tools[0].function.parameters", "must be a JSON schema"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", ""),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}},
            "tool_choice",
            "not in tools",
        ),
        ({"tool_choice": "required"}, "tool_choice", "only allowed when tools are given"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages.0",
            "only messages of the assistant",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages.1", "function.name"),
    ],
)
def test_other_tools_are_refused(http: httpx.Client, fields: dict[str, Any], param: str, message: str) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [USER], **fields})
    error = error_of(answer)
    assert answer.status_code == 400 and message in error["message"]
    assert error["param"].startswith(param)


@pytest.mark.parametrize(
    "template, fields, message",
    [
        (ANY_ROLE, {"tools": TOOLS}, "in which format this model writes calls"),
        (ANY_ROLE + "{# <tool_call> #}", {"tools": TOOLS}, "does not know tools"),
        (ANY_ROLE, {"reasoning_effort": "low"}, "does not know reasoning_effort"),
        (
            ANY_ROLE,
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
            "does not show calls of tools",
        ),
    ],
)
def test_a_template_has_to_know_what_it_is_given(template: str, fields: dict[str, Any], message: str) -> None:
    engine = ScriptedEngine(toy_tokenizer(chat_template=template))
    with served(engine) as root_url, httpx.Client(base_url=root_url, timeout=10) as http:
        answer = http.post("/v1/chat/completions", json={"messages": [USER], **fields})
        assert answer.status_code == 400 and message in error_of(answer)["message"]
    engine.tokenizer.close()


def test_formats_can_be_named_and_turned_off() -> None:
    engine = ScriptedEngine(toy_tokenizer(chat_template=ANY_ROLE + "{{ tools }}"))
    config = ServerConfig(served_model_name="toy", tool_call_parser="mistral", reasoning_parser="deepseek_r1")
    with served(engine, config) as root_url, httpx.Client(base_url=root_url, timeout=10) as http:
        choice = ask(http, engine, "hm</think>[TOOL_CALLS]add{}", tools=TOOLS)
        assert plain(choice) == ("", "hm", [("add", "{}")], "tool_calls")
        assert len(choice["message"]["tool_calls"][0]["id"]) == 9
    config = ServerConfig(served_model_name="toy", tool_call_parser="none", reasoning_parser="none")
    with served(engine, config) as root_url, httpx.Client(base_url=root_url, timeout=10) as http:
        assert plain(ask(http, engine, "<think>hm</think>")) == ("<think>hm</think>", "", [], "stop")
    engine.tokenizer.close()


def test_a_template_gets_arguments_as_it_takes_them() -> None:
    engine = ScriptedEngine(toy_tokenizer(chat_template=CALLING_TEXT))
    with served(engine) as root_url, httpx.Client(base_url=root_url, timeout=10) as http:
        calls = [{"id": "x", "type": "function", "function": {"name": "add", "arguments": SUM}}]
        messages = [
            USER,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "x", "content": "3"},
        ]
        ask(http, engine, "It is 3.", messages=messages)
        assert engine.prompts[-1].endswith(f"add<｜tool▁sep｜>{SUM}[tool]3")
    engine.tokenizer.close()


def test_the_example_of_the_page(
    http: httpx.Client, engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (block for block in blocks() if block.first_line == "# A turn with a call, and a turn with its result.")
    engine.texts += [f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>', "It rains."]
    root_url = str(http.base_url).rstrip("/")
    exec(compile(block.text.replace("http://127.0.0.1:8000", root_url), block.page, "exec"), {})
    assert capsys.readouterr().out == "It rains.\n"
    assert "[tool]It rains in Paris é🌧.[assistant]" in engine.prompts[-1]
