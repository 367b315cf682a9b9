from __future__ import annotations

import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from benchmarks.common.stub_facts import stub_facts

from nanoflow.bench import clients, offline
from nanoflow.bench.machine import detect_gpus, git_revision
from nanoflow.bench.options import BenchConfig, LoadConfig, ThroughputConfig
from nanoflow.bench.record import format_table, make_record, write_record
from nanoflow.cli.main import main
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.observer import Observer
from nanoflow.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.run_metrics import (
    Distribution,
    RequestRecord,
    distribution,
    measure,
    meets,
    normalized_latency_s,
    parse_limits,
    tpot_s,
    ttft_s,
)
from nanoflow.workload import Lengths, draw_arrivals, draw_lengths, kinds_of, make_requests, read_trace

# --- workload ------------------------------------------------------------------------------------------------------

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
XXX,100,10
XXX,3072,1024
XXX,3073,10
XXX,100,1025
XXX,0,5
XXX,5,0
XXX,7,8
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    (tmp_path / "trace.csv").write_text(TRACE)
    return tmp_path / "trace.csv"


def lengths(*pairs: tuple[int, int]) -> list[Lengths]:
    return [Lengths(num_prompt_tokens=prompt, num_output_tokens=output) for prompt, output in pairs]


def test_constant_workload() -> None:
    assert draw_lengths("1024/512", 3, seed=0) == lengths((1024, 512)) * 3


@pytest.mark.parametrize(("num_requests", "counts"), [(13, (1, 12)), (26, (2, 24)), (27, None)])
def test_a_mix_has_its_shares_in_random_order(num_requests: int, counts: tuple[int, int] | None) -> None:
    mix = "8000/100,200/1000x12"
    drawn = draw_lengths(mix, num_requests, seed=0)
    found = tuple(drawn.count(kind) for kind in lengths((8000, 100), (200, 1000)))
    assert found in ((counts,) if counts else ((2, 25), (3, 24)))
    assert drawn == draw_lengths(mix, num_requests, seed=0)
    assert len({tuple(map(str, draw_lengths(mix, num_requests, seed=seed))) for seed in range(9)}) > 1
    assert kinds_of(mix) == lengths((8000, 100)) + lengths((200, 1000)) * 12


@pytest.mark.parametrize(
    "workload",
    [
        *(
            "512",
            "0/5",
            "5/0",
            "a/b",
            "5/5/5",
            "-1/5",
            "",
            "trace:",
            "5/5,",
            ",",
            "5/5x",
            "5/5x0",
            "5/5x-1",
            "5/5 ,6/6",
        ),
        *("5/5x100000", "5/5x1.5", "5/5,trace:a.csv"),
    ],
)
def test_bad_workloads_are_refused(workload: str) -> None:
    with pytest.raises(ConfigError):
        draw_lengths(workload, 1, seed=0)


def test_trace_is_filtered_as_the_paper_does(trace: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert read_trace(trace) == lengths((100, 10), (3072, 1024), (7, 8))
    assert [record.getMessage() for record in caplog.records] == [
        f"{trace}: 4 of 7 requests are left out: a request of a trace has 1 to 3,072 prompt tokens and 1 to 1,024 "
        "output tokens, 4,096 in all"
    ]


def test_trace_draws_follow_the_seed_and_repeat_only_when_used_up(trace: Path) -> None:
    drawn = draw_lengths(f"trace:{trace}", 3, seed=1)
    assert sorted(drawn, key=str) == sorted(read_trace(trace), key=str)
    assert drawn == draw_lengths(f"trace:{trace}", 3, seed=1)
    assert len(draw_lengths(f"trace:{trace}", 10, seed=1)) == 10
    assert len({tuple(map(str, draw_lengths(f"trace:{trace}", 10, seed=seed))) for seed in range(5)}) > 1


@pytest.mark.parametrize("text", ["A,B\n1,2\n", "ContextTokens,GeneratedTokens\nx,2\n", "ContextTokens\n1\n", ""])
def test_bad_traces_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ConfigError, match="trace"):
        read_trace(tmp_path / "bad.csv")


def test_arrivals_are_poisson() -> None:
    arrivals_s = draw_arrivals(20_000, request_rate=4.0, seed=3)
    gaps_s = np.diff([0.0, *arrivals_s])
    assert (gaps_s >= 0).all()
    # Exponential: standard deviation equals the mean, and P(gap > mean) is 1/e.
    assert np.mean(gaps_s) == pytest.approx(0.25, rel=0.03)
    assert np.std(gaps_s) == pytest.approx(0.25, rel=0.05)
    assert np.mean(gaps_s > 0.25) == pytest.approx(math.exp(-1), abs=0.02)


def test_arrivals_follow_the_seed_and_scale_with_the_rate() -> None:
    slow = draw_arrivals(50, request_rate=1.0, seed=0)
    assert slow == draw_arrivals(50, request_rate=1.0, seed=0) != draw_arrivals(50, request_rate=1.0, seed=1)
    assert draw_arrivals(50, request_rate=10.0, seed=0) == pytest.approx([time_s / 10 for time_s in slow])
    assert draw_arrivals(5, request_rate=math.inf, seed=0) == [0.0] * 5


def test_repeats_differ_in_prompts_only() -> None:
    wanted = lengths((30, 3), (20, 2))
    first, again, second = (make_requests(wanted, vocab_size=11, seed=5, repeat=repeat) for repeat in (0, 0, 1))
    assert first == again
    assert [len(request.prompt_token_ids) for request in second] == [30, 20]
    assert [request.num_output_tokens for request in second] == [3, 2]
    assert first[0].prompt_token_ids != second[0].prompt_token_ids
    tokens = [token for request in first + second for token in request.prompt_token_ids]
    assert all(type(token) is int and 0 <= token < 11 for token in tokens)


# --- metrics -------------------------------------------------------------------------------------------------------

FAST = RequestRecord(
    num_prompt_tokens=10,
    num_requested_tokens=5,
    num_output_tokens=5,
    arrival_s=1.0,
    first_token_s=1.5,
    finished_s=3.5,
    gaps_s=(0.25, 0.25, 0.5, 1.0),
)
SLOW = RequestRecord(
    num_prompt_tokens=30,
    num_requested_tokens=2,
    num_output_tokens=1,
    arrival_s=2.0,
    first_token_s=6.0,
    finished_s=6.0,
)
FAILED = RequestRecord(num_prompt_tokens=99, num_requested_tokens=9, error="HTTP 503: full")


def test_latencies_by_hand() -> None:
    assert ttft_s(FAST) == 0.5
    assert tpot_s(FAST) == 0.5  # (2.5 - 0.5) / 4
    assert normalized_latency_s(FAST) == 0.5  # 2.5 / 5
    assert tpot_s(SLOW) is None
    assert normalized_latency_s(SLOW) == 4.0


def test_distribution_by_hand() -> None:
    assert distribution([]) is None and distribution([None]) is None
    assert distribution([2.0, None]) == Distribution(mean=2.0, p50=2.0, p90=2.0, p99=2.0)
    spread = distribution(float(value) for value in range(101))
    assert spread == Distribution(mean=50.0, p50=50.0, p90=90.0, p99=99.0)


def test_measure_by_hand() -> None:
    run = measure([FAST, SLOW, FAILED], 5.0, parse_limits(["ttft_ms:1000"]))
    assert (run.num_requests, run.num_completed, run.num_failed, run.num_short) == (3, 2, 1, 1)
    assert (run.num_prompt_tokens, run.num_output_tokens) == (40, 6)
    assert run.total_tokens_per_s == pytest.approx(46 / 5)
    assert run.output_tokens_per_s == pytest.approx(6 / 5)
    assert run.requests_per_s == pytest.approx(2 / 5)
    assert run.goodput_requests_per_s == pytest.approx(1 / 5)
    assert run.ttft_s is not None and run.ttft_s.mean == pytest.approx(2.25)
    assert run.tpot_s is not None and run.tpot_s.p99 == 0.5
    assert run.itl_s is not None and run.itl_s.mean == 0.5
    assert run.latency_s is not None and run.latency_s.mean == pytest.approx(3.25)
    assert run.normalized_latency_s is not None and run.normalized_latency_s.p50 == pytest.approx(2.25)
    assert run.errors == {"HTTP 503: full": 1}


def test_a_run_of_failures_has_rates_and_no_latencies() -> None:
    run = measure([FAILED, FAILED], 2.0, {})
    assert (run.num_failed, run.requests_per_s, run.ttft_s, run.goodput_requests_per_s) == (2, 0.0, None, None)


@pytest.mark.parametrize(
    ("limits", "is_met"),
    [
        (["ttft_ms:500", "tpot_ms:500", "latency_ms:2500", "normalized_latency_ms:500", "itl_ms:1000"], True),
        (["ttft_ms:499"], False),
        (["tpot_ms:499"], False),
        (["latency_ms:2499"], False),
        (["normalized_latency_ms:499"], False),
        (["itl_ms:999"], False),
    ],
)
def test_limits_hold_up_to_equality(limits: list[str], is_met: bool) -> None:
    assert meets(FAST, parse_limits(limits)) is is_met
    assert not meets(FAILED, parse_limits(limits))


def test_a_limit_on_what_was_not_measured_is_met() -> None:
    assert meets(SLOW, parse_limits(["tpot_ms:1", "itl_ms:1"]))


@pytest.mark.parametrize("text", ["ttft:5", "ttft_ms", "ttft_ms:x", "ttft_ms:0", "ttft_ms:nan", ":5"])
def test_bad_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="goodput"):
        parse_limits([text])


@pytest.mark.parametrize(
    "fields",
    [{"num_requests": 0}, {"repeats": 0}, {"num_warmup": -1}, {"seed": -1}],
    ids=lambda fields: next(iter(fields)),
)
def test_bad_bench_options_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        BenchConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"request_rate": 0.0}, {"request_rate": math.nan}, {"max_concurrency": 0}])
def test_bad_load_options_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        LoadConfig(**fields)


# --- record --------------------------------------------------------------------------------------------------------


def test_record_has_everything_and_is_plain_json(tmp_path: Path) -> None:
    runs = [measure([FAST, FAILED], 4.0, {}), measure([FAST, SLOW], 5.0, {})]
    record = make_record(
        "serve", model={"name": "m"}, plan=None, workload=BenchConfig(), config=LoadConfig(), repeats=runs
    )
    write_record(record, tmp_path / "new" / "run.json")
    document = json.loads((tmp_path / "new" / "run.json").read_text())
    assert document["benchmark"] == "serve" and document["model"] == {"name": "m"}
    assert document["machine"]["cpu_name"] and document["software"]["packages"]["torch"]
    assert document["workload"]["workload"] == "128/128"
    assert document["config"]["request_rate"] is None  # JSON has no infinity.
    assert [run["num_failed"] for run in document["repeats"]] == [1, 0]
    assert document["repeats"][0]["ttft_s"] == {"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5}


def test_table_shows_spread_failures_and_short_requests() -> None:
    table = format_table([measure([FAST, FAILED], 4.0, {}), measure([FAST, SLOW], 5.0, {})])
    assert "total tokens/s" in table and "(3.75 to 9.20)" in table
    assert "repeat 0: 1 failed: HTTP 503: full" in table
    assert "repeat 1: 1 requests gave fewer tokens than asked for" in table
    assert "goodput" not in table


def test_git_revision_names_a_commit_or_nothing() -> None:
    revision = git_revision()
    assert revision is None or len(revision.removesuffix("-dirty")) == 40


def test_no_driver_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert detect_gpus() == ()


# --- offline -------------------------------------------------------------------------------------------------------


class FakeLLM:
    """Gives every request its tokens at known times; a prompt of one token fails."""

    prompts: list[list[int]]
    facts = stub_facts(
        model_type="fake",
        vocab_size=50,
        max_model_len=99,
        num_pages=1,
        max_batch_tokens=1,
        max_num_seqs=1,
        plan="sequential",
    )

    def __init__(self, **fields: Any) -> None:
        FakeLLM.prompts = []

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def observe(self, observer: Observer | None) -> None:
        pass

    def generate(
        self, prompts: list[list[int]], params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        FakeLLM.prompts += prompts
        time.sleep(0.01)
        return [self._answer(*pair) for pair in zip(prompts, params, strict=True)]

    def _answer(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        assert params.ignore_eos and params.is_greedy and params.max_tokens is not None
        is_bad = len(prompt) == 1
        completion = CompletionOutput(
            index=0,
            token_ids=[] if is_bad else [7] * params.max_tokens,
            finish_reason=FinishReason.ERROR if is_bad else FinishReason.LENGTH,
        )
        times = RequestMetrics(arrival_s=10.0, first_token_s=11.0, last_token_s=13.0, finished_s=13.0)
        return RequestOutput(
            request_id="0",
            prompt=None,
            prompt_token_ids=prompt,
            outputs=[completion],
            metrics=times,
            error="broken" if is_bad else None,
        )


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nanoflow.engine.llm")
    vars(module)["LLM"] = FakeLLM
    monkeypatch.setitem(sys.modules, "nanoflow.engine.llm", module)


@pytest.mark.usefixtures("fake_llm")
def test_throughput_in_process() -> None:
    config = ThroughputConfig(workload="6/3", num_requests=4, repeats=2, num_warmup=1, bounds=False)
    record = offline.run_throughput(EngineConfig(load_format="random"), config)
    assert len(FakeLLM.prompts) == 1 + 2 * 4
    assert record.model["weights"] == "random" and record.model["model_type"] == "fake"
    assert record.plan == "sequential"
    for run in record.repeats:
        assert (run.num_completed, run.num_output_tokens, run.num_prompt_tokens) == (4, 12, 24)
        assert run.duration_s >= 0.01
        assert run.ttft_s is not None and run.ttft_s.p50 == 1.0
        assert run.tpot_s is not None and run.tpot_s.p50 == 1.0
        assert run.itl_s is None
        assert run.share_of_serial is None and run.steady is None and run.no_steady_reason is not None


@pytest.mark.usefixtures("fake_llm")
def test_throughput_counts_failures() -> None:
    config = ThroughputConfig(workload="1/3", num_requests=2, num_warmup=0, bounds=False)
    record = offline.run_throughput(EngineConfig(), config)
    assert record.repeats[0].errors == {"broken": 2}


# --- online --------------------------------------------------------------------------------------------------------

FIRST_TOKEN_S, GAP_S = 0.06, 0.02


class CompletionServer(BaseHTTPRequestHandler):
    """Streams one event a token after FIRST_TOKEN_S, GAP_S apart; the first token of the prompt chooses a failure."""

    lock = threading.Lock()
    bodies: list[dict[str, Any]]
    in_flight: int
    most_in_flight: int

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "served"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        kind = type(self)
        with kind.lock:
            kind.bodies.append(body)
            kind.in_flight += 1
            kind.most_in_flight = max(kind.most_in_flight, kind.in_flight)
        self._answer(body)
        with kind.lock:
            kind.in_flight -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        match body["prompt"]:
            case [429, *_]:
                self.send_response(429)
                self.end_headers()
                self.wfile.write(b"too many")
                return
            case [500, *_]:
                self._events([{"error": {"message": "died"}}])
            case [501, *_]:
                self._events([{"choices": [{"text": "a", "finish_reason": None}]}])
            case _:
                self._tokens(body["max_tokens"])

    def _tokens(self, num_tokens: int) -> None:
        time.sleep(FIRST_TOKEN_S)
        self._events([{"choices": [{"text": "a", "finish_reason": None}]}])
        for _ in range(num_tokens - 1):
            time.sleep(GAP_S)
            self.wfile.write(b'data: {"choices": [{"text": "", "finish_reason": null}]}\n\n')
        self.wfile.write(b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n')
        usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": num_tokens}}
        self.wfile.write(b"data: %s\n\ndata: [DONE]\n\n" % json.dumps(usage).encode())

    def _events(self, events: list[dict[str, Any]]) -> None:
        self.send_response(200)
        self.end_headers()
        for event in events:
            self.wfile.write(b"data: %s\n\n" % json.dumps(event).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server_url() -> Iterator[str]:
    CompletionServer.bodies, CompletionServer.in_flight, CompletionServer.most_in_flight = [], 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), CompletionServer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_serve_measures_streams(server_url: str) -> None:
    load = LoadConfig(url=server_url, api_key="secret", vocab_size=100)
    config = BenchConfig(workload="4/5", num_requests=3, repeats=2, num_warmup=1, goodput=["ttft_ms:1000"])
    record = clients.run_serve(load, config)
    assert len(CompletionServer.bodies) == 1 + 2 * 3
    body = CompletionServer.bodies[-1]
    assert (body["model"], body["max_tokens"], body["ignore_eos"], len(body["prompt"])) == ("served", 5, True, 4)
    assert record.model == {"name": "served"} and record.config.api_key is None
    run = record.repeats[1]
    assert (run.num_completed, run.num_output_tokens, run.num_short) == (3, 15, 0)
    assert run.ttft_s is not None and FIRST_TOKEN_S <= run.ttft_s.p50 < FIRST_TOKEN_S + 0.5
    assert run.itl_s is not None and GAP_S * 0.8 <= run.itl_s.mean < GAP_S + 0.5
    assert run.tpot_s is not None and run.tpot_s.mean == pytest.approx(run.itl_s.mean)
    assert run.latency_s is not None and run.latency_s.p50 >= FIRST_TOKEN_S + 4 * GAP_S
    assert run.goodput_requests_per_s == pytest.approx(run.requests_per_s)


def test_serve_spreads_arrivals(server_url: str) -> None:
    load = LoadConfig(url=server_url, model="m", request_rate=20.0, vocab_size=100)
    config = BenchConfig(workload="1/1", num_requests=6, num_warmup=0, seed=1)
    run = clients.run_serve(load, config).repeats[0]
    assert run.duration_s >= draw_arrivals(6, 20.0, 1)[-1] + FIRST_TOKEN_S
    assert run.ttft_s is not None and run.ttft_s.p50 < FIRST_TOKEN_S + 0.5


def test_serve_limits_concurrency(server_url: str) -> None:
    load = LoadConfig(url=server_url, max_concurrency=2, vocab_size=100)
    run = clients.run_serve(load, BenchConfig(workload="1/2", num_requests=6, num_warmup=0)).repeats[0]
    assert CompletionServer.most_in_flight == 2
    # A request arrives when it can be sent, so that waiting for a free client does not count.
    assert run.ttft_s is not None and run.ttft_s.p50 < run.duration_s / 2


def test_serve_counts_every_kind_of_failure(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        plain = make_requests(*args, **kwargs)
        firsts = (429, 429, 500, 501, 1)
        return [
            dataclasses.replace(request, prompt_token_ids=[first]) for request, first in zip(plain, firsts, strict=True)
        ]

    monkeypatch.setattr(clients, "make_requests", failing)
    config = BenchConfig(workload="1/2", num_requests=5, num_warmup=0)
    run = clients.run_serve(LoadConfig(url=server_url), config).repeats[0]
    assert (run.num_completed, run.num_failed) == (1, 4)
    assert run.errors == {
        "HTTP 429: too many": 2,
        "error in the stream: {'message': 'died'}": 1,
        "the stream ended without tokens or without usage": 1,
    }


@pytest.mark.parametrize("num_failed", [0, 2])
def test_a_failed_request_is_a_failed_run(
    num_failed: int, server_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        firsts = [429] * num_failed + [1] * (3 - num_failed)
        plain = zip(make_requests(*args, **kwargs), firsts, strict=True)
        return [dataclasses.replace(request, prompt_token_ids=[first]) for request, first in plain]

    monkeypatch.setattr(clients, "make_requests", failing)
    argv = ["bench", "serve", "--url", server_url, "--workload", "1/2", "--num-requests", "3", "--num-warmup", "0"]
    assert main([*argv, "--repeats", "2"]) == (1 if num_failed else 0)
    shown = capsys.readouterr()
    assert shown.err == ("nanoflow: error: 4 of 6 requests failed\n" if num_failed else "")
    assert ("HTTP 429: too many" in shown.out) == bool(num_failed)


def test_serve_without_a_server_is_one_error() -> None:
    for model in (None, "m"):
        with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9/v1"):
            clients.run_serve(LoadConfig(url="http://127.0.0.1:9/v1", model=model), BenchConfig(num_requests=1))
