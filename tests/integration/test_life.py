"""The end of a server in good order, and an engine that is started again: requests that run, that wait, that come."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.all_cases import part
from tests.fake_engine import SLOW
from tests.integration.test_front_ends import COMMAND, children, is_running, metric, num_running, wait_until
from tests.server_process import ServerProcess, launch
from tests.toy_models import write_toy_model

# A token takes 20 ms for each request that runs.
SHORT = {"prompt": [SLOW, 5], "max_tokens": 15, "ignore_eos": True, "stream": True}
TERM, INT = signal.SIGTERM, signal.SIGINT
LONG = {"prompt": [SLOW, 5], "max_tokens": 250, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_model(tmp_path_factory.mktemp("model")))


@contextmanager
def server_of(model: str, tmp_path: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server around the fake engine; no process and no file of it may be left."""
    folder = tmp_path / "files"
    folder.mkdir()
    server = launch(*COMMAND, model, "--served-model-name", "toy", "--port", "0", *flags, TMPDIR=str(folder))
    members: list[int] = []
    try:
        server.wait_ready(60.0)
        members = children(server.process.pid)
        assert list(folder.iterdir()) == [], "nothing has a name that could be left"
        yield server
    finally:
        members += children(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        server.stop()
    wait_until(lambda: not any(map(is_running, members)))


def stream(url: str, body: dict[str, Any], started: threading.Event) -> list[str]:
    """Lines of a stream, read to its end."""
    lines = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            started.set()
            if line:
                lines.append(line)
    return lines


@contextmanager
def streaming(url: str, body: dict[str, Any], count: int) -> Iterator[list[list[str]]]:
    """So many streams that have begun, each over a connection of its own; their lines after the block."""
    ended: list[list[str]] = []
    with ThreadPoolExecutor(count) as pool:
        starts = [threading.Event() for _ in range(count)]
        futures = [pool.submit(stream, url, body, start) for start in starts]
        assert all(start.wait(20) for start in starts)
        yield ended
        ended += [future.result() for future in futures]


def is_whole(lines: list[str]) -> bool:
    return lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"


def error_code(lines: list[str]) -> str:
    assert lines[-1] == "data: [DONE]"
    return str(json.loads(lines[-2][6:])["error"]["code"])


@pytest.mark.parametrize("count", part(["2"], of=["1", "2"]))
def test_the_first_signal_lets_all_end_and_takes_nothing_new(model: str, tmp_path: Path, count: str) -> None:
    # Each request over a connection of its own. The streams end soon, and a client takes long to make.
    limits = httpx.Limits(max_keepalive_connections=0)
    with server_of(model, tmp_path, "--api-servers", count) as server, httpx.Client(limits=limits) as client:
        with streaming(server.root_url, SHORT, 8) as ended:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get(f"{server.root_url}/health").status_code == 503)
            time.sleep(0.1)  # the further front end is told over a pipe
            for _ in range(6):  # whichever front end is asked
                refused = client.post(f"{server.root_url}/v1/completions", json={"prompt": "a"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                assert int(refused.headers["retry-after"]) > 0
                assert client.get(f"{server.root_url}/health").json()["error"]["code"] == "draining"
                assert client.get(f"{server.root_url}/metrics").status_code == 200
        assert all(map(is_whole, ended))
        assert server.process.wait(10) == 0


@pytest.mark.parametrize(("count", "second"), part([("1", TERM), ("2", INT)], of=product("12", (TERM, INT))))
def test_the_second_signal_cuts(model: str, tmp_path: Path, count: str, second: signal.Signals) -> None:
    with server_of(model, tmp_path, "--api-servers", count) as server:
        with streaming(server.root_url, LONG, 6) as ended:
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.poll() is None
            begin_s = time.monotonic()
            server.process.send_signal(second)
        assert time.monotonic() - begin_s < 3.0
        assert [error_code(lines) for lines in ended] == ["engine_dead"] * 6
        assert server.process.wait(10) == 0


def test_the_time_to_drain_is_bounded(model: str, tmp_path: Path) -> None:
    with server_of(model, tmp_path, "--api-servers", "2", "--shutdown-timeout", "0.7") as server:
        with streaming(server.root_url, LONG, 6) as ended:
            begin_s = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
        assert 0.6 < time.monotonic() - begin_s < 3.5
        assert [error_code(lines) for lines in ended] == ["engine_dead"] * 6


def test_signals_to_the_whole_group_are_the_main_processs_alone(model: str, tmp_path: Path) -> None:
    """As a service manager sends them: to all processes at once."""
    with server_of(model, tmp_path, "--api-servers", "2") as server:
        with streaming(server.root_url, SHORT, 6) as ended:
            for pid in (*children(server.process.pid), server.process.pid):
                os.kill(pid, signal.SIGTERM)
        assert all(map(is_whole, ended))
        assert server.process.wait(10) == 0


def engine_of(server: ServerProcess) -> int:
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children(server.process.pid)}
    (pid,) = [pid for pid, command in commands.items() if "fake_engine_process" in command]
    return pid


def is_well(server: ServerProcess) -> bool:
    """Whether whichever front end is asked says so."""
    return all(httpx.get(f"{server.root_url}/health").status_code == 200 for _ in range(6))


def test_a_killed_engine_is_started_again_as_often_as_allowed(model: str, tmp_path: Path) -> None:
    with server_of(model, tmp_path, "--api-servers", "2", "--restart-engine", "2") as server:
        with streaming(server.root_url, SHORT, 4):
            pass
        before = metric(server.root_url, "request_success_total")
        for _ in range(2):
            with streaming(server.root_url, LONG, 6) as ended:
                os.kill(engine_of(server), signal.SIGKILL)
                wait_until(lambda: httpx.get(f"{server.root_url}/health").status_code == 503, timeout_s=3.0)
                refused = httpx.post(f"{server.root_url}/v1/completions", json={"prompt": "a"})
                assert refused.status_code == 503 and refused.json()["error"]["code"].startswith("engine_")
            assert [error_code(lines) for lines in ended] == ["engine_dead"] * 6
            wait_until(lambda: is_well(server))
            with streaming(server.root_url, SHORT, 6) as ended:
                assert num_running(server.root_url) > 0
            assert all(map(is_whole, ended))
        assert metric(server.root_url, "request_success_total") >= before + 12
        os.kill(engine_of(server), signal.SIGKILL)
        assert server.process.wait(20) == 1
        wait_until(lambda: any("the engine died: the engine's process was ended by SIGKILL" in x for x in server.lines))


def test_calls_are_told_to_come_again_while_the_engine_starts(model: str, tmp_path: Path) -> None:
    with server_of(model, tmp_path, "--api-servers", "1", "--restart-engine", "1") as server:
        os.kill(engine_of(server), signal.SIGKILL)

        refusals: list[tuple[float, str]] = []

        def is_back() -> bool:
            """Whether a call is answered after others were refused. The engine may be back before a second refusal."""
            answer = httpx.post(f"{server.root_url}/v1/completions", json={"prompt": "a"})
            if answer.status_code == 503:
                refusals.append((time.monotonic(), answer.json()["error"]["code"]))
            return answer.status_code == 200 and bool(refusals)

        wait_until(is_back, timeout_s=40.0)
        first_s = min(at_s for at_s, code in refusals if code == "engine_restarting")
        assert first_s - refusals[0][0] < 2.0
        assert refusals[-1][1] == "engine_restarting"


@pytest.mark.parametrize(
    ("hosts", "count"),
    # Of two at one address: `test_front_ends.py`.
    part(
        [("127.0.0.1 127.0.0.1", "1"), ("0.0.0.0 127.0.0.1", "2"), (":: 0.0.0.0", "1")],
        of=product(("127.0.0.1 127.0.0.1", "0.0.0.0 127.0.0.1", ":: 0.0.0.0"), "12"),
    ),
)
def test_a_second_server_says_at_once_that_the_port_is_taken(
    model: str, tmp_path: Path, hosts: str, count: str
) -> None:
    first, second = hosts.split()
    if first == "::" and not socket.has_ipv6:
        pytest.skip("there is no IPv6")
    with server_of(model, tmp_path, "--api-servers", count, "--host", first) as server:
        port = re.search(r":(\d+)$", server.root_url)
        assert port is not None
        loser = launch(*COMMAND, "/nowhere", "--host", second, "--port", port[1], "--api-servers", count)
        assert loser.process.wait(30) == 1
        wait_until(lambda: bool(loser.lines))
        assert loser.lines == [f"nanoflow: error: cannot listen at {second}:{port[1]}: Address already in use\n"]
