"""What a process holds is read as the system counts it; of a tree of processes all are found."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from nanoflow.bench.clients import server_processes
from nanoflow.bench.processes import listeners_at, processes_of, state_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

_GROW = "import sys; data = bytearray(60 << 20); del data; print('ready', flush=True); sys.stdin.read()"
_PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_GROW!r}])"


def test_memory_at_most_is_kept_when_it_is_given_back() -> None:
    with subprocess.Popen([sys.executable, "-c", _GROW], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        state = state_of(child.pid)
        child.communicate()
    assert state is not None and state.role == "main" and state.num_threads == 1
    assert state.peak_rss_bytes > 60 << 20 > state.rss_bytes > 1 << 20
    assert state.peak_virtual_bytes > state.peak_rss_bytes
    assert state_of(child.pid) is None


def test_children_are_found() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        found = processes_of([parent.pid])
        parent.communicate()
    assert found[0].pid == parent.pid and len(found) == 2


def test_who_listens_at_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert listeners_at(port) == [os.getpid()]
        assert server_processes(f"http://127.0.0.1:{port}/v1")[0].pid == os.getpid()
        assert server_processes(f"http://192.0.2.1:{port}/v1") == []
    assert listeners_at(port) == []


def test_files_are_counted() -> None:
    before = state_of(os.getpid())
    with open(os.devnull), open(os.devnull):  # noqa: PTH123
        during = state_of(os.getpid())
    assert before is not None and during is not None and during.num_files == before.num_files + 2
