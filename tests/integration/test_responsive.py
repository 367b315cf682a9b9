"""/health is answered while everything else is busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest
from benchmarks.front_end import ITERATION_S

from nanoflow.server.bodies import decode
from tests.server_process import ServerProcess

NUM_STREAMS = 64
MEASURE_S = 4.0
# A front end that parses or tokenises on its loop takes several times as long with this load.
MAX_P90_S = 0.35
MIB = 1 << 20


@contextmanager
def text_server() -> Iterator[ServerProcess]:
    """One front end, the embedded model's tokenizer, and an engine that makes tokens as fast as it can."""
    flags = ("--api-servers", "1", "--port", "0", "--served-model-name", "toy")
    command = (sys.executable, "-m", "tests.fake_serve", "default", "--engine-module", "benchmarks.front_end_engine")
    environment = {**os.environ, ITERATION_S: "0.002"}
    process = subprocess.Popen(
        (*command, *flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    server = ServerProcess(process)
    server.watch()
    try:
        server.wait_ready(120.0)
        yield server
    finally:
        server.stop()


def until(end_s: float, work: Callable[[], Any]) -> int:
    count = 0
    while time.monotonic() < end_s:
        work()
        count += 1
    return count


@pytest.mark.timing
def test_health_is_answered_while_everything_else_is_busy() -> None:
    with text_server() as server, ThreadPoolExecutor(4) as pool, httpx.Client(base_url=server.root_url) as http:
        url = f"{server.root_url}/v1/completions"
        body = {"prompt": "hello", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        command = (sys.executable, "-m", "benchmarks.front_end", "--streams", str(NUM_STREAMS))
        client = subprocess.Popen((*command, "--client", url, json.dumps(body)), stdout=subprocess.DEVNULL)
        try:
            while http.get("/health").json()["num_running"] < NUM_STREAMS:
                time.sleep(0.02)
            end_s = time.monotonic() + MEASURE_S
            # More tokens than the context has, so that they are parsed and checked and then refused.
            ids = json.dumps({"prompt": [index % 1000 for index in range(8 * MIB // 5)]}).encode()
            text = json.dumps({"prompt": "a long text " * 20_000}).encode()
            headers = {"content-type": "application/json"}

            def post(content: bytes) -> None:
                httpx.post(url, content=content, headers=headers, timeout=120)

            loads = [pool.submit(until, end_s, partial(post, content)) for content in (ids, ids, text)]
            latencies_s = []
            while time.monotonic() < end_s:
                start_s = time.perf_counter()
                assert http.get("/health", timeout=60).status_code == 200
                latencies_s.append(time.perf_counter() - start_s)
                time.sleep(0.01)
            assert all(load.result() for load in loads)
        finally:
            client.kill()
            client.wait()
    latencies_s.sort()
    print([round(latencies_s[int(len(latencies_s) * part)], 3) for part in (0.5, 0.9, 0.99)], len(latencies_s))
    assert latencies_s[int(len(latencies_s) * 0.9)] < MAX_P90_S


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": [1, 2.5, -3e2, true, null, "\\u00e9\\n"], "a": {"b": []}}',
        b'{"a": NaN}',
        b'"\\ud800"',
        b"[" + b"9" * 400 + b"]",
        '"\N{GRINNING FACE}"'.encode("utf-16"),
        b"18446744073709551616",
    ],
)
def test_long_bodies_are_decoded_as_short_ones(content: bytes) -> None:
    assert repr(decode(content)) == repr(json.loads(content))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[1,]"])
def test_what_is_no_json_is_told_alike(content: bytes) -> None:
    with pytest.raises(ValueError) as slow:
        json.loads(content)
    with pytest.raises(ValueError) as fast:
        decode(content)
    assert str(fast.value) == str(slow.value)
