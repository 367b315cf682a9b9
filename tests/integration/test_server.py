"""The whole server in a process of its own, with the embedded model: answers, cancellation, metrics, ends."""

from __future__ import annotations

import json
import operator
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from zmq.constants import DEALER, RCVTIMEO
from zmq.sugar.context import Context

from nanoflow.kvcache.keys import page_keys, root_key
from tests.all_cases import part
from tests.server_process import ServerProcess, running_server, start_server


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The server's kv_events_config."""
    folder = tmp_path_factory.mktemp("events")
    endpoints = {"endpoint": f"ipc://{folder}/new", "replay_endpoint": f"ipc://{folder}/past"}
    return {"enable_kv_cache_events": True, **endpoints}


@pytest.fixture(scope="module")
def server(events: dict[str, Any]) -> Iterator[ServerProcess]:
    with running_server(("default", "--kv-events-config", json.dumps(events))) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.root_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.root_url}/v1", api_key="none", max_retries=0)


def complete(http: httpx.Client, **fields: Any) -> Any:
    answer = http.post("/v1/completions", json={"prompt": "def add(", "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def metric(http: httpx.Client, name: str) -> float:
    """Sum of all series of a metric."""
    lines = re.findall(rf"^nanoflow:{name}(?:{{.*}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert lines, name
    return sum(map(float, lines))


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.05)


def test_limits_are_said_before_the_server_is_ready(server: ServerProcess, http: httpx.Client) -> None:
    said, ready = [line for line in server.lines if not line.startswith("nanoflow: ")][:2]
    assert server.lines[0].startswith("nanoflow: reading, from ") and "GiB as float32" in server.lines[0]
    assert said.startswith("nanoflow limits for balanced: max_batch_tokens ") and ready.startswith("nanoflow serves ")
    (shown,) = re.findall(r"^nanoflow:limits_info{(.*)} 1\.0$", http.get("/metrics").text, re.MULTILINE)
    reason = said.strip().removeprefix("nanoflow ")
    assert 'goal="balanced"' in shown and 'max_num_seqs_origin="chosen"' in shown and f'reason="{reason}"' in shown


def is_idle(http: httpx.Client) -> bool:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(metric(http, name) == 0 for name in names)


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="default", prompt="def add(", max_tokens=24, temperature=0)
    stream = client.completions.create(model="default", prompt="def add(", max_tokens=24, temperature=0, stream=True)
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.text for part in parts) == whole.choices[0].text
    assert parts[-1].finish_reason == whole.choices[0].finish_reason


def test_token_prompts_answer_as_their_text(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "def add("}).json()["tokens"]
    from_tokens = complete(http, prompt=[tokens, tokens], max_tokens=8)["choices"]
    from_text = complete(http, max_tokens=8)["choices"]
    assert [choice["text"] for choice in from_tokens] == [from_text[0]["text"]] * 2
    assert http.post("/detokenize", json={"tokens": tokens, "skip_special_tokens": True}).json() == {
        "prompt": "def add("
    }


def test_prompt_scores_agree_with_generation(http: httpx.Client) -> None:
    """The log probability of a token is the same, whether it was generated or stood in the prompt."""
    prompt = http.post("/tokenize", json={"prompt": "def add("}).json()["tokens"]
    generated = complete(http, prompt=prompt, max_tokens=6, logprobs=1, ignore_eos=True)["choices"][0]
    tokens = generated["logprobs"]["tokens"]
    text_tokens = http.post("/tokenize", json={"prompt": "def add(" + "".join(tokens)}).json()["tokens"]
    if text_tokens[: len(prompt)] != prompt or len(text_tokens) != len(prompt) + len(tokens):
        pytest.skip("the generated text encodes to other tokens")
    scored = complete(http, prompt=text_tokens, max_tokens=1, logprobs=1, echo=True)["choices"][0]["logprobs"]
    assert scored["token_logprobs"][0] is None
    assert scored["token_logprobs"][len(prompt) : -1] == pytest.approx(
        generated["logprobs"]["token_logprobs"], abs=1e-3
    )


def test_seeds_and_choices(http: httpx.Client) -> None:
    fields = {"temperature": 1.0, "seed": 5, "n": 3, "max_tokens": 12}
    first, again = (complete(http, **fields)["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    assert len({choice["text"] for choice in first}) > 1


def test_a_stop_string_is_not_shown(http: httpx.Client) -> None:
    text = complete(http, max_tokens=24, ignore_eos=True)["choices"][0]["text"]
    stop = text[8:10]
    choice = complete(http, max_tokens=24, ignore_eos=True, stop=stop)["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == (text[: text.index(stop)], stop)


def test_too_long_a_prompt_is_refused_with_numbers(http: httpx.Client) -> None:
    max_model_len = http.get("/v1/models/default").json()["max_model_len"]
    answer = http.post("/v1/completions", json={"prompt": [1] * (max_model_len + 1)})
    assert answer.status_code == 400
    assert str(max_model_len) in answer.json()["error"]["message"]
    complete(http, max_tokens=1)


def test_many_at_once_answer_as_one_alone(http: httpx.Client) -> None:
    alone = complete(http, max_tokens=16)["choices"][0]["text"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: complete(http, max_tokens=16), range(32)))
    assert {answer["choices"][0]["text"] for answer in answers} == {alone}


def test_metrics_count_exactly(http: httpx.Client) -> None:
    wait_until(lambda: is_idle(http))
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_success_total",
    )
    before = [metric(http, name) for name in names]
    for _ in range(10):
        usage = complete(http, max_tokens=7, ignore_eos=True)["usage"]
    after = [metric(http, name) for name in names]
    grown = [new - old for new, old in zip(after, before, strict=True)]
    assert grown == [10 * usage["prompt_tokens"], 70, 10, 60, 10, 10]
    wait_until(lambda: is_idle(http))


@pytest.mark.parametrize("is_stream", [False, True])
def test_clients_that_leave_free_the_engine(server: ServerProcess, http: httpx.Client, is_stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": is_stream}

    def leave(_: int) -> None:
        with httpx.Client(base_url=server.root_url, timeout=30) as impatient:
            try:
                with impatient.stream("POST", "/v1/completions", json=body, timeout=0.5) as answer:
                    next(answer.iter_bytes())
            except httpx.ReadTimeout:
                pass

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(leave, range(60)))
    start_s = time.monotonic()
    complete(http, max_tokens=4)
    assert time.monotonic() - start_s < 5
    wait_until(lambda: is_idle(http))


def test_health_tells_of_the_engine(http: httpx.Client) -> None:
    answer = http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    assert answer.json()["heartbeat_age_s"] < 10


# Ends


@pytest.mark.parametrize("number", part([signal.SIGTERM], of=[signal.SIGTERM, signal.SIGINT]))
def test_a_signal_ends_streams_and_the_server(number: signal.Signals) -> None:
    with running_server() as server, httpx.Client(base_url=server.root_url, timeout=30) as http:
        body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(number)
            time.sleep(0.1)  # two of a kind at once are one
            server.process.send_signal(number)
            *_, last, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        assert "error" in json.loads(last.removeprefix("data: ")) or "finish_reason" in last
        assert server.stop() == 0
        with pytest.raises(httpx.ConnectError):
            http.get("/health")


def test_a_dead_engine_ends_the_server() -> None:
    with running_server() as server:
        for child in children(server.process.pid):
            os.kill(child, signal.SIGKILL)
        assert server.process.wait(20) == 1
        assert [line for line in server.lines if line.startswith("nanoflow: error: ")]
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.parametrize("arguments", [("/nowhere/at/all",), ("default", "--host", "192.0.2.1")])
def test_what_cannot_start_says_so_in_one_line(arguments: tuple[str, ...]) -> None:
    server = start_server(*arguments)
    assert server.process.wait(60) == 1
    wait_until(lambda: bool(server.lines))
    assert [line for line in server.lines if line.startswith("nanoflow: error: ")] == server.lines


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# The prefix cache, seen from outside


def replayed_pages(endpoint: str) -> dict[int, int | None]:
    """The pages that all events so far leave, with the page before each, as a router that has just started reads them.

    Events are published in a thread, so the last ones may come a moment late.
    """
    time.sleep(0.2)
    context = Context()
    socket = context.socket(DEALER)
    socket.setsockopt(RCVTIMEO, 5000)
    socket.connect(endpoint)
    socket.send_multipart([b"", bytes(8)])
    parents: dict[int, int | None] = {}
    while batch := socket.recv_multipart()[2]:
        for name, *fields in msgspec.msgpack.decode(batch)[1]:
            if name == "BlockStored":
                assert len(fields[2]) == len(fields[0]) * fields[3] == len(fields[0]) * 16
                parents |= dict(zip(fields[0], [fields[1], *fields[0]], strict=False))
            else:
                assert name == "AllBlocksCleared" and not parents
    context.destroy(linger=0)
    return parents


def test_what_is_cached_is_told_and_can_be_asked_for(http: httpx.Client, events: dict[str, Any]) -> None:
    """Advice before and after a completion, by prompt and by session; what routers hear; the counts of the device."""
    talk = "def fibonacci(n):\n    " * 12

    def advise(**body: Any) -> Any:
        return http.post("/v1/prefetch", json=body).json()

    token_ids = http.post("/tokenize", json={"prompt": talk}).json()["tokens"]
    assert advise(prompt=talk)["num_cached_tokens"] == 0
    asked, used = (metric(http, f"kv_tier_{name}") for name in ("queries_total", "used_bytes"))
    assert metric(http, "prefix_cache_queries_total") == asked
    answer = complete(http, prompt=talk, max_tokens=40, session_id="talk", ignore_eos=True, return_token_ids=True)
    whole = [*token_ids, *answer["choices"][0]["token_ids"]]
    numbers = [int.from_bytes(key[-8:], "big") for key in page_keys(whole[:-1], 16, root_key())]
    told = replayed_pages(events["replay_endpoint"])
    assert [told[number] for number in numbers] == [None, *numbers[:-1]]
    found = advise(prompt=talk)
    assert found["num_cached_tokens"] == len(token_ids) // 16 * 16 > 0
    assert found["num_tokens"] == len(token_ids) and found["num_prefetched_tokens"] == 0
    session = advise(session_id="talk")
    assert (session["num_tokens"], session["num_cached_tokens"]) == (len(whole), len(numbers) * 16)
    assert http.post("/v1/prefetch", json={"session_id": "other"}).status_code == 404
    assert advise(prompt=talk, cache_salt="mine")["num_cached_tokens"] == 0
    time.sleep(0.2)
    assert metric(http, "kv_tier_queries_total") - asked == len(token_ids)
    page_bytes = metric(http, "kv_tier_capacity_bytes") / int(cache_facts(http)["num_gpu_blocks"])
    assert metric(http, "kv_tier_used_bytes") - used == len(numbers) * page_bytes > 0
    assert metric(http, "external_prefix_cache_queries_total") == 0


def test_vectors(server: ServerProcess, http: httpx.Client) -> None:
    """Through the official client, which asks for base64; and what is refused."""
    client = openai.OpenAI(base_url=f"{server.root_url}/v1", api_key="none")
    texts = ["def f(x):", "while True:", "def f(y):"]
    given = client.embeddings.create(model="default", input=texts)
    one, other, like = (each.embedding for each in given.data)
    assert len(one) == 256 and sum(x * x for x in one) == pytest.approx(1, abs=1e-4)
    assert sum(map(operator.mul, one, like)) > sum(map(operator.mul, one, other))
    assert given.usage.prompt_tokens == given.usage.total_tokens > 3

    def embed(**body: Any) -> httpx.Response:
        return http.post("/v1/embeddings", json=body)

    whole = embed(input=texts, pooling="mean", normalize=False).json()
    cut = embed(input=texts[1], pooling="mean", dimensions=3, normalize=False).json()
    assert cut["data"][0]["embedding"] == pytest.approx(whole["data"][1]["embedding"][:3], rel=1e-4)
    kept = embed(input=[5, 6, 7, 8], truncate_prompt_tokens=1).json()
    assert kept["usage"]["prompt_tokens"] == 1
    for body, field in (
        ({"input": ""}, "input"),
        ({"input": [5, 10**6]}, "input"),
        ({"input": "a", "dimensions": 257}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "pooling"),
    ):
        refused = embed(**body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), body
    assert embed(input=[5, 10**6]).json()["error"]["message"].startswith("input: token id 1000000")
    refused = embed(input="a" * 2**21)
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "input")


def cache_facts(http: httpx.Client) -> dict[str, str]:
    """Labels of the metric that describes the KV cache."""
    (line,) = re.findall(r"^nanoflow:cache_config_info\{(.*)\}", http.get("/metrics").text, re.M)
    return dict(re.findall(r'(\w+)="([^"]*)"', line))
