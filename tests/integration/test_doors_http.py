"""/v1/responses and /v1/messages over HTTP: what clients get, whole and as a stream, over several turns."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import openai
import pytest

from nanoflow.config import ServerConfig
from nanoflow.engine.chat_template import ChatTemplate
from nanoflow.outputs import RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.server.backend import EnginePrompt
from tests.fake_server import served
from tests.integration.test_tools_http import PARIS, SUM, TWO_CALLS
from tests.scripted_engine import ScriptedEngine
from tests.templates import CALLING
from tests.toy_tokenizers import toy_tokenizer

KEY, OTHER_KEY = "sk-a", "sk-b"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTIONS: Any = [
    {"type": "function", "name": "get_weather", "parameters": CITY, "strict": False},
    {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False},
]
TOOLS = [{"name": one["name"], "input_schema": one["parameters"]} for one in FUNCTIONS]
USER = {"role": "user", "content": "weather?"}


class BreakingEngine(ScriptedEngine):
    """Fails once it has said BREAK."""

    async def generate(
        self, prompt: EnginePrompt, params: SamplingParams, request_id: str | None = None, *, streams: bool = True
    ) -> AsyncGenerator[RequestOutput, None]:
        async for output in super().generate(prompt, params, request_id, streams=streams):
            yield output
            if "BREAK" in output.outputs[0].text:
                raise RuntimeError("broken: /secret/path")


@pytest.fixture(scope="module")
def engine() -> BreakingEngine:
    return BreakingEngine(toy_tokenizer(chat_template=CALLING))


@pytest.fixture(scope="module")
def root_url(engine: BreakingEngine) -> Iterator[str]:
    with served(engine, ServerConfig(served_model_name="toy", api_key=(KEY, OTHER_KEY))) as root_url:
        yield root_url
    engine.tokenizer.close()


@pytest.fixture(scope="module")
def http(root_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=root_url, timeout=10, headers={"x-api-key": KEY, "anthropic-version": "x"}) as client:
        yield client


def client_of(root_url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{root_url}/v1", api_key=key, max_retries=0)


def events_of(http: httpx.Client, path: str, body: Any) -> list[Any]:
    """The events of a stream; each has its type as its name."""
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        chunks = "".join(answer.iter_text()).split("\n\n")
    assert chunks.pop() == ""
    events = []
    for name, data in (chunk.split("\n") for chunk in chunks):
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


# /v1/responses


def test_a_conversation_of_responses(root_url: str, engine: BreakingEngine) -> None:
    """Two calls in a stream, their results with `previous_response_id`, and what is kept of it."""
    client = client_of(root_url)
    engine.texts.append(TWO_CALLS)
    with client.responses.stream(model="toy", input="weather?", instructions="be brief", tools=FUNCTIONS) as stream:
        numbers = [event.sequence_number for event in stream]
        first = stream.get_final_response()
    assert numbers == list(range(len(numbers)))
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
    assert first.status == "completed" and first.output_text == "One moment." and first.instructions == "be brief"
    calls = [item for item in first.output if item.type == "function_call"]
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", PARIS), ("add", SUM)]
    usage = first.usage
    assert usage is not None and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    assert client.responses.retrieve(first.id) == client.responses.retrieve(first.id)
    assert client.responses.retrieve(first.id).output[0].to_dict() == first.output[0].to_dict()

    engine.texts.append("It rains.")
    results: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]
    second = client.responses.create(model="toy", input=results, previous_response_id=first.id)
    assert second.output_text == "It rains." and second.previous_response_id == first.id
    # The instructions of the first response are not carried over.
    assert "be brief" in engine.prompts[-2] and "be brief" not in engine.prompts[-1]
    said = '[user]weather?[assistant]<think>Let me look.</think>One moment.<tool_call>{"name": "get_weather"'
    assert said in engine.prompts[-1] and engine.prompts[-1].endswith("[tool]rain[tool]rain[assistant]")
    listed = client.responses.input_items.list(second.id, limit=1, order="asc")
    assert listed.has_more and [item.type for item in listed] == ["function_call_output"] * 2


def test_a_response_is_seen_by_its_key_alone(root_url: str, engine: BreakingEngine) -> None:
    client, other = client_of(root_url), client_of(root_url, OTHER_KEY)
    engine.texts += ["a", "b"]
    response = client.responses.create(input="hi", model="toy")
    unkept = client.responses.create(input="hi", model="toy", store=False)
    for one, name in ((other, response.id), (client, unkept.id)):
        with pytest.raises(openai.NotFoundError, match="is not kept here"):
            one.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError) as caught:
            one.responses.create(input="more", model="toy", previous_response_id=name)
        assert caught.value.code == "previous_response_not_found" and caught.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        other.responses.delete(response.id)
    with pytest.raises(openai.BadRequestError, match="only responses in the background"):
        client.responses.cancel(response.id)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match="it was deleted"):
        client.responses.input_items.list(response.id)


def test_a_response_that_is_cut_off_is_incomplete(root_url: str, engine: BreakingEngine) -> None:
    client = client_of(root_url)
    engine.texts += [TWO_CALLS, TWO_CALLS]
    wanted: Any = {"model": "toy", "input": "hi", "tools": FUNCTIONS, "max_output_tokens": 30}
    whole = client.responses.create(**wanted)
    *_, last = client.responses.create(**wanted, stream=True)
    assert last.type == "response.incomplete" and whole.incomplete_details is not None
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in whole.output] == [item.status for item in last.response.output]
    assert whole.output[-1].status == "incomplete" and whole.output[0].status == "completed"


def test_failures_of_responses(http: httpx.Client, engine: BreakingEngine) -> None:
    """Before the first event a failure has a status; after it, it is the last event."""
    engine.texts.append("a BREAK b")
    *events, last = events_of(http, "/v1/responses", {"input": "hi"})
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {
        "code": "server_error",
        "message": "internal error; the server's log says more",
    }
    assert last["sequence_number"] == len(events)
    body = {"input": "hi", "stream": True, "tools": FUNCTIONS, "tool_choice": {"type": "function", "name": "x"}}
    refused = http.post("/v1/responses", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"
    # The message of a chat's field names the field that was sent.
    refused = http.post("/v1/responses", json={"input": "a" * 2_000_000})
    assert refused.status_code == 413 and refused.json()["error"]["param"] == "input"
    assert refused.json()["error"]["message"].startswith("input has 20000")


# /v1/messages


def test_a_conversation_of_messages(http: httpx.Client, engine: BreakingEngine) -> None:
    """The events of a stream add up to the whole message; its calls are answered."""
    body = {"max_tokens": 200, "messages": [USER], "system": "be brief", "tools": TOOLS}
    engine.texts += [TWO_CALLS, TWO_CALLS]
    whole = http.post("/v1/messages", json=body).json()
    start, ping, *middle, delta, stop = events_of(http, "/v1/messages", body)
    assert (ping, stop) == ({"type": "ping"}, {"type": "message_stop"})
    assert set(start["message"]) == set(whole) and start["message"]["content"] == []
    assert start["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"] > 0
    assert {**start["message"]["usage"], **delta["usage"]} == whole["usage"]
    assert 0 < whole["usage"]["output_tokens_details"]["thinking_tokens"] < whole["usage"]["output_tokens"]
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    started = [event["content_block"]["type"] for event in middle if event["type"] == "content_block_start"]
    assert started == [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole["stop_reason"] == "tool_use" and whole["content"][2]["input"] == json.loads(PARIS)

    results = [{"type": "tool_result", "tool_use_id": block["id"], "content": "rain"} for block in whole["content"][2:]]
    turns = [USER, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": results}]
    engine.texts.append("It rains.")
    answer = http.post("/v1/messages", json={**body, "messages": turns, "thinking": {"type": "disabled"}}).json()
    assert answer["content"] == [{"type": "text", "text": "It rains."}] and answer["stop_reason"] == "end_turn"
    assert engine.prompts[-1].endswith("[tool]rain[tool]rain[assistant]<think></think>")
    count = http.post("/v1/messages/count_tokens", json={"messages": [USER], "system": "be brief", "tools": TOOLS})
    assert count.json() == {"input_tokens": whole["usage"]["input_tokens"]}


def test_a_message_of_the_assistant_is_continued(http: httpx.Client, engine: BreakingEngine) -> None:
    engine.texts.append(" world")
    turns = [USER, {"role": "assistant", "content": "Hello"}]
    answer = http.post("/v1/messages", json={"max_tokens": 9, "messages": turns}).json()
    assert answer["content"] == [{"type": "text", "text": " world"}] and engine.prompts[-1].endswith("[assistant]Hello")


def test_late_system_messages_are_shown_by_any_template(
    http: httpx.Client, engine: BreakingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}]
    for is_shown, prompt in ((True, "[user]hi[system]be kind[assistant]"), (False, "[user]hi\nbe kind[assistant]")):
        monkeypatch.setattr(ChatTemplate, "shows_late_system", is_shown)
        engine.texts += ["a", "b"]
        assert http.post("/v1/messages", json={"max_tokens": 9, "messages": turns}).status_code == 200
        assert http.post("/v1/responses", json={"input": turns}).status_code == 200
        assert engine.prompts[-2:] == [prompt, prompt]


def test_failures_of_messages_have_the_shape_of_their_api(http: httpx.Client, engine: BreakingEngine) -> None:
    body = {"max_tokens": 9, "messages": [USER]}
    engine.texts.append("a BREAK b")
    *_, last = events_of(http, "/v1/messages", body)
    assert last["type"] == "error" and last["error"]["type"] == "api_error" and "secret" not in str(last)
    for fields, headers, status, kind, param in (
        ({"max_tokens": 0}, {}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "x"}, {}, 404, "not_found_error", "model"),
        ({"stop_sequences": ["a"] * 99}, {}, 400, "invalid_request_error", "stop_sequences"),
        ({}, {"x-api-key": "no"}, 401, "authentication_error", None),
        ({}, {"content-type": "text/plain"}, 415, "invalid_request_error", None),
    ):
        answer = http.post("/v1/messages", json={**body, **fields}, headers=headers)
        error = answer.json()
        assert (answer.status_code, error["type"], error["error"]["type"]) == (status, "error", kind)
        assert error["error"].get("param") == param and answer.headers["x-request-id"]
    assert http.get("/v1/messages/x").json()["error"]["type"] == "not_found_error"
    # By this code Anthropic's runner of tools knows that it has to send the whole conversation each time.
    refused = http.post("/v1/messages", json={**body, "thread": {"type": "create"}}).json()
    assert refused["error"]["details"] == {"error_code": "thread_unsupported_request"}


# /v1/embeddings


def test_dimensions_are_looked_at_first(http: httpx.Client, engine: BreakingEngine) -> None:
    before, size = len(engine.prompts), engine.facts.hidden_size
    refused = http.post("/v1/embeddings", json={"input": "a", "dimensions": size + 1}).json()["error"]
    assert (refused["param"], refused["message"]) == (
        "dimensions",
        f"dimensions must be in [1, {size}], got {size + 1}",
    )
    assert len(engine.prompts) == before


def test_either_header_has_the_key(root_url: str) -> None:
    for headers, status in (
        ({"x-api-key": KEY}, 200),
        ({"authorization": f"Bearer {KEY}", "x-api-key": "placeholder"}, 200),
        ({"authorization": "Bearer no", "x-api-key": KEY}, 401),
        ({"x-api-key": f"Bearer {KEY}"}, 401),
        ({}, 401),
    ):
        assert httpx.get(f"{root_url}/v1/models", headers=headers).status_code == status
    two = [("x-api-key", KEY), ("x-api-key", KEY)]
    assert httpx.get(f"{root_url}/v1/models", headers=two).status_code == 401
