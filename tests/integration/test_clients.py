"""Client libraries ask a real server, those that are installed here; `make clients` asks through all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server_process import running_server

ROOT = Path(__file__).parents[2]


def _tool() -> Any:
    """tools/clients.py, which is no package."""
    spec = importlib.util.spec_from_file_location("tools_clients", ROOT / "tools/clients.py")
    assert spec is not None and spec.loader is not None
    sys.modules["tools_clients"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
MODULES = {
    "openai": "openai",
    "anthropic": "anthropic",
    "langchain-openai": "langchain_openai",
    "litellm": "litellm",
    "guidellm": "guidellm",
}


@pytest.fixture(scope="module")
def root_url() -> Iterator[str]:
    with running_server(("default", "--api-key", "key")) as server:
        yield server.root_url


def ask(client: Any, *arguments: str) -> None:
    command = [sys.executable, str(TOOL.CHECKS / client.script), *arguments, *client.more]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("client", TOOL.PYTHON, ids=lambda client: client.name)
def test_a_client_gets_along_with_the_server(client: Any, root_url: str) -> None:
    if importlib.util.find_spec(MODULES[client.name]) is None:
        pytest.skip(f"{client.name} is not installed")
    ask(client, root_url, "key")


def test_the_example_of_vllm_runs_with_the_import_changed() -> None:
    ask(TOOL.EXAMPLE)


def test_the_page_has_every_client() -> None:
    page = (ROOT / "docs/clients.md").read_text()
    table = page.partition("<!-- clients -->")[2].partition("<!-- /clients -->")[0]
    assert "not pass" not in table
    for client in (*TOOL.PYTHON, TOOL.EXAMPLE):
        assert f"| {client.name} |" in table
        anew = TOOL.with_table(page, [TOOL.Outcome(client=client, version="9.9", is_good=False, said="")])
        assert f"| {client.name} | 9.9 | does not pass |" in anew and anew.count("<!-- clients -->") == 1
