"""`nanoflow simulate` with conversations, with memory below the KV cache, and with policies compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli.main import main
from nanoflow.hardware import GPUS, parse_gpus
from nanoflow.models.config_json import parse
from nanoflow.models.presets import PRESETS
from nanoflow.models.registry import build_graph
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.table import write_profile
from nanoflow.round_metrics import ConversationMetrics, RoundMetrics
from nanoflow.run_metrics import RunMetrics

# 24 GB, of which a 1B model leaves some: many pages for few tokens of a test.
MODEL = "llama-3.2-1b"
LONGEST = parse(PRESETS[MODEL]).max_position_embeddings
MEMORY = GPUS["a10"].memory_bytes.value
# Keys and values of 8 heads of 64 in 16 layers.
TOKEN_BYTES = 2 * 8 * 64 * 16 * 2


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profiles") / "estimate.json"
    write_profile(estimated_profile(f"preset:{MODEL}", PRESETS[MODEL], parse_gpus("a10"), 512), path)
    return str(path)


@pytest.fixture
def said(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, Any]]:
    """Runs the command; what it printed, and the document that it wrote."""

    def run(*options: str) -> tuple[str, Any]:
        path = tmp_path / "run.json"
        small = ("--gpu-memory-utilization", "0.125", "--max-num-seqs", "32", "--max-batch-tokens", "512")
        assert main(["simulate", stored, *small, *options, "--json", str(path)]) == 0
        return capsys.readouterr().out, json.loads(path.read_text())

    return run


ROUNDS = ("--workload", "512/16", "--rounds", "3", "--num-conversations", "24", "--think-time", "2")


def test_conversations_are_told_as_the_benchmark_tells_them(said: Callable[..., tuple[str, Any]]) -> None:
    text, found = said(*ROUNDS, "--kv-host-gib", "8")
    lines = text.splitlines()
    assert lines[1] == "512/16, 24 conversations of 3 rounds, 2 s of thinking between them"
    (head,) = [line for line in lines if line.startswith("round")]
    assert head.split()[:6] == ["round", "requests", "asked", "repeated", "computed", "hit"]
    assert any(line.startswith("tier host: queries") for line in lines)
    rounds = found["rounds"]
    assert set(rounds) == {field.name for field in dataclasses.fields(ConversationMetrics)}
    assert set(rounds["by_round"][0]) == {field.name for field in dataclasses.fields(RoundMetrics)}
    assert set(found["result"]["metrics"]) == {field.name for field in dataclasses.fields(RunMetrics)}
    asked = [each["prompt"]["num_asked"] for each in rounds["by_round"]]
    assert asked == [24 * 512, 24 * (2 * 512 + 16), 24 * (3 * 512 + 2 * 16)]
    assert rounds["num_output_tokens"] == 3 * 24 * 16 and rounds["num_left_out"] == 0
    assert found["simulation"]["rounds"] == 3 and found["simulation"]["think_time"] == 2.0


def test_host_memory_below_a_small_cache_spares_prompts(said: Callable[..., tuple[str, Any]]) -> None:
    computed = {}
    for gib in ("0", "8"):
        text, found = said(*ROUNDS, "--kv-host-gib", gib)
        computed[gib] = found["rounds"]["prompt"]["num_computed"]
        assert ("  loads  " in text) == (gib == "8") == (found["result"]["num_loads"] > 0)
    assert computed["8"] < 0.8 * computed["0"]
    _, disk = said(*ROUNDS, "--kv-host-gib", "0.2", "--kv-disk-gib", "8", "--disk-gb-s", "20")
    assert disk["rounds"]["prompt"]["num_computed"] < computed["0"]
    assert disk["result"]["tiers"]["disk"]["stored_bytes"] > 0


def test_rounds_that_do_not_fit_into_the_model_are_left_out(said: Callable[..., tuple[str, Any]]) -> None:
    prompt = LONGEST // 2
    text, found = said(
        "--workload", f"{prompt}/8", "--rounds", "2", "--num-conversations", "1", "--gpu-memory-utilization", "0.9"
    )
    assert found["rounds"]["num_left_out"] == 1 and found["rounds"]["num_requests"] == 1
    assert "1 rounds were left out" in text


def test_policies_are_compared_and_the_winner_is_marked(said: Callable[..., tuple[str, Any]]) -> None:
    load = ("--workload", "96/32", "--num-requests", "12", "--kv-host-gib", "4", "--max-tokens", "64")
    # 1,200 tokens of KV cache, and 12 requests that grow to 128.
    weights = build_graph(parse(PRESETS[MODEL]), None).num_parameters * 2
    utilization = str((weights + 1200 * TOKEN_BYTES) / MEMORY)
    text, found = said(*load, "--gpu-memory-utilization", utilization, "--policies")
    lines = text.splitlines()
    assert lines[0].startswith("96/32, 12 requests at once: policies") and len(lines) == 2 + 32
    (winner,) = [line for line in lines if line.startswith("* ")]
    best = found["best"]
    assert winner.split()[1:4] == [best["admission"], best["returns"], best["victim"]]
    by_admission = {each["admission"]: each["result"] for each in reversed(found["policies"])}
    assert by_admission["now"]["num_preemptions"] > 0 == by_admission["reserved"]["num_preemptions"]
    assert {each["result"]["metrics"]["num_output_tokens"] for each in found["policies"]} == {12 * 32}


def test_max_tokens_hides_the_ends_of_requests(said: Callable[..., tuple[str, Any]]) -> None:
    load = ("--workload", "256/128", "--num-requests", "24")
    known, hidden = (said(*load, *more)[1]["result"] for more in ((), ("--max-tokens", "512")))
    assert known["metrics"]["num_output_tokens"] == hidden["metrics"]["num_output_tokens"] == 24 * 128
    assert known["metrics"]["duration_s"] != hidden["metrics"]["duration_s"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--think-time", "3"], "think_time: only with --rounds"),
        (["--rounds", "2", "--num-requests", "9"], "num_requests: not with --rounds"),
        (["--rounds", "2", "--request-rate", "9"], "request_rate: not with --rounds"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--kv-disk-gib", "4"], "kv_disk_gib needs kv_host_gib"),
        (["--kv-host-gib", "-4"], "may not be below 0"),
        (["--kv-host-gib", "nan"], "may not be below 0"),
        (["--kv-host-gib", "4", "--disk-gb-s", "0"], "disk_gb_s must be positive"),
        (["--max-tokens", "0"], "max_tokens must be positive"),
        (["--policies", "--find-gpus", "--request-rate", "4"], "policies and find_gpus"),
    ],
)
def test_what_makes_no_sense_is_refused(
    stored: str, options: Sequence[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", stored, *options]) == 1
    assert expected in capsys.readouterr().err


BESIDE = ("--workload", "128/16", "--num-requests", "40", "--request-rate", "40", "--batch-workload", "128/24")


def test_requests_of_priority_batch_beside_others(said: Callable[..., tuple[str, Any]]) -> None:
    text, found = said(*BESIDE, "--batch-requests", "600", "--max-itl-ms", "30", "--max-ttft-ms", "120")
    beside = found["beside"]
    assert "128/16, 40 requests at 40 requests/s, beside requests of 128/24" in text
    assert f"share of the rest   {beside['share_of_rest']:>10.0%}" in text
    assert beside["alone"]["num_requests"] == beside["together"]["num_requests"] == 40
    # The bounds that are stated in docs/limits.md, by more than what they are stated with.
    assert beside["together"]["ttft_s"]["p99"] < 1.1 * 0.12 and beside["together"]["itl_s"]["p99"] < 1.1 * 0.03
    assert beside["together"]["itl_s"]["p99"] > beside["alone"]["itl_s"]["p99"]
    assert 0.8 < beside["share_of_rest"] < 1.5 and 0 < beside["load"] < 1


def test_requests_of_priority_batch_must_be_enough_and_need_others(
    stored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        ((*BESIDE, "--batch-requests", "8"), "8 batch_requests end before the interactive ones"),
        (("--batch-requests", "8"), "batch_requests needs a request_rate"),
        (("--rounds", "2", "--batch-requests", "8"), "batch_requests"),
    ):
        assert main(["simulate", stored, *options]) != 0
        assert message in capsys.readouterr().err
