"""The server with an engine that needs no model: bad requests, failures, and clients that leave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fake_async_engine import MAX_MODEL_LEN, FakeAsyncEngine
from tests.fake_server import CHAT, complete, error_of, served, wait_until


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with served(FakeAsyncEngine()) as root_url, httpx.Client(base_url=root_url, timeout=10) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [9999]}, "out of vocabulary"),
        ({"prompt": ["a", ""]}, "no tokens"),
        ({"prompt": "a" * MAX_MODEL_LEN}, "context length"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "out of vocabulary"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"prompt": "a", "best_of": 2}, "best_of is not supported"),
        ({"prompt": "a", "tempreature": 0.5}, "did you mean 'temperature'?"),
        ({"prompt": "a", "top_k": 2.5}, "top_k must be an integer, got 2.5"),
        ({}, "prompt: Field required"),
        ([], "must be a JSON object"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_bad_requests(http: httpx.Client, body: Any, words: str, is_stream: bool) -> None:
    answer = http.post("/v1/completions", json={**body, "stream": True} if is_stream and body else body)
    assert answer.status_code == 400
    assert words in error_of(answer)["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "\\ud800": ' + b"[" * 200 + b"]" * 200 + b', "logit_bias": {"\\ud800": 1}}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_bodies(http: httpx.Client, path: str, content: bytes) -> None:
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)["message"]


def test_nul_is_a_character(http: httpx.Client) -> None:
    assert complete(http, prompt="a\0b", echo=True, max_tokens=1)["choices"][0]["text"] == "a\0bt"


def test_a_wrong_place_or_method(http: httpx.Client) -> None:
    nowhere = http.get("/v1/nothing")
    assert (nowhere.status_code, error_of(nowhere)["message"]) == (
        404,
        "there is nothing at /v1/nothing; there are POST /v1/completions, POST /v1/chat/completions, "
        "POST /v1/embeddings, GET /v1/models, GET /v1/models/{model_id}, POST /tokenize, POST /detokenize, "
        "POST /v1/responses, GET /v1/responses/{response_id}, DELETE /v1/responses/{response_id}, "
        "POST /v1/responses/{response_id}/cancel, GET /v1/responses/{response_id}/input_items, POST /v1/messages, "
        "POST /v1/messages/count_tokens, POST /v1/prefetch, GET /health, GET /version, GET /metrics, GET /status, "
        "GET /plan",
    )
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "GET is not allowed" in error_of(wrong)["message"]


def test_another_model(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": "gpt", "prompt": "a"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
    assert "this server has 'toy'" in error_of(answer)["message"]


def test_a_template_may_refuse(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "refuse me"}]})
    assert answer.status_code == 400
    assert "refuses the messages" in error_of(answer)["message"]


@pytest.mark.parametrize("prompt", ["fail", "crash", "bug"])
def test_one_request_fails_alone(http: httpx.Client, prompt: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": prompt})
    assert (answer.status_code, error_of(answer)["type"]) == (500, "server_error")
    assert "/secret" not in answer.text
    complete(http)


def test_a_model_without_tokenizer_serves_token_ids() -> None:
    with served(FakeAsyncEngine(has_tokenizer=False)) as root_url, httpx.Client(base_url=root_url) as http:
        (choice,) = complete(http, prompt=[97], max_tokens=3, logprobs=0)["choices"]
        assert (choice["text"], choice["logprobs"]["tokens"][0]) == ("", f"token_id:{ord('t')}")
        for path, body in (
            ("/v1/completions", {"prompt": [97], "echo": True}),
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/completions", {"prompt": [97], "stop": "x"}),
            ("/v1/chat/completions", {"messages": CHAT}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [97]}),
        ):
            assert http.post(path, json=body).status_code == 400


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_mistake_of_ours_is_not_shown_as_the_clients(
    http: httpx.Client, is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where it is a ValueError: the log has it."""
    answer = http.post("/v1/completions", json={"prompt": "bug", "stream": is_stream})
    assert (answer.status_code, error_of(answer)["message"]) == (500, "internal error; the server's log says more")
    assert "int() with base 10" in caplog.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": CHAT, "max_token": 5}),
        ("/tokenize", {"prompt": "a", "add_special_token": True}),
        ("/detokenize", {"tokens": [97], "skip_special_token": True}),
    ],
)
def test_unknown_fields_are_refused_everywhere(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = http.post(path, json=body)
    wrong = list(body)[-1]
    assert answer.status_code == 400 and error_of(answer)["param"] == wrong
    assert error_of(answer)["message"] == f"unknown field {wrong!r}; did you mean '{wrong}s'?"


def test_a_long_body_is_refused_in_the_same_words(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a" * 200_000, "tempreature": 1})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "tempreature")
    assert error_of(answer)["message"] == "unknown field 'tempreature'; did you mean 'temperature'?"


# Ends


def test_a_dead_engine_ends_calls_and_refuses_new_ones() -> None:
    engine = FakeAsyncEngine(step_s=0.02)
    with served(engine) as root_url, httpx.Client(base_url=root_url) as http:
        with http.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 200, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert "choices" in next(lines)
            engine.is_alive = False
            *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert done == "data: [DONE]"
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_dead")
        assert engine.num_running == 0


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_is_forgotten(path: str, is_stream: bool) -> None:
    engine = FakeAsyncEngine(step_s=0.05)
    body: dict[str, Any] = {"max_tokens": 200, "n": 2, "stream": is_stream}
    body |= {"prompt": ["a", "b", "c"]} if path == "/v1/completions" else {"messages": CHAT}
    num_calls = 3 if path == "/v1/completions" else 1
    with served(engine) as root_url, httpx.Client(base_url=root_url, timeout=5 if is_stream else 0.3) as http:
        if is_stream:
            with http.stream("POST", path, json=body) as answer:
                lines = answer.iter_lines()  # kept: a discarded iterator closes the connection
                assert next(lines)
                assert engine.num_running == num_calls
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(path, json=body)
        wait_until(lambda: engine.num_running == 0)
        assert engine.num_closed == num_calls


def test_a_client_that_leaves_the_queue_is_forgotten() -> None:
    engine = FakeAsyncEngine(step_s=60)
    with served(engine) as root_url, httpx.Client(base_url=root_url, timeout=0.2) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json={"prompt": "a", "stream": True})
        wait_until(lambda: engine.num_closed == 1)
