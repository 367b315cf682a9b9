"""`POST /v1/prefetch`: what is asked of the engine, what is answered, and sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanoflow.config import ServerConfig
from nanoflow.engine.prompts import Prompt
from tests.fake_async_engine import BOS, MAX_MODEL_LEN, FakeAsyncEngine
from tests.fake_server import CHAT, complete, error_of, served


@pytest.fixture(scope="module")
def engine() -> FakeAsyncEngine:
    return FakeAsyncEngine()


@pytest.fixture(scope="module")
def http(engine: FakeAsyncEngine) -> Iterator[httpx.Client]:
    with served(engine) as root_url, httpx.Client(base_url=root_url, timeout=10) as client:
        yield client


def prefetch(http: httpx.Client, headers: Mapping[str, str] | None = None, /, **body: Any) -> httpx.Response:
    return http.post("/v1/prefetch", json=body, headers=headers)


def counts(text: str) -> dict[str, float]:
    """Metrics about advice and about tiers."""
    return {
        sample.name.partition(":")[2] + sample.labels.get("tier", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if any(part in sample.name for part in ("prefetch", "kv_tier", "external", "kv_offload"))
    }


def test_a_prompt_has_the_tokens_of_a_completion(http: httpx.Client, engine: FakeAsyncEngine) -> None:
    answer = prefetch(http, prompt="abcdefg", model="toy", cache_salt="mine")
    assert answer.json() == {
        "object": "prefetch",
        "num_tokens": 8,
        "num_cached_tokens": 4,
        "num_prefetched_tokens": 3,
    }
    assert engine.prefetched[-1] == Prompt(text=None, token_ids=[BOS, *b"abcdefg"], cache_salt="mine")
    assert prefetch(http, prompt="ab", add_special_tokens=False).json()["num_tokens"] == 2
    for same in ([5, 6, 7.0], [[5, 6, 7]], ["ab"]):
        assert prefetch(http, prompt=same).json()["num_tokens"] == 3


def test_messages_have_the_tokens_of_a_chat_completion(http: httpx.Client, engine: FakeAsyncEngine) -> None:
    http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1}).raise_for_status()
    usage = http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1}).json()["usage"]
    assert prefetch(http, messages=CHAT).json()["num_tokens"] == usage["prompt_tokens"]
    opened = prefetch(http, messages=CHAT, add_generation_prompt=False, add_special_tokens=True)
    assert isinstance(engine.prefetched[-1], Prompt)
    assert opened.status_code == 200 and engine.prefetched[-1].token_ids == [BOS, BOS, *b"user: hi"]


def test_nothing_is_generated(http: httpx.Client, engine: FakeAsyncEngine) -> None:
    before = len(engine.seen_params)
    assert prefetch(http, prompt="a").status_code == 200
    assert len(engine.seen_params) == before


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "give prompt, messages, or a session_id"),
        ({"prompt": "a", "messages": CHAT}, "messages", "give one of prompt, messages and session_id, not prompt and"),
        ({"prompt": "a", "session_id": "b"}, "session_id", "give one of"),
        ({"prompt": ["a", "b"]}, "prompt", "one prompt at a time, got 2"),
        ({"prompt": [[5], [6], [7]]}, "prompt", "one prompt at a time, got 3"),
        ({"prompt": 5}, "prompt", ""),
        ({"prompt": [MAX_MODEL_LEN * 2]}, "prompt", "out of vocabulary"),
        ({"prompt": [5] * MAX_MODEL_LEN}, "prompt", "maximum context length"),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "messages", "the chat template refuses"),
        ({"session_id": ""}, "session_id", ""),
        ({"session_id": "x" * 257}, "session_id", ""),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt", ""),
        ({"prompt": "a", "max_tokens": 5}, "max_tokens", "unknown field"),
    ],
)
def test_a_wrong_body_is_refused(http: httpx.Client, body: Any, param: str, message: str) -> None:
    answer = prefetch(http, **body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param and message in error["message"], error


def test_another_model_and_a_dead_engine(http: httpx.Client) -> None:
    assert prefetch(http, prompt="a", model="other").status_code == 404
    dead = FakeAsyncEngine()
    dead.is_alive = False
    with served(dead) as root_url, httpx.Client(base_url=root_url, timeout=10) as client:
        for body in ({"prompt": "a"}, {"session_id": "a"}):
            answer = client.post("/v1/prefetch", json=body)
            assert answer.status_code == 503 and error_of(answer)["code"] == "engine_dead"


def test_a_session_is_named_in_the_body_or_the_header(http: httpx.Client, engine: FakeAsyncEngine) -> None:
    unknown = prefetch(http, session_id="s1")
    assert unknown.status_code == 404 and error_of(unknown)["code"] == "session_not_found"
    complete(http, session_id="s1", max_tokens=1)
    (known,) = {prefetch(http, session_id="s1").text, prefetch(http, {"x-session-id": "s1"}).text}
    assert json.loads(known)["num_tokens"] == 9
    fields = {"messages": CHAT, "max_tokens": 1}
    http.post("/v1/chat/completions", json=fields, headers={"x-session-id": "s2"}).raise_for_status()
    assert prefetch(http, session_id="s2").status_code == 200
    before = len(engine.seen_sessions)
    complete(http, cache_salt="mine", max_tokens=1)
    assert engine.seen_sessions[before:] == [None], "without a name there is no session"
    answer = prefetch(http, {"x-session-id": "x" * 257})
    assert answer.status_code == 400 and error_of(answer)["param"] == "x-session-id"
    assert prefetch(http, {"x-session-id": "none such"}, prompt="a").status_code == 200, "the body goes first"


def test_the_sessions_of_an_api_key_are_its_own() -> None:
    engine = FakeAsyncEngine()
    config = ServerConfig(served_model_name="toy", api_key=("one", "two"))
    with served(engine, config) as root_url, httpx.Client(base_url=root_url, timeout=10) as http:
        assert prefetch(http, prompt="a").status_code == 401
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        body = {"prompt": "a", "max_tokens": 1, "session_id": "talk"}
        http.post("/v1/completions", json=body, headers=one).raise_for_status()
        assert prefetch(http, one, session_id="talk").status_code == 200
        assert prefetch(http, two, session_id="talk").status_code == 404
        assert "talk" not in {*engine.seen_sessions}


def test_advice_is_counted(http: httpx.Client) -> None:
    before = counts(http.get("/metrics").text)
    prefetch(http, prompt="abcdefg")
    prefetch(http, session_id="none such")
    after = counts(http.get("/metrics").text)
    assert {name: after[name] - before[name] for name in after if name.startswith("prefetch")} == {
        "prefetch_requests_total": 1,
        "prefetch_tokens_total": 8,
        "prefetch_cached_tokens_total": 4,
        "prefetch_prefetched_tokens_total": 3,
    }
