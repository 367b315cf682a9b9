"""docs/benchmarks.md: up to date, and made of whatever records there are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from benchmarks.ladder import make_ladder

from tests.unit.test_ablation import PREDICTIONS, RECORDS

ROOT = Path(__file__).resolve().parents[2]
Page = Callable[[Path, Path], str]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import benchmarks_page

    return benchmarks_page.page


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, "tools/benchmarks_page.py", "--check"]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_without_records_there_is_no_table(page: Page, tmp_path: Path) -> None:
    text = page(tmp_path, tmp_path)
    assert text.startswith("# Benchmarks") and "##" not in text and "|" not in text


def test_a_ladder_is_shown_with_its_predictions(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "ladder"
    folder.mkdir()
    ladder = make_ladder(RECORDS, PREDICTIONS)
    (folder / "ladder_llama-3-8b.json").write_bytes(msgspec.json.encode(ladder))
    (tmp_path / "overlap.svg").write_text("<svg/>")
    text = page(tmp_path, tmp_path)
    assert "## Whole runs" not in text
    assert "### llama-3-8b on NVIDIA H200, 700 W, driver 580" in text
    assert "**64/8**, 10 requests; sum of parts alone 1,250, optimum 2,000 tokens/s:" in text
    assert (
        "| partition | 1,110 (1,100 to 1,120) | 1.110 | 1.050 | 55.5 | 88.8 | 20.0 | 22 | 1,500 | 10.0 | 75% | 1 |"
        in text
    )
    assert "| nano-batches | 900 (900 to 900) | 0.900 |  | 45.0 |" in text, "what was not predicted is left empty"
    assert "| 64/8 | partition | 1,110 | 1,050 | -5.4% | 1.110 | 1.050 | -0.060 | 20.0 | 21.0 |" in text
    assert "| 64/8 | nano-batches" not in text, "nor is there a row that compares it"
    assert "(../benchmarks/results/ladder/ladder_llama-3-8b.json)" in text
    assert text.count("![") == 1 and "(pictures/overlap.svg)" in text


def test_rungs_in_turn_have_a_table(page: Page, tmp_path: Path) -> None:
    record = RECORDS["llama-3-8b_64-8_sequential.json"]
    rung = {
        "rung": "searched",
        "tokens_per_s": [1000.0, 1040.0, 1020.0],
        "energy_per_token_j": [0.02, 0.022, 0.021],
        "gains": [1.05, 1.06, 1.055],
        "energy_ratios": [0.94, 0.95, 0.93],
        "predicted_gain": 1.08,
        "planned_part": 0.995,
        "iteration_tokens": 2000.4,
        "prompt_part": 0.66,
        "decode_context": 1280.0,
    }
    made = {"num_turns": 8, "turn_s": 1.0, "git_revision": "0123456789abcdef"}
    bounds = {"serial_tokens_per_s": 1020.0, "optimal_tokens_per_s": 2040.0}
    document = {
        **{key: record[key] for key in ("machine", "software")},
        "model": "preset:llama-3-8b",
        "options": {"dtype": "bfloat16", "max_batch_tokens": 2048, "max_num_seqs": 1024},
        "workloads": [
            {"workload": "64/8", **made, "has_same_batches": True, **bounds, "rungs": [rung]},
            {"workload": "32/8", **made, "has_same_batches": False, **bounds, "rungs": [rung]},
        ],
    }
    (tmp_path / "steady_llama-3-8b.json").write_text(json.dumps(document))
    text = page(tmp_path, tmp_path)
    assert "### llama-3-8b, token budget 2,048, on NVIDIA H200, 700 W, driver 580" in text
    assert (
        "| 64/8 | searched | 1,020 (1,000 to 1,040) | 1.055 (1.050 to 1.060) | 1.080 "
        "| 0.940 (0.930 to 0.950) | 50.0% | 100.0% | 21.0 | 100% | 2,000 | 66% | 1,280 | 3 x 8 x 1 s | 0123456" in text
    )
    assert "of other mixes of prompts and decodes: 32/8." in text


def test_a_whole_run_stands_beside_its_peer(page: Page, tmp_path: Path) -> None:
    results = ROOT / "benchmarks/results"
    for name in ("throughput_llama-3-8b_512-512.json", "peers.json"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    text = page(tmp_path, tmp_path)
    (row,) = (line for line in text.splitlines() if line.startswith("| llama-3-8b"))
    peers = json.loads((results / "peers.json").read_text())
    entry = next(each for each in peers["runs"] if each["workload"] == "512/512")
    assert f"{entry['total_tokens_per_s']:,}" in row and "## The ablation ladder" not in text
    assert "| 8,192 / 2,048 |" in row and "| not known |" in row, "settings, and a revision that nobody noted"
    (tmp_path / "peers.json").unlink()
    assert "vLLM" not in page(tmp_path, tmp_path)


def test_a_peer_stands_beside_the_same_requests_only(page: Page, tmp_path: Path) -> None:
    results = ROOT / "benchmarks/results"
    (tmp_path / "peers.json").write_bytes((results / "peers.json").read_bytes())
    record = json.loads((results / "throughput_llama-3-8b_512-512.json").read_text())
    for change in ({"num_requests": 1101}, {"temperature": 0.8}, {"text": True}):
        changed = {**record, "workload": {**record["workload"], **change}}
        (tmp_path / "throughput_llama-3-8b_512-512.json").write_text(json.dumps(changed))
        whole_runs = page(tmp_path, tmp_path).partition("## Peers")[0]
        assert "x vLLM" not in whole_runs, change


def test_what_ran_is_named_after_what_ran(page: Page, tmp_path: Path) -> None:
    document = json.loads((ROOT / "benchmarks/results/ladder/steady_llama-3.2-1b.json").read_text())
    (tmp_path / "steady_llama-3.2-1b.json").write_text(json.dumps(document))
    text = page(tmp_path, tmp_path)
    assert text.count("| sequential (searched: no plan for these batches) |") == 9 and "| searched |" not in text


def test_no_record_has_an_energy_that_the_card_cannot_have_used() -> None:
    for path in (ROOT / "benchmarks/results").rglob("*.json"):
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or not document.get("machine", {}).get("gpus"):
            continue
        limit_w = document["machine"]["gpus"][0]["power_limit_w"]
        rungs = [rung for each in document.get("workloads", ()) for rung in each["rungs"]]
        pairs = [(run.get("energy_per_token_j"), run["total_tokens_per_s"]) for run in document.get("repeats", ())]
        for rung in rungs:
            if isinstance(rung.get("tokens_per_s"), list):
                pairs += zip(rung["energy_per_token_j"] or (), rung["tokens_per_s"], strict=False)
        assert all(energy_j is None or energy_j * rate <= limit_w for energy_j, rate in pairs), path.name
