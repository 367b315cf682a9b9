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
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

from tests.all_cases import part
from tests.fake_engine import CRASHING, SLOW
from tests.server_process import ServerProcess, launch
from tests.toy_models import write_toy_model

COMMAND = (sys.executable, "-m", "tests.fake_serve")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_model(tmp_path_factory.mktemp("model")))


@contextmanager
def family(model: str, count: int) -> Iterator[ServerProcess]:
    """A server of so many front ends around the fake engine; nothing of it may be left at the end."""
    flags = ("--served-model-name", "toy", "--api-servers", str(count), "--port", "0")
    with TemporaryDirectory() as folder:
        server = launch(*COMMAND, model, *flags, TMPDIR=folder)
        members: list[int] = []
        try:
            server.wait_ready(60.0)
            members = children(server.process.pid)
            yield server
        finally:
            members += children(server.process.pid)
            server.stop()
        wait_until(lambda: not any(map(is_running, members)))
        assert list(Path(folder).iterdir()) == []


@pytest.fixture(scope="module")
def trio(model: str) -> Iterator[ServerProcess]:
    """A server of three, for tests that leave it as it was."""
    with family(model, 3) as server:
        yield server


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


def test_any_front_end_shows_the_page_and_the_state_of_all(trio: ServerProcess) -> None:
    complete(trio.root_url, max_tokens=3)
    wanted = metric(trio.root_url, "generation_tokens_total")
    for _ in range(6):
        with httpx.Client(base_url=trio.root_url) as http:
            assert "page/app.js" in http.get("/", headers={"accept": "text/html"}).text
            assert http.get("/status").json()["generation_tokens"] == wanted


SUMS = {
    "generation_tokens_total": 24 * 12,
    "time_to_first_token_seconds_count": 24,
    "inter_token_latency_seconds_count": 24 * 11,
    "request_success_total": 24,
    # Each iteration is counted by one front end alone, with all its tokens.
    "iteration_tokens_total_sum": 24 * 12,
}


def check_answers_and_sums(server: ServerProcess, count: int) -> None:
    prompts = [f"hello {number}!" for number in range(24)]
    before = {name: metric(server.root_url, name) for name in SUMS}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: complete(server.root_url, prompt=prompt, max_tokens=12), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        # The fake engine repeats the prompt.
        assert prompt.startswith(answer["choices"][0]["text"][: len(prompt)])
        assert answer["usage"]["completion_tokens"] == 12
    for _ in range(2 * count):  # whichever is asked
        assert {name: metric(server.root_url, name) - before[name] for name in SUMS} == SUMS
        assert num_running(server.root_url) == 0


@pytest.mark.parametrize("count", part([1], of=[1, 2]))
def test_any_number_gives_the_same_answers_and_sums(model: str, count: int) -> None:
    with family(model, count) as server:
        assert len(front_ends(server)) == count - 1
        check_answers_and_sums(server, count)


def test_three_give_the_same_answers_and_sums(trio: ServerProcess) -> None:
    assert len(front_ends(trio)) == 2
    check_answers_and_sums(trio, 3)


def test_a_burst_of_connections_is_spread_over_all(trio: ServerProcess) -> None:
    host, port = trio.root_url.removeprefix("http://").split(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(300)]
    try:
        wait_until(lambda: connections(trio).total() >= 300)
        assert min(connections(trio)[pid] for pid in (trio.process.pid, *front_ends(trio))) >= 50
    finally:
        for one in sockets:
            one.close()


def test_clients_that_leave_one_leave_the_others_alone(trio: ServerProcess) -> None:
    body = {"prompt": [SLOW, 5], "max_tokens": 200, "ignore_eos": True, "stream": True}

    def leave() -> None:
        with httpx.stream("POST", f"{trio.root_url}/v1/completions", json=body, timeout=60) as answer:
            next(line for line in answer.iter_lines() if line)

    with ThreadPoolExecutor(20) as pool:
        patient = pool.submit(complete, trio.root_url, prompt=[SLOW, 5], max_tokens=20, ignore_eos=True)
        for impatient in [pool.submit(leave) for _ in range(12)]:
            impatient.result()
        assert patient.result()["usage"]["completion_tokens"] == 20
    for _ in range(6):
        wait_until(lambda: num_running(trio.root_url) == 0, timeout_s=1.0)


def test_each_gets_the_answers_to_its_own_advice(trio: ServerProcess) -> None:
    """All of them know a session, whichever has seen it: the engine does."""

    def ask(size: int) -> Any:
        """Over a connection of its own, so that any of the front ends may answer."""
        return httpx.post(f"{trio.root_url}/v1/prefetch", json={"prompt": [5] * size}, timeout=30).json()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(1, 25)))
    assert [answer["num_tokens"] for answer in answers] == list(range(1, 25))
    assert [answer["num_cached_tokens"] for answer in answers] == [size // 2 for size in range(1, 25)]
    for _ in range(3):
        text = httpx.get(f"{trio.root_url}/metrics", timeout=30).text
        assert re.findall(r"^nanoflow:prefetch_(?:requests|tokens)_total\{.*\} (.*)$", text, re.M) == ["24.0", "300.0"]
        unknown = httpx.post(f"{trio.root_url}/v1/prefetch", json={"session_id": "5"}, timeout=30)
        assert unknown.status_code == 404, "names have the key in them, so this is not a number for the fake engine"


def test_a_taken_port_is_refused_by_several_too(trio: ServerProcess, model: str) -> None:
    port = trio.root_url.rpartition(":")[2]
    second = launch(*COMMAND, model, "--api-servers", "2", "--port", port)
    assert second.process.wait(60) == 1
    wait_until(lambda: bool(second.lines))
    assert second.lines == [f"nanoflow: error: cannot listen at 127.0.0.1:{port}: Address already in use\n"]


def test_a_killed_front_end_is_replaced_and_its_requests_are_dropped(model: str) -> None:
    with family(model, 2) as server:
        (victim,) = front_ends(server)
        for _ in range(8):
            complete(server.root_url, max_tokens=2)
        body = {"prompt": [SLOW, 5], "max_tokens": 200, "ignore_eos": True, "stream": True}
        client = httpx.Client(base_url=server.root_url, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
        streams = [client.stream("POST", "/v1/completions", json=body) for _ in range(12)]
        readers = [stream.__enter__().iter_lines() for stream in streams]
        assert all(next(reader) for reader in readers)
        num_lost = connections(server)[victim]
        assert 0 < num_lost < 12
        wait_until(lambda: num_running(server.root_url) == 12)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: num_running(server.root_url) == 12 - num_lost, timeout_s=5.0)
        wait_until(lambda: bool(front_ends(server)) and front_ends(server) != [victim])
        # Connections to its socket wait for the new process; none is refused.
        for _ in range(16):
            complete(server.root_url, max_tokens=2)
        assert metric(server.root_url, "request_success_total") >= 24
        client.close()
        wait_until(lambda: num_running(server.root_url) == 0)
        assert any("was ended by SIGKILL" in line for line in server.lines)


@pytest.mark.parametrize("number", part([signal.SIGINT], of=[signal.SIGTERM, signal.SIGINT]))
def test_a_signal_ends_all_streams_and_processes(model: str, number: signal.Signals) -> None:
    body = {"prompt": [SLOW, 5], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with family(model, 3) as server, httpx.Client(base_url=server.root_url, timeout=30) as client:
        streams = [client.stream("POST", "/v1/completions", json=body) for _ in range(12)]
        readers = [stream.__enter__().iter_lines() for stream in streams]
        assert all(next(reader) for reader in readers)
        server.process.send_signal(number)
        time.sleep(0.3)  # two of a kind at once are one
        server.process.send_signal(number)
        for reader in readers:
            *_, last, done = [line for line in reader if line]
            assert done == "data: [DONE]"
            assert "error" in json.loads(last.removeprefix("data: "))
        assert server.stop() == 0
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


def test_nothing_is_left_when_the_main_process_is_killed(model: str) -> None:
    with family(model, 2) as server:
        body = {"prompt": [SLOW, 5], "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.root_url}/v1/completions", json=body, timeout=30) as answer:
            next(answer.iter_lines())
            server.process.kill()
            server.process.wait()
        # `family` looks for processes and files that are left.


def test_a_dead_engine_ends_all_with_its_reason(model: str) -> None:
    with family(model, 2) as server:
        answer = httpx.post(f"{server.root_url}/v1/completions", json={"prompt": [CRASHING]}, timeout=30)
        assert answer.status_code == 503
        assert server.process.wait(20) == 1
        wait_until(
            lambda: any("the engine died: RuntimeError: the fake engine crashes" in line for line in server.lines)
        )


def test_a_model_that_cannot_be_loaded_is_one_line(model: str) -> None:
    server = launch(*COMMAND, "/nowhere", "--api-servers", "2", "--port", "0")
    assert server.process.wait(60) == 1
    wait_until(lambda: bool(server.lines))
    assert [line for line in server.lines if line.startswith("nanoflow: error: ")] == server.lines
