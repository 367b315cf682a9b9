"""docs/benchmarks.md: up to date, and made of whatever records there are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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


def test_an_old_ladder_is_shown_as_history(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "ladder"
    folder.mkdir()
    stored = ROOT / "benchmarks/results/ladder/ladder_llama-3-8b.json"
    ladder = json.loads(stored.read_text())
    (folder / "ladder_llama-3-8b.json").write_text(json.dumps(ladder))
    (tmp_path / "overlap.svg").write_text("<svg/>")
    text = page(tmp_path, tmp_path)
    assert "## Whole runs" not in text and "## History: the ablation ladder" in text
    assert "### llama-3-8b on NVIDIA H200" in text
    (workload, *_), (searched,) = (
        ladder["workloads"],
        [rung for rung in ladder["workloads"][0]["rungs"] if rung["rung"] == "searched"],
    )
    assert f"**{workload['workload']}**, {workload['num_requests']:,} requests" in text
    assert f"| searched | {searched['total_tokens_per_s']:,.0f} (" in text
    assert f"| {searched['ratio_to_sequential']:.3f} | {searched['predicted_ratio']:.3f} |" in text
    assert f"| {workload['workload']} | searched | {searched['total_tokens_per_s']:,.0f} |" in text
    assert "(../benchmarks/results/ladder/ladder_llama-3-8b.json)" in text
    assert text.count("![") == 1 and "(pictures/overlap.svg)" in text


def test_old_single_runs_are_shown_as_history(page: Page, tmp_path: Path) -> None:
    name = "ablation/llama-3-8b_1024-512_nano-batches.json"
    (tmp_path / "ablation").mkdir()
    (tmp_path / name).write_bytes((ROOT / "benchmarks/results" / name).read_bytes())
    text = page(tmp_path, tmp_path)
    assert "## Whole runs" not in text and "## History: single runs of rungs" in text
    (row,) = (line for line in text.splitlines() if name in line)
    assert "| 1024/512 | 600 | 2 | nano-batches | 2,048 / 700 |" in row


def test_old_rungs_in_turn_have_a_table(page: Page, tmp_path: Path) -> None:
    record = {
        "machine": {"gpus": [{"name": "NVIDIA H200", "power_limit_w": 700.0, "driver_version": "580"}]},
        "software": {"cuda": "13.0", "packages": {"torch": "2.11", "triton": "3.6"}},
    }
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


def test_rows_of_readme_gather_all_records_of_a_kind(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates of a server, and workloads of whole runs, may each be in a file of their own."""
    import records

    machine = {"gpus": [{"name": "NVIDIA H200", "power_limit_w": 700.0, "driver_version": "580"}]}
    spread = {"p50": 0.01, "p99": 0.02}
    run = {"total_tokens_per_s": 1000.0, "ttft_s": spread, "longest_gap_s": spread}

    def load(rate: float | None, repeats: int) -> dict[str, object]:
        work = {"workload": "trace:sharegpt.csv", "num_requests": 40}
        return {"workload": work, "load": {"request_rate": rate}, "repeats": [run] * repeats}

    for name, rate, repeats in (("20", 20.0, 3), ("at-once", None, 1)):
        document = {"machine": machine, "server": {"model": "m"}, "loads": [load(rate, repeats)]}
        (tmp_path / f"serving_llama-3-8b_{name}.json").write_text(json.dumps(document))
    for workload, ratio in (("512/512", 1.05), ("1024/512", 1.08)):
        each = {"name": "searched", "planned_part": 0.9, "workload": workload, "num_requests": 1400, "ratio": ratio}
        result = {**each, "ratios": [ratio] * 3, "repeats_tokens_per_s": [1.0] * 3}
        path = tmp_path / f"whole_runs_llama-3-8b_{workload.replace('/', '-')}.json"
        path.write_text(json.dumps({"machine": machine, "results": [result]}))
    rows = list(records.readme_rows(tmp_path))
    assert rows[1][1] == (
        "at 20/s TTFT, longest gap p99 20, 20 ms (40 requests, 3 repeats); "
        "at once 1,000 total tokens/s (40 requests, 1 repeat)"
    )
    assert rows[1][3] == "serving_llama-3-8b_20 serving_llama-3-8b_at-once"
    assert rows[3][1] == (
        "1024/512 1.080 (1.080 to 1.080) (1,400 requests, 3 repeats); "
        "512/512 1.050 (1.050 to 1.050) (1,400 requests, 3 repeats)"
    )
    assert rows[2][1].startswith("not measured yet"), "other models have records of their own"


def test_starts_have_a_table(page: Page, tmp_path: Path) -> None:
    document = json.loads((ROOT / "benchmarks/results/startup_llama-3-8b_plain.json").read_text())
    document["options"] = ["--plan", "/a/b/book.json"]
    (tmp_path / "startup_other_book.json").write_text(json.dumps(document))
    text = page(tmp_path, tmp_path)
    assert "`--plan book.json`; weights in the page cache" in text
    first, second = document["starts"]
    assert f"| kernels in the cache | 1 | {second['weights and cache']:.1f} |" in text
    document["starts"] += [{**first, "weights and cache": 0.4}, second]
    (tmp_path / "startup_other_book.json").write_text(json.dumps(document))
    low, high = 0.4, first["weights and cache"]
    assert f"| nothing compiled | 2 | {(low + high) / 2:.1f} ({low:.1f} to {high:.1f}) |" in page(tmp_path, tmp_path)


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
        pairs += [
            (run["metrics"]["energy_per_token_j"], run["metrics"]["total_tokens_per_s"])
            for run in document.get("runs", ())
            if "metrics" in run
        ]
        for rung in rungs:
            if isinstance(rung.get("tokens_per_s"), list):
                pairs += zip(rung["energy_per_token_j"] or (), rung["tokens_per_s"], strict=False)
        assert all(energy_j is None or energy_j * rate <= limit_w for energy_j, rate in pairs), path.name
