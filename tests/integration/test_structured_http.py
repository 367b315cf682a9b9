"""Structured output over HTTP: every spelling, refusals as 400, and a hostile schema that stalls nobody."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.robustness.server_cases import CASES, TEMPLATE, problems, unexpected

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.grammar_checks import GrammarChecks
from nanoflow.server.app import create_app
from tests.templates import CALLING

PAGE = Path(__file__).parents[2] / "docs" / "structured-output.md"
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
IS_RECORD = re.compile(r'\{\s*"a"\s*:\s*(true|false)\s*\}')


class Served:
    """An engine behind the application, in an event loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = self.loop.run_until_complete(AsyncEngine.start(EngineConfig(max_num_seqs=8, max_model_len=512)))
        transport = httpx.ASGITransport(create_app(self.engine, ServerConfig(trust_request_chat_template=True)))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    async def post(self, body: dict[str, Any]) -> httpx.Response:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        return await self.http.post(path, json={"max_tokens": 120, "seed": 0, **body})

    def ask(self, **body: Any) -> httpx.Response:
        return self.loop.run_until_complete(self.post(body))

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "A record, please."}]}
TEXT: dict[str, Any] = {"prompt": "A record: "}


@pytest.mark.parametrize("prompt", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize(
    "shape",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "record", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": json.dumps(SCHEMA)},
        {"guided_regex": r'\{"a": (true|false)\}'},
        {"guided_choice": ['{"a": true}', '{"a": false}']},
        {"guided_grammar": 'root ::= "{" "\\"a\\": " ("true" | "false") "}"'},
    ],
    ids=lambda shape: next(iter(shape)),
)
def test_every_spelling(served: Served, prompt: dict[str, Any], shape: dict[str, Any]) -> None:
    (choice,) = served.ask(**prompt, **shape).json()["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert IS_RECORD.fullmatch(text) and choice["finish_reason"] == "stop"


def test_a_stream(served: Served) -> None:
    answer = served.ask(**CHAT, guided_json=SCHEMA, stream=True, n=2)
    texts = ["", ""]
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    assert all(IS_RECORD.fullmatch(text) for text in texts)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("shape", "message", "param"),
    [
        ({"guided_regex": "(a"}, "the regex cannot be used: at 1(8): invalid regex", "guided_regex"),
        ({"guided_json": {"$ref": "#"}}, "the schema cannot be used: no text satisfies it", "guided_json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"if": {}}}}},
            'the schema cannot be used: Unimplemented keys: ["if"]',
            "response_format",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "both say what shape the answer has", "guided_choice"),
        ({"guided_regex": "a", "ignore_eos": True}, "not with ignore_eos", "ignore_eos"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}, "strict": True}}]},
            "invalid schema for function 'f': Unimplemented keys: [\"not\"]",
            "tools[0].function.parameters",
        ),
    ],
)
def test_refusals(served: Served, shape: dict[str, Any], message: str, param: str, is_stream: bool) -> None:
    answer = served.ask(**CHAT, **shape, chat_template=CALLING, stream=is_stream)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and error["param"] == param


def test_every_case_of_the_suite_passes_that_has_to(served: Served) -> None:
    """Those that the embedded model can show: it copies no call that it has seen."""
    cases = [case for case in CASES if not case.needs_copying]
    found = served.loop.run_until_complete(problems(served.http, cases, chat_template=TEMPLATE))
    assert len(found) == 37 and unexpected(found, copies=False) == {}
    # What is said to be lacking is lacking.
    assert all(found[case.name] for case in cases if case.lacks is not None)


def test_there_are_as_many_cases_as_the_page_says() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == 41
    lacking = {case.name: case.lacks for case in CASES if case.lacks is not None}
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert lacking.items() <= dict(rows).items()


def test_a_hostile_schema_stalls_nobody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "_checks", GrammarChecks(timeout_s=1.5))

    async def both() -> tuple[httpx.Response, httpx.Response]:
        hostile = asyncio.create_task(
            served.post({**TEXT, "guided_json": {"type": "integer", "multipleOf": 1_000_003}})
        )
        await asyncio.sleep(0.1)
        free = await served.post({**TEXT, "max_tokens": 8})
        assert not hostile.done()
        return await hostile, free

    hostile, free = served.loop.run_until_complete(both())
    served.engine._checks.close()
    assert hostile.status_code == 400 and "takes longer than 1.5 s" in hostile.text
    assert free.json()["usage"]["completion_tokens"] == 8


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "other"}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_required_call_is_held_to_its_schema(served: Served, choice: Any, is_stream: bool) -> None:
    tools = [WEATHER, OTHER] if isinstance(choice, dict) else [WEATHER]
    fields = {**CHAT, "chat_template": CALLING, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = served.ask(**fields, **quiet, max_tokens=300, stream=is_stream)
    assert answer.status_code == 200, answer.text
    if is_stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        deltas = [part["delta"] for chunk in chunks for part in chunk["choices"]]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
        name, arguments = calls[0]["name"], "".join(call["arguments"] for call in calls)
    else:
        (made,) = answer.json()["choices"]
        assert made["finish_reason"] == "tool_calls"
        (call,) = made["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    said = json.loads(arguments)
    assert name == "weather" and said["city"] in ("Paris", "Rome") and said["days"] in (1, 2, 3) and len(said) == 2


def test_a_required_call_has_no_other_shape(served: Served) -> None:
    fields = {**CHAT, "chat_template": CALLING, "tools": [WEATHER], "tool_choice": "required"}
    answer = served.ask(**fields, response_format={"type": "json_object"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tool_choice"


@pytest.mark.parametrize("name", ["thinking_token_budget", "thinking_budget"])
def test_reasoning_is_bounded(served: Served, name: str) -> None:
    fields = {**CHAT, "chat_template": CALLING, "chat_template_kwargs": {"opens": True}, "max_tokens": 30, name: 5}
    (choice,) = served.ask(**fields, return_token_ids=True).json()["choices"]
    message = choice["message"]
    tokenizer = served.engine.tokenizer
    assert message["reasoning"].strip() == tokenizer.decode(choice["token_ids"][:5]).strip() and message["content"]
    deltas = [
        part["delta"]
        for line in served.ask(**fields, stream=True).text.splitlines()
        if line.startswith("data: {")
        for part in json.loads(line[6:])["choices"]
    ]
    assert "".join(each.get("reasoning", "") for each in deltas) == message["reasoning"]
    assert "".join(each.get("content", "") for each in deltas) == message["content"]


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"thinking_budget": 5}, "needs a model whose reasoning", "thinking_budget"),
        ({"thinking_token_budget": 5, "thinking_budget": 5}, "give one", "thinking_budget"),
        ({"thinking_token_budget": -2}, "thinking_token_budget must be", "thinking_token_budget"),
    ],
)
def test_bounds_on_reasoning_that_are_refused(served: Served, fields: dict[str, Any], message: str, param: str) -> None:
    answer = served.ask(**CHAT, **fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and error["param"] == param, error


def test_a_strict_call_is_held_where_the_model_decides(served: Served) -> None:
    """The embedded model knows of no tools: beside an answer in JSON, a bias makes it begin a call."""
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    fields = {**CHAT, "chat_template": CALLING, "temperature": 0.0, "max_tokens": 50}
    shape = {"response_format": {"type": "json_schema", "json_schema": {"name": "record", "schema": SCHEMA}}}
    quiet = {"chat_template_kwargs": {"enable_thinking": False}, "parallel_tool_calls": False}

    def biased(text: str) -> dict[str, Any]:
        ids = served.engine.tokenizer.encode(text, add_special_tokens=False)
        return {"logit_bias": {str(token_id): 100 for token_id in ids}}

    (choice,) = served.ask(**fields, **shape, **quiet, **biased("<"), tools=[tool]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls", choice
    (call,) = choice["message"]["tool_calls"]
    said = json.loads(call["function"]["arguments"])
    assert said["city"] in ("Paris", "Rome") and said["days"] in (1, 2, 3) and len(said) == 2
    (answer,) = served.ask(**fields, **shape, **quiet, **biased("{"), tools=[tool]).json()["choices"]
    assert IS_RECORD.fullmatch(answer["message"]["content"])
    # Text without calls is what it is without strict functions, if the prompt is the same.
    fields |= {"chat_template": CALLING.replace("{{ tool | tojson }}", ""), "max_tokens": 12}
    texts = [served.ask(**fields, **quiet, tools=[one]).json() for one in (tool, WEATHER)]
    first, second = (text["choices"][0]["message"]["content"] for text in texts)
    assert first == second and first
    refused = served.ask(**fields, guided_regex="a", tools=[tool])
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "guided_regex"
