"""A server whose chat template loops for some messages: it answers all else, and ends when it is told to."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server_process import ServerProcess, launch
from tests.toy_models import write_toy_model
from tests.toy_tokenizers import TEMPLATE, write_tokenizer

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LOOPING = "{% if messages[-1].content == 'loop' %}" + LOOP + "{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One for all tests; the last one ends it."""
    folder = write_toy_model(tmp_path_factory.mktemp("model"))
    write_tokenizer(folder, chat_template=LOOPING)
    flags = ("--served-model-name", "toy", "--api-servers", "1", "--port", "0", "--chat-template-timeout-s", "3")
    running = launch(sys.executable, "-m", "tests.fake_serve", str(folder), *flags)
    try:
        running.wait_ready(60.0)
        yield running
    finally:
        running.stop()


def ask(server: ServerProcess, content: str) -> tuple[int, Any]:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
    answer = httpx.post(f"{server.root_url}/v1/chat/completions", json=body, timeout=30)
    return answer.status_code, answer.json()


def renderers(server: ServerProcess) -> list[int]:
    """Processes of the server that render templates."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == server.process.pid and b"template_process" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_a_loop_is_refused_in_time_and_others_are_answered_meanwhile(server: ServerProcess) -> None:
    assert ask(server, "hello")[0] == 200
    with ThreadPoolExecutor(2) as pool:
        looping = [pool.submit(ask, server, "loop") for _ in range(2)]
        num_answered = 0
        while not all(call.done() for call in looping):
            start_s = time.monotonic()
            assert ask(server, "hello")[0] == 200
            assert httpx.get(f"{server.root_url}/health", timeout=5).status_code == 200
            assert time.monotonic() - start_s < 2.5
            num_answered += 1
    assert num_answered >= 2
    for call in looping:
        status, body = call.result()
        assert status == 400
        assert body["error"]["message"] == "the chat template was stopped: it takes longer than 3 s"


def test_a_signal_ends_the_server_while_a_template_loops(server: ServerProcess) -> None:
    assert ask(server, "hello")[0] == 200
    statuses: list[int] = []

    def loop() -> None:
        try:
            statuses.append(ask(server, "loop")[0])
        except httpx.HTTPError:
            statuses.append(0)

    thread = threading.Thread(target=loop)
    thread.start()
    time.sleep(0.5)
    pids = renderers(server)
    assert pids and server.stop(signal.SIGTERM) == 0
    thread.join(10)
    # Requests have time to end, and this one ends when its template has had its time.
    assert statuses == [400]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
