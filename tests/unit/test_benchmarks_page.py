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


def ladder(workloads: list[dict[str, object]]) -> dict[str, object]:
    """A record of rungs that ran the same batches."""
    return {
        "machine": {"gpus": [{"name": "NVIDIA H200", "power_limit_w": 700.0, "driver_version": "580"}]},
        "software": {"cuda": "13.0", "packages": {"torch": "2.11", "triton": "3.6"}},
        "model": "preset:llama-3-8b",
        "options": {"dtype": "bfloat16", "max_batch_tokens": 2048, "max_num_seqs": 1024},
        "workloads": workloads,
    }


def rung(name: str, gains: list[float], **changes: object) -> dict[str, object]:
    return {
        "rung": name,
        "tokens_per_s": [1000.0 * gain for gain in gains],
        "energy_per_token_j": [0.02] * len(gains),
        "gains": gains,
        "energy_ratios": [0.94, 0.95, 0.93],
        "predicted_gain": 1.08,
        "planned_part": 0.995,
        **changes,
    }


def workload(name: str, rungs: list[dict[str, object]], **changes: object) -> dict[str, object]:
    made = {"num_turns": 8, "turn_s": 1.0, "git_revision": "0123456789abcdef", "has_same_batches": True}
    bounds = {"serial_tokens_per_s": 1020.0, "optimal_tokens_per_s": 2040.0}
    return {"workload": name, **made, **bounds, "rungs": rungs, **changes}


def test_overlap_has_a_row_a_workload_and_a_column_a_mechanism(page: Page, tmp_path: Path) -> None:
    rungs = [
        rung("sequential", [1.0, 1.0, 1.0], planned_part=0.0),
        rung("nano-batches", [0.97, 0.98, 0.96]),
        rung("inside", [1.04, 1.05, 1.06]),
        rung("searched", [1.05, 1.06, 1.055]),
    ]
    old = workload("32/8", rungs, has_same_batches=False, serial_tokens_per_s=990.0)
    (tmp_path / "steady_llama-3-8b.json").write_text(json.dumps(ladder([workload("64/8", rungs), old])))
    text = page(tmp_path, tmp_path)
    assert "### llama-3-8b, token budget 2,048, on NVIDIA H200, 700 W, driver 580" in text
    heading = "| workload | sequential tokens/s | of parts alone | nano-batches | stream | partition | beside | inside "
    assert heading in text
    gains = "0.970 |  |  |  | 1.050 | 1.055 (1.050 to 1.060) | 1.080 | 0.940 | 100% |"
    assert f"| 64/8 | 1,000 | 98.0% | {gains}" in text
    assert f"| 32/8 | 1,000 | 101.0% (no bound) | {gains}" in text
    assert "of other mixes of prompts and decodes: 32/8." in text
    assert "it gains 5.5% with llama-3-8b" in text and "revisions 0123456789ab" in text


def test_what_ran_sequentially_is_named_so(page: Page, tmp_path: Path) -> None:
    document = json.loads((ROOT / "benchmarks/results/ladder/steady_llama-3.2-1b.json").read_text())
    (tmp_path / "steady_llama-3.2-1b.json").write_text(json.dumps(document))
    text = page(tmp_path, tmp_path)
    rows = [line for line in text.splitlines() if ", sequential |" in line]
    assert len(rows) == 9 and "With llama-3.2-1b overlap gains nothing on 9 workloads" in text
    searched = document["workloads"][0]["rungs"][-1]
    assert searched["rung"] == "searched" and f"| {sum(searched['gains']) / 3:.3f} (" in rows[0]
    searched["planned_part"] = 0.01
    (tmp_path / "steady_llama-3.2-1b.json").write_text(json.dumps(document))
    text = page(tmp_path, tmp_path)
    assert text.count(", sequential |") == 8 and "gains nothing" not in text


def test_records_of_history_are_not_on_the_page(page: Page, tmp_path: Path) -> None:
    """They are in the log; the page is a summary."""
    for folder, name in (("ladder", "ladder_llama-3-8b.json"), ("ablation", "llama-3-8b_1024-512_nano-batches.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes((ROOT / "benchmarks/results" / folder / name).read_bytes())
    (tmp_path / "overlap.svg").write_text("<svg/>")
    text = page(tmp_path, tmp_path)
    assert "|" not in text and "![" in text and "(pictures/overlap.svg)" in text and text.count("![") == 1


def test_the_page_is_short(page: Page) -> None:
    lines = page(ROOT / "benchmarks/results", ROOT / "docs/pictures").splitlines()
    # Tables grow with the records.
    assert sum(line[:1] != "|" for line in lines) <= 175
    assert max(len(line) for line in lines if line[:1] not in ("|", "*", "B")) <= 121


def test_where_the_speed_comes_from_is_read_from_records(tmp_path: Path, page: Page) -> None:
    import summary

    results = ROOT / "benchmarks/results"
    assert summary.where_speed_comes_from(tmp_path) == ""
    for name in ("peers.json", "throughput_llama-3-8b_512-512.json", "whole_runs_llama-3-8b_1024-512.json"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    peers = json.loads((results / "peers.json").read_text())
    there = next(each["total_tokens_per_s"] for each in peers["runs"] if each["workload"] == "512/512")
    run = json.loads((results / "throughput_llama-3-8b_512-512.json").read_text())
    rate = sorted(repeat["total_tokens_per_s"] for repeat in run["repeats"])[1]
    text = " ".join(summary.where_speed_comes_from(tmp_path).split())
    assert f"makes {rate / there:.2f} times the tokens/s of vLLM 0.26.0 with llama-3-8b (1 workload" in text
    assert "**Overlap** in whole runs" in text and "1024/512 x 800: 1.024 to 1.026." in text
    assert "middle of a run" not in text
    record = json.loads((results / "whole_runs_llama-3-8b_1024-512.json").read_text())
    for each in record["results"]:
        each["planned_part"] = 0.0
    (tmp_path / "whole_runs_llama-3-8b_1024-512.json").write_text(json.dumps(record))
    assert "Overlap" not in summary.where_speed_comes_from(tmp_path), "no plan ran, so nothing was overlapped"


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
        "at 20/s: first token 20 ms, longest gap 20 ms (40 requests, 3 repeats); "
        "all at once: 1,000 tokens/s (40 requests, 1 repeat)"
    )
    assert rows[1][3] == "serving_llama-3-8b_20 serving_llama-3-8b_at-once"
    assert rows[3][1] == (
        "1024/512: 1.080 times the tokens/s (1.080 to 1.080) (1,400 requests, 3 repeats); "
        "512/512: 1.050 times the tokens/s (1.050 to 1.050) (1,400 requests, 3 repeats)"
    )
    assert rows[2][1].startswith("not measured yet"), "other models have records of their own"
    assert rows[0][1].startswith("not measured yet")
    for name in ("throughput_llama-3-8b_512-512.json", "throughput_llama-3-8b_lmsys.json", "peers.json"):
        (tmp_path / name).write_bytes((ROOT / "benchmarks/results" / name).read_bytes())
    ours = [json.loads((tmp_path / f"throughput_llama-3-8b_{name}.json").read_text()) for name in ("512-512", "lmsys")]
    first, second = (sorted(run["total_tokens_per_s"] for run in each["repeats"]) for each in ours)
    said = next(records.readme_rows(tmp_path))[1]
    assert said.startswith(f"512/512: {first[1]:,.0f} tokens/s (1,100 requests, 3 repeats), 1.16x vLLM")
    assert f"; lmsys: {second[0]:,.0f} tokens/s (4,000 requests, 1 repeat), 1.29x vLLM" in said


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
    assert f"{entry['total_tokens_per_s']:,}" in row and "## Overlap" not in text
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
    for types in ({"quantization": "fp8"}, {"kv_cache_dtype": "fp8_e4m3"}):
        changed = {**record, "config": {**record["config"], **types}}
        (tmp_path / "throughput_llama-3-8b_512-512.json").write_text(json.dumps(changed))
        whole_runs = page(tmp_path, tmp_path).partition("## Peers")[0]
        assert "x vLLM" not in whole_runs, types


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
