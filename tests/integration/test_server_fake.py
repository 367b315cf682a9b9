"""The server with an engine that needs no model: the shapes of answers and of streams."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from nanoflow.config import ServerConfig
from nanoflow.models.generation import SamplingDefaults
from tests.fake_async_engine import MAX_MODEL_LEN, SENTENCE, FakeAsyncEngine
from tests.fake_server import CHAT, complete, error_of, served


@pytest.fixture(scope="module")
def engine() -> FakeAsyncEngine:
    return FakeAsyncEngine()


@pytest.fixture(scope="module")
def http(engine: FakeAsyncEngine) -> Iterator[httpx.Client]:
    with served(engine) as root_url, httpx.Client(base_url=root_url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def client(http: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{http.base_url}/v1".replace("//v1", "/v1"), api_key="none", max_retries=0)


NONE_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def events(http: httpx.Client, path: str, **fields: Any) -> list[Any]:
    """Chunks of a stream; checks how it is framed."""
    with http.stream("POST", path, json={"stream": True, **fields}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# Completions


def test_completion(http: httpx.Client) -> None:
    answer = complete(http, model="toy", max_tokens=9)
    not_asked = dict.fromkeys(("logprobs", "prompt_logprobs", "stop_reason", "token_ids", "prompt_token_ids"))
    assert answer["choices"] == [{"index": 0, "text": "the quick", "finish_reason": "length", **not_asked}]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13, **NONE_CACHED}
    assert (answer["object"], answer["model"]) == ("text_completion", "toy")


def test_completion_with_the_openai_client(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="toy", prompt="a", max_tokens=3, n=2, stop=["zz"], seed=1)
    assert [choice.text for choice in answer.choices] == ["the", "he "]


def test_a_request_that_does_not_say_samples_as_the_model_recommends() -> None:
    engine = FakeAsyncEngine()
    engine.facts = dataclasses.replace(engine.facts, sampling=SamplingDefaults(temperature=0.25, max_tokens=3))
    with served(engine) as root_url, httpx.Client(base_url=root_url, timeout=10) as http:
        assert complete(http)["choices"][0]["text"] == "the"
        complete(http, temperature=1.0, max_tokens=1)
        assert http.post("/v1/chat/completions", json={"messages": CHAT}).status_code == 200
    assert [(params.temperature, params.max_tokens) for params in engine.seen_params] == [
        (0.25, 3),
        (1.0, 1),
        (0.25, 3),
    ]


def test_several_prompts_and_choices_are_numbered(http: httpx.Client) -> None:
    answer = complete(http, prompt=["a", "bb"], n=2, max_tokens=2, echo=True)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "ath"),
        (1, "ahe"),
        (2, "bbth"),
        (3, "bbhe"),
    ]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13, **NONE_CACHED}


def test_prompts_of_token_ids(http: httpx.Client) -> None:
    answer = complete(http, prompt=[[97, 98], [99]], max_tokens=1, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["abt", "ct"]
    assert complete(http, prompt=[97, 98], max_tokens=1)["usage"]["prompt_tokens"] == 2


def test_logprobs_of_an_echoed_prompt(http: httpx.Client) -> None:
    """What evaluation harnesses ask: score the prompt, drop the one new token."""
    answer = complete(http, prompt=[[97, 98, 99], [100]], max_tokens=1, logprobs=1, echo=True)
    first, second = (choice["logprobs"] for choice in answer["choices"])
    assert first["tokens"] == ["a", "b", "c", "t"]
    assert first["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert first["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}, {"t": -0.5}]
    assert first["text_offset"] == [0, 1, 2, 3]
    assert second["tokens"] == ["d", "t"]


def test_echo_alone_shows_no_new_token(http: httpx.Client) -> None:
    answer = complete(http, max_tokens=0, echo=True, logprobs=2)
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["<bos>", "a", "b", "c"]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4, **NONE_CACHED}


def test_prompt_logprobs(http: httpx.Client) -> None:
    (choice,) = complete(http, prompt=[97, 98], prompt_logprobs=2, max_tokens=1)["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["98"] == {"logprob": -0.5, "rank": 1, "decoded_token": "b"}


def test_stop_string(http: httpx.Client) -> None:
    (choice,) = complete(http, stop=[" brown"], max_tokens=100)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("the quick", "stop", " brown")


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": 2}, {"echo": True, "logprobs": 2}, {"echo": True, "max_tokens": 0}]
)
def test_a_completion_stream_adds_up_to_the_answer(http: httpx.Client, fields: dict[str, Any]) -> None:
    fields = {"prompt": ["abc", "d"], "n": 2, "max_tokens": 5, **fields}
    whole = complete(http, **fields)["choices"]
    chunks = events(http, "/v1/completions", **fields)
    for choice in whole:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        if "logprobs" in fields:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [entry for part in parts for entry in part["logprobs"][name]] == choice["logprobs"][name]
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_comes_last_in_a_stream(http: httpx.Client, path: str) -> None:
    prompt = {"prompt": "abc"} if path == "/v1/completions" else {"messages": CHAT}
    *chunks, last = events(http, path, **prompt, max_tokens=3, n=2, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)


# Chat


def test_chat(http: httpx.Client, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=2,
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "the", "length")
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [entry.token for entry in choice.logprobs.content] == ["t", "h", "e"]
    assert choice.logprobs.content[0].bytes == [ord("t")]
    assert [entry.token for entry in choice.logprobs.content[0].top_logprobs] == ["t", "u"]


def test_chat_runs_to_the_context_end(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": CHAT}).json()
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN


def test_a_chat_stream_adds_up(client: openai.OpenAI) -> None:
    texts, roles = {0: "", 1: ""}, []
    with client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "hi"}], max_tokens=9, n=2, stream=True
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                roles += [choice.delta.role] if choice.delta.role else []
    assert texts == {0: SENTENCE[:9], 1: SENTENCE[1:10]}
    assert roles == ["assistant", "assistant"]


# Tokens, models, status


def test_tokens_there_and_back(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "hi"}).json()
    ids = [257, 104, 105]
    assert tokens == {"count": 3, "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None}
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "<bos>hi"}
    assert http.post("/detokenize", json={"tokens": tokens["tokens"], "skip_special_tokens": True}).json() == {
        "prompt": "hi"
    }
    bare = http.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False}).json()
    assert bare["tokens"] == [104, 105]
    named = http.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}).json()
    assert named["token_strs"] == ["<bos>", "h", "i"]
    chat = http.post("/tokenize", json={"messages": CHAT, "add_generation_prompt": False}).json()
    assert http.post("/detokenize", json={"tokens": chat["tokens"][1:]}).json() == {"prompt": "user: hi"}


def test_models(http: httpx.Client, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert http.get("/v1/models/toy").json()["max_model_len"] == MAX_MODEL_LEN
    missing = http.get("/v1/models/some/other")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def test_health_follows_the_engine() -> None:
    engine = FakeAsyncEngine()
    with served(engine) as root_url, httpx.Client(base_url=root_url) as http:
        assert http.get("/health").json()["status"] == "ok"
        engine.heartbeat_age_s = 6.0
        silent = http.get("/health")
        assert (silent.status_code, error_of(silent)["code"]) == (503, "engine_silent")
        engine.is_alive = False
        dead = http.get("/health")
        assert (dead.status_code, error_of(dead)["code"]) == (503, "engine_dead")


def test_version_root_and_docs(http: httpx.Client) -> None:
    assert http.get("/version").json()["version"]
    assert http.get("/").json()["model"] == "toy"
    assert "/v1/completions" in http.get("/openapi.json").json()["paths"]


def test_metrics_count_requests() -> None:
    config = ServerConfig(served_model_name="toy", metrics_prefix="vllm")
    with served(FakeAsyncEngine(), config) as root_url, httpx.Client(base_url=root_url) as http:
        for _ in range(3):
            complete(http, max_tokens=5)
        text = http.get("/metrics").text
    label = '{engine="0",model_name="toy"}'
    assert f"vllm:prompt_tokens_total{label} 12.0" in text
    assert f"vllm:generation_tokens_total{label} 15.0" in text
    assert f"vllm:inter_token_latency_seconds_count{label} 12.0" in text
    assert f"vllm:num_requests_running{label} 0.0" in text


# Cached pages


def test_a_salt_comes_to_the_engine(http: httpx.Client, engine: FakeAsyncEngine) -> None:
    before = len(engine.seen_salts)
    for fields in ({"prompt": "a"}, {"prompt": ["a", "b"]}, {"prompt": [97, 98]}):
        complete(http, cache_salt="mine", max_tokens=1, **fields)
    http.post("/v1/chat/completions", json={"messages": CHAT, "cache_salt": "talk", "max_tokens": 1}).raise_for_status()
    assert engine.seen_salts[before:] == ["mine"] * 4 + ["talk"]
    for wrong in ("", 5, ["a"]):
        answer = http.post("/v1/completions", json={"prompt": "a", "cache_salt": wrong})
        assert answer.status_code == 400 and error_of(answer)["param"] == "cache_salt"


def test_keys_may_have_caches_of_their_own() -> None:
    engine = FakeAsyncEngine()
    config = ServerConfig(served_model_name="toy", api_key=("one", "two"), prefix_cache_per_key=True)
    with served(engine, config) as root_url, httpx.Client(base_url=root_url, timeout=10) as http:
        for header in ("Bearer one", "bearer  one", "Bearer two"):
            for salt in (None, "mine"):
                fields = {} if salt is None else {"cache_salt": salt}
                answer = http.post(
                    "/v1/completions",
                    json={"prompt": "a", "max_tokens": 1, **fields},
                    headers={"authorization": header},
                )
                answer.raise_for_status()
    one, one_mine, again, again_mine, two, two_mine = engine.seen_salts
    assert (one, one_mine) == (again, again_mine)
    assert len({one, one_mine, two, two_mine}) == 4 and None not in engine.seen_salts
