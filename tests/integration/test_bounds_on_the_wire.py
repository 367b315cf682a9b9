"""Slow, idle, long and many: what clients can do to a connection, against a server in a process of its own.

The engine is the fake one. The server may have 128 files open, so that a few connections are many.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from benchmarks.robustness.attacks import Address, chunked, post, status_of

from tests.server_process import ServerProcess, launch
from tests.toy_models import write_toy_model

MAX_FILES = 128
OPTIONS = (
    *("--header-timeout-s", "1", "--body-timeout-s", "1", "--idle-timeout-s", "3", "--write-timeout-s", "1"),
    *("--max-body-bytes", "64K", "--max-bodies-bytes", "100K", "--max-json-depth", "8"),
)
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n%s\r\n"
OPEN = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_toy_model(tmp_path_factory.mktemp("model"))
    serve = f"ulimit -n {MAX_FILES} && exec {sys.executable} -m tests.fake_serve {model} --port 0"
    process = launch("bash", "-c", f"{serve} {' '.join(OPTIONS)}")
    try:
        process.wait_ready(60.0)
        yield process
        assert process.process.poll() is None
    finally:
        process.stop()


@pytest.fixture
def address(server: ServerProcess) -> Address:
    host, port = server.root_url.removeprefix("http://").split(":")
    return host, int(port)


def connect(address: Address) -> socket.socket:
    return socket.create_connection(address, 15)


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    try:
        while piece := connection.recv(1 << 16):
            found += piece
    except ConnectionError:
        pass
    return found


def error_of(found: bytes) -> tuple[int, str]:
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)["error"]["message"]


def test_idle_connections_silence_nobody(address: Address, server: ServerProcess) -> None:
    idle = [connect(address) for _ in range(3 * MAX_FILES)]
    try:
        for _ in range(5):
            begin_s = time.monotonic()
            assert httpx.get(f"{server.root_url}/health", timeout=10).status_code == 200
            assert time.monotonic() - begin_s < 5
        # Room was made by closing those that were idle longest: the last ones live.
        idle[-1].sendall(GET % b"")
        assert answer(idle[-1]).startswith(b"HTTP/1.1 200")
    finally:
        for connection in idle:
            connection.close()


def test_a_connection_without_a_request_ends(address: Address) -> None:
    with connect(address) as connection:
        begin_s = time.monotonic()
        assert answer(connection) == b""
        assert 2.0 < time.monotonic() - begin_s < 10


def test_a_connection_between_requests_ends_too(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        begin_s = time.monotonic()
        assert answer(connection).startswith(b"HTTP/1.1 200")
        assert 2.0 < time.monotonic() - begin_s < 10


@pytest.mark.parametrize(
    ("first", "drip", "message"),
    [
        (b"GET /health HTTP/1.1\r\n", b"x: y\r\n", "the head of the request took longer than 1 s"),
        (OPEN % 5000 + b"{", b" ", "the body of the request took longer than 1 s"),
    ],
)
def test_slow_clients_are_told_so(address: Address, first: bytes, drip: bytes, message: str) -> None:
    with connect(address) as connection:
        connection.sendall(first)
        begin_s = time.monotonic()
        connection.settimeout(0.3)
        found = b""
        while not found and time.monotonic() - begin_s < 8:
            connection.sendall(drip)
            try:
                found = connection.recv(1 << 16)
            except TimeoutError:
                continue
        assert error_of(found) == (408, message)
        assert 0.8 < time.monotonic() - begin_s < 5


@pytest.mark.parametrize(
    "headers", [b"x: " + b"a" * 40_000 + b"\r\n", b"x: y\r\n" * 101, b"x: " + b"a" * 1_000_000 + b"\r\n"]
)
def test_long_heads_are_refused(address: Address, headers: bytes) -> None:
    assert status_of(address, GET % headers) in (431, 0)  # 0: the answer was lost, as the client was still sending
    assert status_of(address, GET % (b"x: y\r\n" * 90)) == 200


def test_a_head_that_comes_byte_by_byte_is_counted_too(address: Address) -> None:
    with connect(address) as connection:
        for byte in GET % (b"a:b\r\n" * 50):
            connection.sendall(bytes([byte]))
        assert answer(connection).startswith(b"HTTP/1.1 200")
    with connect(address) as connection:
        for line in (GET % (b"a:b\r\n" * 120)).splitlines(keepends=True):
            with contextlib.suppress(ConnectionError):  # it is refused before its end
                connection.sendall(line)
        assert b"200 OK" not in answer(connection)


def test_a_body_is_no_head(address: Address) -> None:
    """Lines and blank lines in a body, and a second request behind it, are not counted as headers."""
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode() + b"\n\r\n\r\n" * 9000
    request = OPEN % len(body) + body
    with connect(address) as connection:
        connection.sendall(request + request + GET % b"")
        found = answer(connection)
    assert found.count(b"HTTP/1.1 200 OK") == 3


def test_long_bodies_are_refused_before_they_are_read(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(OPEN % 10**12)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")
    assert status_of(address, chunked("/v1/completions", b" " * 30_000, 3)) == 413
    assert status_of(address, chunked("/v1/completions", b'{"prompt": "a", "max_tokens": 1}', 1)) == 200
    assert status_of(address, post("/v1/completions", b"[" * 9 + b"]" * 9)) == 400


def test_a_client_that_goes_on_after_a_refusal_is_cut_off(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(OPEN % 10**12)
        begin_s = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begin_s < 20:
                connection.sendall(b" " * 10_000)
                time.sleep(0.02)


def test_bodies_that_are_held_together_are_bounded(address: Address, server: ServerProcess) -> None:
    opened = [connect(address) for _ in range(6)]
    try:
        for connection in opened:
            connection.sendall(OPEN % 60_000)
        statuses = []
        for connection in opened:
            connection.settimeout(0.5)
            try:
                statuses.append(connection.recv(1 << 16).split(b" ")[1])
            except TimeoutError:
                continue
        assert b"503" in statuses
    finally:
        for connection in opened:
            connection.close()
    time.sleep(0.2)
    assert status_of(address, post("/v1/completions", {"prompt": "a", "max_tokens": 1})) == 200


def test_requests_that_wait_on_a_connection_are_bounded(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2000)
        assert b"requests may wait on a connection" in answer(connection)


def test_clients_that_do_not_read_are_cut_off(address: Address) -> None:
    body = json.dumps({"prompt": "ab" * 30_000, "return_token_strs": True}).encode()
    asked = (OPEN % len(body)).replace(b"/v1/completions", b"/tokenize") + body
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(address)
        with contextlib.suppress(ConnectionError):
            connection.sendall(asked * 12)
        time.sleep(6)
        found = answer(connection)
    assert 0 < found.count(b"HTTP/1.1 200") < 12


def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    model = write_toy_model(tmp_path)
    out, log = tmp_path / "out", os.pipe()
    fcntl.fcntl(log[1], fcntl.F_SETPIPE_SZ, 4096)
    command = (sys.executable, "-m", "tests.fake_serve", str(model), "--port", "0", "--log-level", "debug")
    with out.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=log[1])
    os.close(log[1])
    try:
        end_s = time.monotonic() + 60
        while " at http://" not in (text := out.read_text()):
            assert time.monotonic() < end_s
            time.sleep(0.05)
        host, port = text.rpartition("http://")[2].partition("/")[0].split(":")
        for _ in range(300):
            assert status_of((host, int(port)), b"\x00\r\n\r\n") == 400
        begin_s = time.monotonic()
        assert status_of((host, int(port)), GET % b"") == 200
        assert time.monotonic() - begin_s < 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(log[0])
