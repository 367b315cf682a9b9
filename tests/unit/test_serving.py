"""Load over HTTP: reading answers, clients in several processes, `benchmarks/engine/serving.py` with a fake server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.common.server_process import ServerFailed, free_port, started, usage_of
from benchmarks.engine import serving, serving_document

from nanoflow.bench.client import ExchangeFailed, Pieces, exchange, post, read_address, read_answer, read_events
from nanoflow.bench.clients import Clients
from nanoflow.bench.offline import without_impossible_energy
from nanoflow.bench.online import Sent, body_of, record_of
from nanoflow.bench.options import BenchConfig, LoadConfig
from nanoflow.config import ConfigError
from nanoflow.run_metrics import RequestRecord, distribution, measure
from nanoflow.workload import BenchRequest
from tests.unit.test_bench import FAST, server_url

__all__ = ["server_url"]
ROOT = Path(__file__).resolve().parents[2]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUEST = BenchRequest(prompt_token_ids=[3, 4], num_output_tokens=5, arrival_s=0.0)
SENT = RequestRecord(num_prompt_tokens=2, num_requested_tokens=5, arrival_s=1.0)


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def _event(text: str, reason: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}\n\ndata: [DONE]\n\n'
STREAM = [_chunk(_event("a")), _chunk(_event("b") + _event("c")), _chunk(_event("", "length")), _chunk(USAGE)]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_events_are_the_same_however_the_bytes_come(size: int) -> None:
    raw = CHUNKED + b"".join(STREAM) + b"0\r\n\r\n"
    data = [raw[place : place + size] for place in range(0, len(raw), size)]
    answer = read_answer(Pieces(data=data, times_s=[float(place) for place in range(len(data))]))
    events = list(read_events(answer))
    assert [json.loads(event)["choices"][0]["text"] for _, event in events[:4]] == ["a", "b", "c", ""]
    end_of_first = len(CHUNKED) + len(STREAM[0]) - 2
    assert events[0][0] == (end_of_first - 1) // size, "the time of the piece that completed it"
    assert len(events) == 5


def test_tokens_that_come_together_have_one_arrival() -> None:
    data = [CHUNKED + STREAM[0], STREAM[1], b"".join(STREAM[2:]) + b"0\r\n\r\n"]
    record = record_of(Sent(request=SENT, pieces=Pieces(data=data, times_s=[2.0, 5.0, 5.5])), is_stream=True)
    assert (record.first_token_s, record.finished_s, record.num_output_tokens) == (2.0, 5.0, 4)
    assert record.num_prompt_tokens == 9, "as the server counted them"
    assert max(record.gaps_s) == 3.0 and record.error is None


def test_a_role_is_no_token() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]
    events = [b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n" for delta in deltas]
    data = [CHUNKED, *map(_chunk, events), _chunk(USAGE) + b"0\r\n\r\n"]
    pieces = Pieces(data=data, times_s=[1.0, 2.0, 3.0, 4.0, 5.0])
    record = record_of(Sent(request=SENT, pieces=pieces), is_stream=True)
    assert (record.first_token_s, record.finished_s) == (3.0, 4.0)


def test_an_answer_in_one_piece_has_no_first_token() -> None:
    body = b'{"choices": [{"text": "abc"}], "usage": {"prompt_tokens": 2, "completion_tokens": 5}}'
    data = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body]
    record = record_of(Sent(request=SENT, pieces=Pieces(data=data, times_s=[2.0, 3.0])), is_stream=False)
    assert (record.first_token_s, record.finished_s, record.error) == (None, 3.0, None)
    run = measure([record], 2.0, {})
    assert run.ttft_s is None and run.tpot_s is None and run.longest_gap_s is None and run.latency_s is not None


@pytest.mark.parametrize(
    "raw", [b"", CHUNKED + STREAM[0], CHUNKED + STREAM[0][:-9], b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"]
)
def test_an_answer_that_breaks_off_is_a_failure(raw: bytes) -> None:
    with pytest.raises(ExchangeFailed):
        read_answer(Pieces(data=[raw] if raw else [], times_s=[1.0] if raw else []))


def test_a_silent_server_is_a_failure() -> None:
    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        address = read_address(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        with pytest.raises(ExchangeFailed, match="nothing came for"):
            await exchange(address, post(address, "completions", b"{}", {}), 0.1)
        server.close()

    asyncio.run(ask())


def test_bodies_have_what_is_asked_for_and_nothing_else() -> None:
    plain = body_of(LoadConfig(ignore_eos=False), BenchConfig(), "m", REQUEST)
    assert plain.keys() == {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    config = BenchConfig(temperature=0.8, top_k=50, logprobs=5, min_tokens=16)
    chat = body_of(LoadConfig(api="chat", prompts="text", stream=False), config, "m", REQUEST)
    assert chat["messages"][0]["role"] == "user" and len(chat["messages"][0]["content"].split()) == 2
    assert (chat["top_k"], chat["logprobs"], chat["top_logprobs"], chat["min_tokens"]) == (50, True, 5, 5)
    assert "stream" not in chat and "ignore_eos" not in chat, "an end that is held back is not ignored"
    with pytest.raises(ConfigError, match="no token ids"):
        LoadConfig(api="chat")


def test_the_longest_gap_is_that_of_each_request() -> None:
    run = measure([FAST, FAST], 5.0, {})
    assert run.longest_gap_s == distribution([1.0, 1.0])


def test_energy_above_the_limit_of_the_card_is_dropped() -> None:
    run = measure([FAST], 1.0, {}, energy_j=700.0)
    assert without_impossible_energy(run, 700.0).energy_per_token_j == run.energy_per_token_j
    dropped = without_impossible_energy(run, 699.0)
    assert dropped.energy_per_token_j is None and "700.0 W" in (dropped.energy_dropped or "")


def test_clients_in_several_processes_share_the_requests(server_url: str) -> None:
    load = LoadConfig(url=server_url, model="m", num_processes=2, request_rate=50.0)
    requests = [BenchRequest(prompt_token_ids=[2] * size, num_output_tokens=size, arrival_s=0.01) for size in (1, 2, 3)]
    with Clients(2) as clients:
        for _ in range(2):
            driven = clients.drive(load, BenchConfig(), "m", requests)
            assert [record.num_output_tokens for record in driven.records] == [1, 2, 3], "in their order"
            assert len(driven.client_cpu_s) == 2 and 0 < driven.busiest_client < 1.5
            assert all(record.error is None for record in driven.records)


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Other tests run what ignores Ctrl-C in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_clients_at_once_and_only_through_their_parent(server_url: str) -> None:
    load = LoadConfig(url=server_url, model="m", num_processes=2)
    short = [BenchRequest(prompt_token_ids=[2], num_output_tokens=1, arrival_s=0.0)] * 2
    late = [BenchRequest(prompt_token_ids=[2], num_output_tokens=1, arrival_s=60.0)] * 2
    clients = Clients(2)
    with pytest.raises(KeyboardInterrupt), clients:
        # As a terminal does, while the processes still start and after that.
        for _ in range(2):
            for process in clients._processes:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGINT)
            driven = clients.drive(load, BenchConfig(), "m", short)
            assert all(record.error is None for record in driven.records)
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        start_s = time.monotonic()
        clients.drive(load, BenchConfig(), "m", late)
    assert time.monotonic() - start_s < 4.0, "they are not waited for"
    for process in clients._processes:
        process.join(5)
        assert process.exitcode is not None


FAKE_SERVER = """
import sys, time
from http.server import ThreadingHTTPServer
from tests.unit.test_bench import CompletionServer

class Server(CompletionServer):
    bodies, in_flight, most_in_flight = [], 0, 0
    def do_GET(self):
        if self.path == "/metrics":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"vllm:num_requests_running 0\\nvllm:num_requests_waiting %s\\n" % LEFT)
            return
        super().do_GET()

LEFT = sys.argv[2].encode()
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "fake.py"
    path.write_text(FAKE_SERVER)
    yield f"{sys.executable} {path} {{port}}"


def _serving(path: Path, *options: str) -> int:
    return serving.main(["--workload", "4/5", "--clients", "1", "--num-warmup", "1", "--json", str(path), *options])


def test_a_server_is_started_loaded_and_ended(
    fake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setattr(serving, "_SETTLE_S", 0.0)
    path = tmp_path / "serving.json"
    loads = ("--rates", "inf:3", "50:2", "--repeats", "2", "--temperature", "0.7")
    assert _serving(path, "--server-command", f"{fake} 0", *loads) == 0
    document: dict[str, Any] = json.loads(path.read_text())
    assert [load["name"] for load in document["loads"]] == ["4/5 x 3 at once", "4/5 x 2 at 50/s"]
    assert document["server"]["start_s"] > 0 and document["server"]["model"] == "served"
    run = document["loads"][0]["repeats"][1]
    assert (run["num_completed"], run["num_output_tokens"], run["left_over"]) == (3, 15, {})
    assert run["longest_gap_s"]["p99"] > 0 and run["server_cpu_s_per_output_token"] >= 0
    assert document["loads"][0]["workload"]["temperature"] == 0.7
    assert "TTFT p50" in capsys.readouterr().out
    document["server"]["model"] = "preset:llama-3-8b"
    for load in document["loads"]:
        load["workload"] |= {"workload": "trace:sharegpt.csv", "num_requests": 1200}
    document["loads"][1]["load"]["request_rate"] = 20.0
    text, rows = rendered(document, "serving_llama-3-8b", tmp_path / "results", monkeypatch)
    (at_once,) = (line for line in text.splitlines() if line.startswith("| trace:sharegpt.csv at once"))
    assert "temperature 0.7" in at_once and "x vLLM 0.26.0 (20,556" in at_once and "| 10,256, 408 |" in at_once
    assert "ms (1,200 requests, 2 repeats; vLLM 0.26.0: 94 and 64 ms)" in rows[1][1], "at 20 requests/s"


def rendered(
    document: dict[str, Any], name: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[tuple[str, ...]]]:
    """The page and the rows of README with a record, beside the peers."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import benchmarks_page
    import records

    results.mkdir()
    (results / "peers.json").write_bytes((ROOT / "benchmarks/results/peers.json").read_bytes())
    (results / f"{name}.json").write_text(json.dumps(document))
    return benchmarks_page.page(results, results), list(records.readme_rows(results))


def test_what_a_server_keeps_after_a_load_is_told(
    fake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setattr(serving, "_IDLE_WITHIN_S", 0.2)
    assert _serving(tmp_path / "s.json", "--server-command", f"{fake} 2", "--rates", "inf:1") == 1
    assert "LEFT OVER: {'num_requests_waiting': 2}" in capsys.readouterr().out


def test_a_server_that_runs_is_measured_by_its_address(server_url: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    assert _serving(path, "--base-url", server_url, "--rates", "inf:2", "--server-pid", str(os.getpid())) == 0
    (load,) = json.loads(path.read_text())["loads"]
    assert load["repeats"][0]["left_over"] is None, "it has no gauges"
    assert load["repeats"][0]["server_rss_bytes"] > 1e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "20"], "write 20:1000"),
        (["--rates", "x:5"], "is no number of requests/s"),
        (["--rates", "0:5"], "request_rate must be positive"),
        (["--base-url", "http://x/v1", "--in-process"], "is a server that runs already"),
        (["--server-command", "serve"], "must have {port}"),
        (["--top-p", "2"], "top_p"),
    ],
)
def test_loads_that_make_no_sense_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _serving(tmp_path / "s.json", *options)
    assert message in capsys.readouterr().err


def test_http_over_in_process_compares_the_same_requests() -> None:
    work: dict[str, Any] = {"workload": "4/5", "num_requests": 3, "json": None, "repeats": 2, "temperature": 0.7}
    load: dict[str, Any] = {"name": "n", "workload": work, "load": {"request_rate": float("inf")}}
    document: dict[str, Any] = {
        "loads": [{**load, "repeats": [{"total_tokens_per_s": rate} for rate in (80.0, 90.0, 100.0)]}],
        "in_process": [{"workload": {**work, "text": True}, "repeats": [{"total_tokens_per_s": 100.0}]}],
    }
    assert serving_document.ratios(document) == {"n": pytest.approx(0.9)}
    document["in_process"][0]["workload"] = {**work, "temperature": 0.0}
    assert serving_document.ratios(document) == {}


def test_a_server_that_ends_before_it_answers_is_one_error() -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(ServerFailed, match="ended with status 3"), started(command, free_port(), 30.0):
        pass


def test_usage_is_that_of_the_whole_tree() -> None:
    before = usage_of(os.getpid())
    end_s = time.process_time() + 0.1
    while time.process_time() < end_s:
        pass
    after = usage_of(os.getpid())
    assert after.cpu_s - before.cpu_s >= 0.08 and after.rss_bytes > 0
