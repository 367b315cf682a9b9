"""Several front ends on one engine and one port: answers, sums, and everything that can end one of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_engine import CRASHING, SLOW
from tests.server_process import ServerProcess, launch
from tests.toy_models import write_toy_model

COMMAND = (sys.executable, "-m", "tests.fake_serve")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_model(tmp_path_factory.mktemp("model")))


@contextmanager
def family(model: str, count: int, *arguments: str) -> Iterator[ServerProcess]:
    """A server of so many front ends around the fake engine; nothing of it may be left at the end."""
    server = launch(
        *COMMAND, model, "--served-model-name", "toy", "--api-servers", str(count), "--port", "0", *arguments
    )
    members: list[int] = []
    try:
        server.wait_ready(60.0)
        members = children(server.process.pid)
        yield server
    finally:
        members += children(server.process.pid)
        server.stop()
    wait_until(lambda: not any(map(is_running, members)))


def children(pid: int) -> list[int]:
    if not is_running(pid):
        return []
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def front_ends(server: ServerProcess) -> list[int]:
    """Process ids of the further front ends."""
    return [pid for pid in children(server.process.pid) if "front_end" in Path(f"/proc/{pid}/cmdline").read_text()]


def wait_until(is_true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.02)


def complete(root_url: str, **fields: Any) -> Any:
    """An answer over a connection of its own, so that any of the front ends may give it."""
    answer = httpx.post(f"{root_url}/v1/completions", json={"prompt": "hello world", **fields}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def metric(root_url: str, name: str) -> float:
    text = httpx.get(f"{root_url}/metrics", timeout=30).text
    lines = re.findall(rf"^nanoflow:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert lines, name
    return sum(map(float, lines))


def num_running(root_url: str) -> int:
    return int(httpx.get(f"{root_url}/health", timeout=30).json()["num_running"])


def connections(server: ServerProcess) -> Counter[int]:
    """Open connections at the server's port by process."""
    port = int(server.root_url.rpartition(":")[2])
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    inodes = {line.split()[9] for line in lines if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "01"}
    counts: Counter[int] = Counter()
    for pid in (server.process.pid, *front_ends(server)):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                counts[pid] += str(fd.readlink()).removeprefix("socket:[").removesuffix("]") in inodes
            except FileNotFoundError:
                continue
    return counts


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_gives_the_same_answers_and_sums(model: str, count: int) -> None:
    prompts = [f"hello {number}!" for number in range(24)]
    with family(model, count) as server, ThreadPoolExecutor(8) as pool:
        assert len(front_ends(server)) == count - 1
        answers = list(pool.map(lambda prompt: complete(server.root_url, prompt=prompt, max_tokens=12), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            # The fake engine repeats the prompt.
            assert prompt.startswith(answer["choices"][0]["text"][: len(prompt)])
            assert answer["usage"]["completion_tokens"] == 12
        for _ in range(2 * count):
            assert metric(server.root_url, "generation_tokens_total") == 24 * 12
            assert metric(server.root_url, "time_to_first_token_seconds_count") == 24
            assert metric(server.root_url, "inter_token_latency_seconds_count") == 24 * 11
            assert metric(server.root_url, "request_success_total") == 24
            # Each iteration is counted by one front end alone, with all its tokens.
            assert metric(server.root_url, "iteration_tokens_total_sum") == 24 * 12
            assert num_running(server.root_url) == 0


def test_a_burst_of_connections_is_spread_over_all(model: str) -> None:
    with family(model, 3) as server:
        host, port = server.root_url.removeprefix("http://").split(":")
        sockets = [socket.create_connection((host, int(port))) for _ in range(300)]
        try:
            wait_until(lambda: connections(server).total() >= 300)
            assert min(connections(server)[pid] for pid in (server.process.pid, *front_ends(server))) >= 50
        finally:
            for one in sockets:
                one.close()


def test_clients_that_leave_one_leave_the_others_alone(model: str) -> None:
    with family(model, 2) as server, ThreadPoolExecutor(40) as pool:
        body = {"prompt": [SLOW, 5], "max_tokens": 100, "ignore_eos": True, "stream": True}

        def read(is_patient: bool) -> int:
            with httpx.stream("POST", f"{server.root_url}/v1/completions", json=body, timeout=60) as answer:
                lines = (line for line in answer.iter_lines() if line)
                next(lines)
                return sum(1 for _ in lines) if is_patient else 0

        impatient = [pool.submit(read, False) for _ in range(16)]
        patient = [pool.submit(complete, server.root_url, prompt=[SLOW, 5], max_tokens=20, ignore_eos=True)]
        assert all(task.result() == 0 for task in impatient)
        assert all(task.result()["usage"]["completion_tokens"] == 20 for task in patient)
        for _ in range(4):
            wait_until(lambda: num_running(server.root_url) == 0, timeout_s=1.0)


def test_a_killed_front_end_is_replaced_and_its_requests_are_dropped(model: str) -> None:
    with family(model, 2) as server:
        (victim,) = front_ends(server)
        for _ in range(8):
            complete(server.root_url, max_tokens=2)
        body = {"prompt": [SLOW, 5], "max_tokens": 200, "ignore_eos": True, "stream": True}
        client = httpx.Client(base_url=server.root_url, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
        streams = [client.stream("POST", "/v1/completions", json=body) for _ in range(24)]
        readers = [stream.__enter__().iter_lines() for stream in streams]
        assert all(next(reader) for reader in readers)
        num_lost = connections(server)[victim]
        assert 0 < num_lost < 24
        wait_until(lambda: num_running(server.root_url) == 24)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: num_running(server.root_url) == 24 - num_lost, timeout_s=5.0)
        wait_until(lambda: bool(front_ends(server)) and front_ends(server) != [victim])
        # Connections to its socket wait for the new process; none is refused.
        for _ in range(16):
            complete(server.root_url, max_tokens=2)
        assert metric(server.root_url, "request_success_total") >= 24
        client.close()
        wait_until(lambda: num_running(server.root_url) == 0)
        assert any("was ended by SIGKILL" in line for line in server.lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_streams_and_processes(model: str, number: signal.Signals) -> None:
    body = {"prompt": [SLOW, 5], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with family(model, 3) as server, httpx.Client(base_url=server.root_url, timeout=30) as client:
        streams = [client.stream("POST", "/v1/completions", json=body) for _ in range(12)]
        readers = [stream.__enter__().iter_lines() for stream in streams]
        assert all(next(reader) for reader in readers)
        server.process.send_signal(number)
        for reader in readers:
            *_, last, done = [line for line in reader if line]
            assert done == "data: [DONE]"
            assert "error" in json.loads(last.removeprefix("data: "))
        assert server.stop() == 0
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


def test_nothing_is_left_when_the_main_process_is_killed(model: str) -> None:
    with family(model, 3) as server:
        body = {"prompt": [SLOW, 5], "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.root_url}/v1/completions", json=body, timeout=30) as answer:
            next(answer.iter_lines())
            server.process.kill()
            server.process.wait()


def test_a_dead_engine_ends_all_with_its_reason(model: str) -> None:
    with family(model, 3) as server:
        answer = httpx.post(f"{server.root_url}/v1/completions", json={"prompt": [CRASHING]}, timeout=30)
        assert answer.status_code == 503
        assert server.process.wait(20) == 1
        wait_until(
            lambda: any("the engine died: RuntimeError: the fake engine crashes" in line for line in server.lines)
        )


def test_a_taken_port_is_refused_by_several_too(model: str) -> None:
    with family(model, 2) as server:
        port = server.root_url.rpartition(":")[2]
        second = launch(*COMMAND, model, "--api-servers", "2", "--port", port)
        assert second.process.wait(60) == 1
        wait_until(lambda: bool(second.lines))
        assert second.lines == [f"nanoflow: error: cannot listen at 127.0.0.1:{port}: Address already in use\n"]


def test_a_model_that_cannot_be_loaded_is_one_line(model: str) -> None:
    server = launch(*COMMAND, "/nowhere", "--api-servers", "3", "--port", "0")
    assert server.process.wait(60) == 1
    wait_until(lambda: bool(server.lines))
    assert [line for line in server.lines if line.startswith("nanoflow: error: ")] == server.lines
