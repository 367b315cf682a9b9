"""What every request passes over a real socket: keys, hosts, origins, and HTTP as few clients speak it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanoflow.config import ServerConfig
from nanoflow.server.answering import http_protocol
from nanoflow.server.wire import on_the_wire
from tests.fake_async_engine import FakeAsyncEngine
from tests.fake_server import error_of, served, wait_until
from tests.raw_http import ask, connect, get, post, split, status

KEYED = ServerConfig(
    served_model_name=["toy", "other"],
    api_key=["key-1", "key-2"],
    allowed_hosts=["toy", "*.inner.example", "127.0.0.1"],
    allowed_origins=["https://app.example"],
)
AUTHORIZED = {"authorization": "Bearer key-2"}
PROTOCOLS = {"httptools": http_protocol(), "h11": on_the_wire(H11Protocol)}


@pytest.fixture(scope="module")
def root_url() -> Iterator[str]:
    with served(FakeAsyncEngine(), KEYED) as url:
        yield url


@pytest.fixture(scope="module")
def http(root_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=root_url, timeout=10) as client:
        yield client


# Keys


@pytest.mark.parametrize(
    "target",
    [
        "/", "/docs", "/openapi.json", "/metrics", "/version", "/v1/models", "/v1/models/toy", "/nothing",
        "//health", "/health/", "/HEALTH", "/health/../v1/models", "/%68ealth", "/health%2e",
        "/health%2f..%2fv1/models",
        "/health\\..\\v1", "/./health", "/health;a=b", "*", "http://toy/v1/models", "/v1/..;/health", "/health%00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "HEAD", "POST"])
def test_nothing_but_health_answers_without_a_key(root_url: str, target: str, method: str) -> None:
    assert status(ask(root_url, get(target, method=method))) in (400, 401), "400: no target of a request at all"


def test_health_answers_without_a_key(root_url: str) -> None:
    for target in ("/health", "/health?key=x", "http://toy/health"):
        assert status(ask(root_url, get(target))) == 200
    upgrade = "Host: toy\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    assert status(ask(root_url, get("/v1/models", headers=upgrade))) == 401


def test_a_key_opens_every_route(http: httpx.Client) -> None:
    for key in KEYED.api_key:
        assert http.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200
    refused = http.get("/v1/models", headers={"authorization": "Bearer key-3"})
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert (error_of(refused)["code"], "key-3" in refused.text) == ("invalid_api_key", False)
    twice = http.get("/v1/models", headers=[("authorization", "Bearer key-1"), ("authorization", "Bearer key-1")])
    assert (twice.status_code, error_of(twice)["message"]) == (401, "there is more than one Authorization header")


def test_the_openai_client_maps_errors(root_url: str) -> None:
    client = openai.OpenAI(base_url=f"{root_url}/v1", api_key="key-1", max_retries=0)
    raw = client.models.with_raw_response.list(extra_headers={"x-request-id": "mine-1"})
    assert raw.headers["x-request-id"] == "mine-1"
    assert [model.id for model in raw.parse()] == ["toy", "other"]
    assert client.models.retrieve("other").id == "other"
    answer = client.completions.create(model="other", prompt="a", max_tokens=1)
    assert (answer.model, bool(answer._request_id)) == ("toy", True)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="third", prompt="a")
    assert "'toy', 'other'" in missing.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="toy", prompt="a" * 300)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")


# Hosts and origins


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("Host: toy:8000\r\n", 200), ("Host: TOY.\r\n", 200), ("Host: a.inner.example\r\n", 200),
        ("HOST:127.0.0.1\r\n", 200),
        ("Host: evil.example\r\n", 403), ("Host: toy.evil.example\r\n", 403), ("Host: inner.example\r\n", 403),
        ("Host: [::1]:80\r\n", 403), ("Host: 127.0.0.2\r\n", 403),
        ("", 400), ("Host: toy\r\nHost: toy\r\n", 400), ("Host: toy\r\nHost: evil.example\r\n", 400),
        ("Host:\r\n", 400),
        ("Host: toy@evil.example\r\n", 400), ("Host: toy:80:80\r\n", 400), ("Host: toy/x\r\n", 400),
        ("Host: toy:x\r\n", 400),
        ("Host: [toy]\r\n", 400), ("Host: toy, evil.example\r\n", 400),
    ],
)  # fmt: skip
def test_the_host_must_be_one_that_is_answered(root_url: str, headers: str, expected: int) -> None:
    answer = ask(root_url, get("/health", headers=headers))
    assert status(answer) == expected
    assert b"x-request-id: " in answer
    if expected != 200:
        assert json.loads(split(answer)[1])["error"]["code"] in ("host_not_allowed", "invalid_host")


def test_http_1_0_has_no_host(root_url: str) -> None:
    assert status(ask(root_url, get("/health", version="1.0", headers=""))) == 200
    assert status(ask(root_url, get("/health", version="1.0", headers="Host: evil.example\r\n"))) == 403


def test_pages_of_an_allowed_origin_read_answers(http: httpx.Client) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    own, other = {"origin": "https://app.example"}, {"origin": "https://evil.example"}
    allowed = http.options("/v1/completions", headers={**own, **asks})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://app.example")
    refused = http.options("/v1/completions", headers={**other, **asks})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "origin_not_allowed")
    assert "access-control-allow-origin" not in refused.headers
    read = http.get("/v1/models", headers={**own, **AUTHORIZED})
    assert read.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in read.headers["access-control-expose-headers"]
    without_key = http.get("/v1/models", headers=own)
    assert (without_key.status_code, "access-control-allow-origin" in without_key.headers) == (401, True)
    assert "access-control-allow-origin" not in http.get("/health", headers=other).headers


def test_no_page_reads_answers_unless_allowed() -> None:
    with served(FakeAsyncEngine()) as url, httpx.Client(base_url=url) as http:
        answer = http.get("/v1/models", headers={"origin": "https://app.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
        assert http.options("/v1/completions", headers=asks).status_code == 405


# HTTP


@pytest.fixture(scope="module", params=PROTOCOLS)
def slow(request: pytest.FixtureRequest) -> Iterator[tuple[FakeAsyncEngine, str]]:
    """A server that takes 30 ms a token, and its address; over either of the parsers."""
    engine = FakeAsyncEngine(step_s=0.03)
    with served(engine, http=PROTOCOLS[request.param]) as url:
        yield engine, url


FIELDS: dict[str, Any] = {"prompt": "abc", "max_tokens": 9}


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_closes_its_side_gets_the_whole_answer(
    slow: tuple[FakeAsyncEngine, str], version: str, is_stream: bool
) -> None:
    request = post("/v1/completions", {**FIELDS, "stream": is_stream}, version=version)
    answer = ask(slow[1], request, half_closes=True)
    head, body = split(answer)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.count(b"HTTP/1.1") == 1
    assert ("transfer-encoding" in head) is (is_stream and version == "1.1")
    if is_stream:
        assert body.count(b"data: ") == 10 and b"[DONE]" in body
    else:
        assert json.loads(body)["choices"][0]["text"] == "the quick"


@pytest.mark.parametrize("half_closes_first", [False, True])
def test_one_that_goes_altogether_is_forgotten(slow: tuple[FakeAsyncEngine, str], half_closes_first: bool) -> None:
    engine, url = slow
    with connect(url) as connection:
        connection.sendall(post("/v1/completions", {**FIELDS, "max_tokens": 250}))
        wait_until(lambda: engine.num_running == 1)
        if half_closes_first:
            connection.shutdown(1)
            time.sleep(0.3)
            assert engine.num_running == 1
    wait_until(lambda: engine.num_running == 0, timeout_s=4.0)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("num_waiting", [1, 20])
def test_one_that_goes_with_requests_that_wait_is_forgotten(
    slow: tuple[FakeAsyncEngine, str], num_waiting: int, is_stream: bool
) -> None:
    engine, url = slow
    num_asked = len(engine.seen_params)
    with connect(url) as connection:
        connection.sendall(
            post("/v1/completions", {**FIELDS, "max_tokens": 250, "stream": is_stream}) * (1 + num_waiting)
        )
        wait_until(lambda: engine.num_running == 1)
    wait_until(lambda: engine.num_running == 0, timeout_s=4.0)
    time.sleep(0.1)
    assert (engine.num_running, len(engine.seen_params) - num_asked) == (0, 1)


def test_one_that_goes_between_two_answers_is_forgotten(slow: tuple[FakeAsyncEngine, str]) -> None:
    engine, url = slow
    with connect(url) as connection:
        connection.sendall(post("/v1/completions", FIELDS) + post("/v1/completions", {**FIELDS, "max_tokens": 250}))
        connection.shutdown(1)
        answer = b""
        while b"the quick" not in answer:
            answer += connection.recv(65536)
        wait_until(lambda: engine.num_running == 1)
    wait_until(lambda: engine.num_running == 0, timeout_s=4.0)


def test_requests_that_wait_are_answered_to_a_client_that_closes_its_side(slow: tuple[FakeAsyncEngine, str]) -> None:
    answer = ask(slow[1], post("/v1/completions", FIELDS) * 4, half_closes=True)
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == answer.count(b"the quick") == 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_that_the_end_of_the_server_cancels_is_told_so_in_json(protocol: str) -> None:
    engine, read = FakeAsyncEngine(step_s=30.0), list[bytes]()
    with served(engine, http=PROTOCOLS[protocol]) as root_url:
        asking = threading.Thread(target=lambda: read.append(ask(root_url, post("/v1/completions", FIELDS))))
        asking.start()
        wait_until(lambda: engine.num_running == 1)
    asking.join()
    assert status(read[0]) == 503 and json.loads(split(read[0])[1])["error"]["code"] == "draining"


@pytest.mark.parametrize("is_stream", [False, True])
def test_http_1_0_gets_no_chunks(slow: tuple[FakeAsyncEngine, str], is_stream: bool) -> None:
    request = post(
        "/v1/completions", {**FIELDS, "stream": is_stream}, version="1.0", headers="Connection: keep-alive\r\n"
    )
    head, body = split(ask(slow[1], request))
    assert "transfer-encoding" not in head and "connection: close" in head
    if is_stream:
        assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
    else:
        assert f"content-length: {len(body)}" in head and json.loads(body)


def test_an_offer_of_another_protocol_is_declined(slow: tuple[FakeAsyncEngine, str]) -> None:
    """As Java's client begins."""
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    request = post("/v1/completions", FIELDS, headers=offer)
    with connect(slow[1]) as connection:
        for _ in range(2):
            for place in range(0, len(request), 100):
                connection.sendall(request[place : place + 100])
            answer = connection.recv(65536)
            while b"the quick" not in answer:
                answer += connection.recv(65536)
            assert status(answer) == 200


def test_many_offers_in_one_go(slow: tuple[FakeAsyncEngine, str]) -> None:
    offer = b"GET /health HTTP/1.1\r\nHost: toy\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    answer = ask(slow[1], offer * 3 + get("/health"))
    assert answer.count(b"HTTP/1.1 200 OK") == 4


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00hello\r\n\r\n", b"GET\r\n\r\n", b"CONNECT a:1 HTTP/9\r\n\r\n"])
def test_what_is_no_http_is_told_so_in_json(slow: tuple[FakeAsyncEngine, str], noise: bytes) -> None:
    head, body = split(ask(slow[1], noise))
    assert head.startswith("http/1.1 400") and "application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_noise_after_a_request_does_not_spoil_its_answer(slow: tuple[FakeAsyncEngine, str]) -> None:
    begun_s = time.monotonic()
    answer = ask(slow[1], post("/v1/completions", FIELDS) + b"noise\r\n\r\n")
    head, body = split(answer)
    assert (
        head.startswith("http/1.1 200")
        and b"the quick" in body[: int(head.partition("content-length: ")[2].split()[0])]
    )
    assert time.monotonic() - begun_s < 4.0, "nothing can follow, so the server does not wait until the client is idle"
