"""`nanoflow bench rounds` with the embedded model: in an engine of its own, against a server, and interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.engine import rounds as in_turn

from nanoflow.bench.processes import processes_of
from nanoflow.cli.main import main
from tests.server_process import ServerProcess, running_server

PAGE_SIZE = 16
ENGINE = ("--device", "cpu", "--num-threads", "1")
# Three rounds of 40 new tokens and completions of 8; tool calls of an agent are no longer than these.
WORK = ("--workload", "40/8", "--num-conversations", "4", "--rounds", "3", "--num-warmup", "1")
ONE_BY_ONE = ("--max-concurrency", "1", "--agent-share", "0.25")
SYSTEM = ("--shared-system", "0.5", "--system-prompts", "1", "--system-tokens", "32")


def bench(folder: Path, *flags: str) -> dict[str, Any]:
    path = folder / "run.json"
    assert main(["bench", "rounds", *flags, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Engines in turn: one without a prefix cache and with as few pages as it can have, and one with plenty."""
    path = tmp_path_factory.mktemp("turns") / "turns.json"
    variants = ("--variants", "none=--no-enable-prefix-caching", "device=--num-pages 512")
    assert in_turn.main([*WORK, *SYSTEM, *ONE_BY_ONE, *ENGINE, *variants, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def own(turns: dict[str, Any]) -> dict[str, Any]:
    """The run of the engine with a prefix cache."""
    (found,) = [run for run in turns["runs"] if run["variant"] == "device"]
    return dict(found)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(("default", *ENGINE)) as running:
        yield running


def in_pages(num_tokens: int) -> int:
    return num_tokens // PAGE_SIZE * PAGE_SIZE


def test_an_engine_finds_what_came_before(own: dict[str, Any]) -> None:
    run = own["metrics"]
    assert (run["num_completed"], run["num_failed"], run["num_short"], run["num_left_out"]) == (12, 0, 0, 0)
    for number, each in enumerate(run["by_round"], start=1):
        # 40 new tokens a round and 8 of each completion before; two conversations have 32 of the system prompt.
        asked = [number * 48 - 8 + system for system in (0, 0, 32, 32)]
        assert each["prompt"]["num_asked"] == sum(asked)
        assert each["prompt"]["num_repeated"] == (sum(asked) - 4 * 40 if number > 1 else 0)
    first, second, third = (each["prompt"]["num_cached"] for each in run["by_round"])
    # One after the other: the second conversation with the system prompt finds it. Later rounds find full pages of all
    # but the last token that was generated.
    assert first == 32
    assert second == 2 * in_pages(47) + 2 * in_pages(79) and third == 2 * in_pages(95) + 2 * in_pages(127)
    assert run["prompt"]["num_computed"] == run["prompt"]["num_asked"] - first - second - third
    assert run["asked_over_computed"] == pytest.approx(run["prompt"]["num_asked"] / run["prompt"]["num_computed"])
    assert all(0 < each["ttft_s"]["p50"] <= each["ttft_s"]["p99"] for each in run["by_round"])
    assert run["tpot_s"]["p50"] > 0 and run["total_tokens_per_s"] > 0


def test_a_cache_computes_less_and_changes_no_token(turns: dict[str, Any]) -> None:
    none, device = turns["results"]
    assert (none["name"], device["name"]) == ("none", "device")
    assert none["num_computed"] == none["num_asked"] == device["num_asked"] > device["num_computed"]
    assert none["num_same_completions"] == device["num_same_completions"] == 4
    # One conversation at a time: the longest has 32 + 3 x 48 tokens, which is 11 pages, and there is one page more.
    assert [run["settings"]["num_pages"] for run in turns["runs"]] == [12, 512]


def test_the_record_says_what_was_measured(turns: dict[str, Any], own: dict[str, Any]) -> None:
    assert turns["workload"]["num_requests"] == 12 and turns["conversations"]["system_tokens"] == 32
    assert own["model"]["name"] == "default" and own["settings"]["enable_prefix_caching"] is True
    assert {state["role"] for state in own["processes"]} >= {"main", "engine"}


def test_a_server_answers_the_same_as_an_engine(own: dict[str, Any], server: ServerProcess, tmp_path: Path) -> None:
    found = bench(tmp_path, *WORK, *SYSTEM, *ONE_BY_ONE, "--url", f"{server.root_url}/v1", "--vocab-size", "2048")
    ours, (theirs,) = own["metrics"], found["repeats"]
    assert [each["prompt"] for each in theirs["by_round"]] == [each["prompt"] for each in ours["by_round"]]
    assert theirs["num_output_tokens"] == ours["num_output_tokens"] == 96
    assert theirs["completions"] == ours["completions"]
    assert found["benchmark"] == "rounds" and found["workload"]["num_requests"] == 12
    assert found["config"]["conversations"]["max_concurrency"] == 1 and found["config"]["load"]["api_key"] is None
    assert found["model"]["name"] == "default" and any(state["role"] == "engine" for state in found["processes"])


@pytest.mark.parametrize("flags", [("--prompts", "text"), ("--api", "chat", "--prompts", "text")], ids=["text", "chat"])
def test_a_server_finds_texts_again(
    flags: tuple[str, ...], server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(tmp_path, *WORK, *flags, "--url", f"{server.root_url}/v1", "--max-concurrency", "2", "--seed", "5")
    (run,) = found["repeats"]
    assert run["num_completed"] == 12
    for each in run["by_round"][1:]:
        # Tokens at the border of a completion and the next words may be merged when they are read again.
        assert each["prompt"]["num_cached"] > 0.6 * each["prompt"]["num_repeated"]
    assert "prompt tokens computed: 1 of" in capsys.readouterr().out


def test_goodput_and_rounds_that_do_not_fit(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--url", f"{server.root_url}/v1", "--num-conversations", "2", "--rounds", "3", "--num-warmup", "0")
    found = bench(tmp_path, "--workload", "900/4", *flags, "--goodput", "ttft_ms:1e9", "--seed", "7")
    (run,) = found["repeats"]
    assert (run["num_requests"], run["num_left_out"], run["num_failed"]) == (4, 2, 0)
    assert run["goodput_requests_per_s"] == pytest.approx(run["requests_per_s"])
    assert "2 rounds were left out" in capsys.readouterr().out


def test_ctrl_c_ends_it_with_its_engine_and_without_a_traceback() -> None:
    flags = ("--workload", "300/400", "--num-conversations", "64", "--num-warmup", "0")
    command = (sys.executable, "-m", "nanoflow", "bench", "rounds", *flags, *ENGINE)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 60
    while not (engines := [each for each in processes_of([process.pid]) if each.role == "engine"]):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err and not out
    assert not any(Path(f"/proc/{each.pid}").exists() for each in engines)
