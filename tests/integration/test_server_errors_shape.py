"""Errors that programs understand: one shape everywhere, the field at fault, and the words that clients look for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nanoflow.config import ServerConfig
from nanoflow.server.protocol import ChatCompletionRequest
from tests.fake_async_engine import FakeAsyncEngine
from tests.fake_server import CHAT, complete, error_of, served

JSON = {"content-type": "application/json"}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
LONG = "x" * 300


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    config = ServerConfig(served_model_name=["toy", "pet"], enable_tokenizer_info_endpoint=True)
    with served(FakeAsyncEngine(), config) as root_url, httpx.Client(base_url=root_url, timeout=10) as client:
        yield client


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param", "code", "words"),
    [
        (COMPLETIONS, {"prompt": LONG}, "prompt", "context_length_exceeded", "maximum context length"),
        (CHATS, {"messages": [{"role": "user", "content": LONG}]}, "messages", "context_length_exceeded", "maximum"),
        (COMPLETIONS, {"prompt": ["a", LONG]}, "prompt", "context_length_exceeded", "maximum context length"),
        (COMPLETIONS, {"prompt": [300]}, "prompt", None, "token id 300 is out of vocabulary"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt", None, "token id -1 is out of vocabulary"),
        (COMPLETIONS, {"prompt": [[1], [2**40]]}, "prompt.1", None, "token id 1099511627776 is out of vocabulary"),
        (COMPLETIONS, {"stop_token_ids": [2**40]}, "stop_token_ids", None, "out of vocabulary"),
        (COMPLETIONS, {"logit_bias": {str(2**32): 1}}, "logit_bias", None, "out of vocabulary"),
        (COMPLETIONS, {"max_tokens": 2.5}, "max_tokens", None, "max_tokens must be an integer, got 2.5"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens", None, "at least 1"),
        (COMPLETIONS, {"min_tokens": 20}, "min_tokens", None, "must not exceed max_tokens"),
        (COMPLETIONS, {"allowed_token_ids": []}, "allowed_token_ids", None, "must not be empty"),
        (COMPLETIONS, {"prompt": []}, "prompt", None, "at least 1 item"),
        (COMPLETIONS, {"prompt": None}, "prompt", None, "prompt"),
        (COMPLETIONS, {"tools": [1]}, "tools", None, "not supported"),
        (COMPLETIONS, {"tempratur": 1}, "tempratur", None, "did you mean 'temperature'"),
        (COMPLETIONS, {"model": "cat"}, "model", "model_not_found", "'toy', 'pet'"),
        (COMPLETIONS, {"stream": "yes"}, "stream", None, "boolean"),
        (COMPLETIONS, {"truncate_prompt_tokens": 500}, "truncate_prompt_tokens", None, "there is room for"),
        (CHATS, {"messages": []}, "messages", None, "at least 1 item"),
        (CHATS, {"messages": [{"role": "user"}]}, "messages.0.content", None, "content must be"),
        (CHATS, {"messages": ["hi"]}, "messages.0", None, "a JSON object is expected"),
        (CHATS, {"messages": [{"role": "user", "content": "refuse me"}]}, "messages", None, "refuses"),
        (CHATS, {"messages": CHAT, "top_logprobs": 2}, "top_logprobs", None, "needs logprobs=true"),
        (CHATS, {"messages": CHAT, "chat_template": "x"}, "chat_template", None, "refused"),
        (
            CHATS,
            {"messages": CHAT, "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt",
            None,
            "exclude each other",
        ),
    ],
)
def test_a_refusal_names_the_field(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str, code: str | None, words: str, is_stream: bool
) -> None:
    needed = {"prompt": "abc"} if path == COMPLETIONS else {}
    answer = http.post(path, json={**needed, "stream": is_stream, **fields})
    error = error_of(answer)
    assert answer.status_code == (404 if param == "model" else 400)
    assert (error["param"], error["code"]) == (param, code) and words in error["message"], error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "cat"}, "model"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_so_do_those_of_tokens(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    assert error_of(http.post(path, json=body))["param"] == param


def test_a_field_of_another_name_in_a_chat_is_named_as_it_was_sent() -> None:
    """The engine speaks of max_tokens; a chat may have sent max_completion_tokens."""
    given = {"messages": CHAT, "max_completion_tokens": 5}
    names = ChatCompletionRequest.model_validate(given).field_names
    assert (names["max_tokens"], names["prompt"]) == ("max_completion_tokens", "messages")
    assert ChatCompletionRequest.model_validate({"messages": CHAT}).field_names["max_tokens"] == "max_tokens"


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "text/plain"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonx"},
        {"content-type": "text/plain; application/json"},
    ],
)
def test_a_body_must_say_that_it_is_json(http: httpx.Client, path: str, headers: dict[str, str]) -> None:
    for content in (b'{"prompt": "a"}', b" " * 100_000):
        answer = http.post(path, content=content, headers=headers)
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (415, "unsupported_media_type")
        assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"])
def test_json_is_json_in_any_case(http: httpx.Client, kind: str) -> None:
    body = json.dumps({"prompt": "abc", "max_tokens": 3})
    assert http.post(COMPLETIONS, content=body, headers={"content-type": kind}).json()["choices"][0]["text"] == "the"


def test_no_body_and_another_than_an_object(http: httpx.Client) -> None:
    assert error_of(http.post(COMPLETIONS))["message"] == "there is no body; one in JSON is expected"
    assert error_of(http.post(COMPLETIONS, content=b"[1]", headers=JSON))["message"] == "the body must be a JSON object"
    assert "not valid JSON" in error_of(http.post(COMPLETIONS, content=b"{", headers=JSON))["message"]


def test_an_integer_may_be_written_with_a_point(http: httpx.Client) -> None:
    fields = {"max_tokens": 3.0, "n": 2.0, "top_k": 5.0, "seed": 1e3, "logprobs": 1.0, "min_tokens": 0.0}
    more = {"stop_token_ids": [4.0], "best_of": 2.0, "priority": 0.0, "truncate_prompt_tokens": 2.0}
    answer = complete(http, prompt=[97, 98.0, 99], echo=True, **fields, **more)
    assert [choice["text"] for choice in answer["choices"]] == ["bcthe", "bche"[:2] + "he "]
    assert complete(http, prompt=[[97.0], [98]], max_tokens=1, echo=True)["choices"][0]["text"] == "at"
    assert http.post("/detokenize", json={"tokens": [97.0, 98]}).json() == {"prompt": "ab"}
    long = [97.0] * 200 + [98] * 20_000
    assert error_of(http.post(COMPLETIONS, json={"prompt": long}))["code"] == "context_length_exceeded"
    assert error_of(http.post(COMPLETIONS, json={"prompt": [97, 98.5]}))["param"] == "prompt.1"
    assert error_of(http.post(COMPLETIONS, json={"prompt": "a", "best_of": True}))["param"] == "best_of"


def test_routes_that_are_not_there(http: httpx.Client) -> None:
    nowhere = http.post("/chat/completions", json={})
    assert (nowhere.status_code, error_of(nowhere)["code"]) == (404, "unknown_url")
    assert "did you mean /v1/chat/completions?" in error_of(nowhere)["message"]
    for route in ("POST /v1/completions", "GET /v1/models/{model_id}", "GET /health", "GET /tokenizer_info"):
        assert route in error_of(nowhere)["message"]
    assert len(error_of(http.get("/" + "x" * 5000))["message"]) < 1000
    wrong = http.delete("/v1/models")
    assert (wrong.status_code, wrong.headers["allow"], error_of(wrong)["code"]) == (
        405,
        "GET, HEAD",
        "method_not_allowed",
    )
    assert error_of(wrong)["message"] == "DELETE is not allowed at /v1/models; use GET or HEAD"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version", "/metrics", "/docs", "/openapi.json", "/"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"] and int(head.headers["content-length"]) > 0
    assert http.head("/nothing").status_code == 404 and http.head(COMPLETIONS).status_code == 405


def test_every_answer_has_a_request_id(http: httpx.Client) -> None:
    sent = {"x-request-id": "mine-7"}
    answers = [
        http.get("/health", headers=sent),
        http.get("/nothing", headers=sent),
        http.post(COMPLETIONS, json={"prompt": "crash"}, headers=sent),
        http.post(COMPLETIONS, json={"prompt": "a", "stream": True}, headers=sent),
        http.post(COMPLETIONS, content=b"{", headers={**JSON, **sent}),
    ]
    assert [answer.headers["x-request-id"] for answer in answers] == ["mine-7"] * 5
    ids = {http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3 and all(one.startswith("req-") for one in ids)
    assert http.get("/health", headers={"x-request-id": "a b<c>"}).headers["x-request-id"].startswith("req-")


def test_an_error_in_a_stream_has_the_same_shape(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, json={"prompt": ["a", "bug"], "stream": True})
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    errors = [json.loads(line)["error"] for line in lines if line.startswith('{"error"')]
    assert answer.status_code == 500 or set(errors[0]) == {"message", "type", "param", "code"}


def test_the_docs_page_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in page.text and "src=" not in page.text and "@import" not in page.text
    assert page.text.count("http://") == 1, "of the example"
    for text in ("POST /v1/chat/completions", "max_completion_tokens", "integer (1 to 128)", str(http.base_url)):
        assert text in page.text
    assert http.get("/openapi.json").json()["paths"]


def test_the_docs_page_shows_names_as_text() -> None:
    config = ServerConfig(served_model_name="<script>alert(1)</script>")
    with served(FakeAsyncEngine(), config) as root_url:
        text = httpx.get(f"{root_url}/docs", headers={"host": "a'b"}).text
        assert "<script>" not in text and "&lt;script&gt;" in text
