"""Kept responses: bounded, shared by processes, found from one to the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoflow.config import ConfigError, ServerConfig
from nanoflow.server.errors import ApiError
from nanoflow.server.response_store import KeptResponse, ResponseStore, with_response_folder
from tests.fake_server import wait_until


def store_in(folder: Path, **options: Any) -> ResponseStore:
    store = ResponseStore.open(ServerConfig(response_dir=str(folder), **options))
    assert store is not None
    return store


def kept(name: str, previous: str | None = None, *, owner: str = "", size: int = 1) -> KeptResponse:
    item = {"id": f"in {name}", "text": "x" * size}
    response = {"id": name, "output": [{"id": f"out {name}"}]}
    return KeptResponse(id=name, owner=owner, previous_id=previous, input=[item], response=response)


def names(store: ResponseStore, last: str, owner: str = "") -> list[str]:
    return [item["id"] for item in store.conversation(last, owner, max_bytes=10_000)]


def test_a_conversation_is_found_in_order_by_its_owner_alone(tmp_path: Path) -> None:
    store, other = store_in(tmp_path), store_in(tmp_path)
    for one in (kept("a", owner="me"), kept("b", "a", owner="me"), kept("c", "b", owner="me")):
        store.keep(one)
    assert names(other, "c", "me") == ["in a", "out a", "in b", "out b", "in c", "out c"]
    assert other.find("b", "me") == kept("b", "a", owner="me") and other.find("b", "you") is None
    with pytest.raises(ApiError, match="'c' is not kept"):
        names(other, "c", "you")
    assert not store.delete("a", "you") and store.delete("a", "me") and not store.delete("a", "me")
    with pytest.raises(ApiError, match="'c' goes on from 'a', which is not kept") as caught:
        names(other, "c", "me")
    assert caught.value.status == 404 and caught.value.code == "previous_response_not_found"


def test_what_was_used_longest_ago_is_dropped_first(tmp_path: Path) -> None:
    store = store_in(tmp_path, max_kept_responses=3)
    for one in (kept("a"), kept("b", "a"), kept("c")):
        store.keep(one)
    names(store, "b")  # uses a and b
    store.keep(kept("d"))
    assert [store.find(name, "") is not None for name in "abcd"] == [True, True, False, True]


def test_bytes_are_bounded(tmp_path: Path) -> None:
    store = store_in(tmp_path, max_kept_response_bytes=2000)
    for name in ("a", "b", "c"):
        store.keep(kept(name, size=800))
    assert not store.keep(kept("huge", size=3000))
    assert [store.find(name, "") is not None for name in ("a", "b", "c", "huge")] == [False, True, True, False]
    store.keep(kept("d", "c", size=100))
    with pytest.raises(ApiError, match="more than 900 bytes") as caught:
        store.conversation("d", "", max_bytes=900)
    assert caught.value.status == 413


def test_a_temporary_folder_is_made_when_it_is_needed_and_goes_with_the_server(tmp_path: Path) -> None:
    with with_response_folder(ServerConfig()) as config:
        assert config.response_dir is not None
        folder = Path(config.response_dir)
        store = store_in(folder)
        assert store.find("a", "") is None and not store.delete("a", "") and not folder.exists()
        with pytest.raises(ApiError, match="'a' is not kept"):
            names(store, "a")
        assert store.keep(kept("a"))
        assert all(path.stat().st_mode & 0o77 == 0 for path in (folder, folder / "responses.db"))
        assert len(list(folder.iterdir())) == 1
    assert not folder.exists()
    with with_response_folder(ServerConfig(max_kept_responses=0)) as config:
        assert config.response_dir is None and ResponseStore.open(config) is None


def test_it_is_removed_when_the_server_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom nanoflow.config import ServerConfig\n"
        "from nanoflow.server.response_store import with_response_folder\n"
        "with with_response_folder(ServerConfig()) as config:\n"
        "    Path(config.response_dir).mkdir()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert ended.returncode == -signal.SIGKILL
    wait_until(lambda: not list(tmp_path.iterdir()))


def test_what_cannot_be_used_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/x"):
        with pytest.raises(ConfigError, match="response_dir"):
            store_in(folder)
    with pytest.raises(ConfigError, match="max_kept_responses"):
        ServerConfig(max_kept_responses=-1)
    store = store_in(tmp_path / "late")
    (tmp_path / "late").touch()
    assert not store.keep(kept("a")) and store.find("a", "") is None
