"""How much memory this process may have is the least that machine, container and its own limits leave."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from nanoflow.device import host_memory

_MIB = 2**20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a system with 8 GiB free of 16, without any limit."""
    for name, text in {
        "proc/meminfo": "MemAvailable: 8388608 kB\nCommitLimit: 4194304 kB\nCommitted_AS: 1048576 kB\n",
        "proc/sys/vm/overcommit_memory": "0\n",
        "proc/self/statm": "1000 1 1 1 1 1 1\n",
        "cgroup/memory.max": "max\n",
        "cgroup/memory.current": "1048576\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tmp_path


def test_the_machine(system: Path) -> None:
    assert host_memory.free_host_bytes() == 8 * 2**30
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory.total_host_bytes() == physical


def test_a_container(system: Path) -> None:
    (system / "cgroup" / "memory.max").write_text(f"{100 * _MIB}\n")
    assert host_memory.free_host_bytes() == 99 * _MIB
    (system / "cgroup" / "memory.stat").write_text(f"anon 5\ninactive_file {_MIB // 2}\n")
    assert host_memory.free_host_bytes() == 99 * _MIB + _MIB // 2
    assert host_memory.total_host_bytes() == 100 * _MIB


def test_without_overcommit(system: Path) -> None:
    (system / "proc/sys/vm/overcommit_memory").write_text("2\n")
    assert host_memory.free_host_bytes() == 3 * 2**30


def test_an_address_space(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100 * _MIB, 100 * _MIB))
    assert host_memory.free_host_bytes() == 100 * _MIB - 1000 * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (_MIB, _MIB))
    assert host_memory.free_host_bytes() == 0


def test_what_a_user_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    host_memory.bound_host_memory()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    host_memory.bound_host_memory()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
