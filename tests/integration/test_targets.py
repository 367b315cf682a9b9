"""`benchmarks/targets.py`: several workloads on one engine, a line and a record each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import targets

from nanoflow.bench import offline
from nanoflow.engine import llm

ENGINE_OPTIONS = ("--device", "cpu", "--num-threads", "1", "--max-num-seqs", "2", "--max-batch-tokens", "32")


class CountedLLM(llm.LLM):
    """Counts how often a model is loaded."""

    num_loads = 0

    def __init__(self, **options: Any) -> None:
        CountedLLM.num_loads += 1
        super().__init__(**options)


@pytest.fixture
def counted_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "LLM", CountedLLM)
    CountedLLM.num_loads = 0


def _main(*workloads: str, folder: Path, options: tuple[str, ...] = ()) -> int:
    return targets.main(["--workloads", *workloads, "--json-folder", str(folder), *ENGINE_OPTIONS, *options])


@pytest.mark.usefixtures("counted_llm")
def test_every_workload_gives_a_line_and_the_record_of_bench_throughput(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "lengths.csv"
    trace.write_text("ContextTokens,GeneratedTokens\n5,2\n7,3\n")
    folder = tmp_path / "records"
    assert _main("6/4:20", f"trace:{trace}:2", folder=folder, options=("--seed", "3")) == 0
    assert CountedLLM.num_loads == 1
    steady, whole = capsys.readouterr().out.splitlines()
    assert steady.startswith("6/4 x 20: ") and "; steady " in steady
    assert (steady.count("tok/s"), steady.count("of the serial bound")) == (2, 1)
    assert whole.startswith(f"trace:{trace} x 2: ") and "; no steady state: " in whole

    record = json.loads((folder / "throughput_default_6-4.json").read_text())
    assert record["benchmark"] == "throughput" and record["config"]["max_batch_tokens"] == 32
    assert record["workload"]["workload"] == "6/4" and record["workload"]["seed"] == 3
    assert record["bounds"]["batch"]["num_tokens"] == 32
    (run,) = record["repeats"]
    assert (run["num_completed"], run["num_prompt_tokens"], run["num_output_tokens"]) == (20, 120, 80)
    (run,) = json.loads((folder / "throughput_default_lengths.json").read_text())["repeats"]
    assert (run["num_completed"], run["num_prompt_tokens"], run["num_output_tokens"]) == (2, 12, 5)


@pytest.mark.usefixtures("counted_llm")
def test_repeats_without_bounds_share_the_engine_and_tell_no_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main("3/2:3", folder=tmp_path, options=("--repeats", "3", "--no-bounds")) == 0
    assert CountedLLM.num_loads == 1 and "serial bound" not in capsys.readouterr().out
    record = json.loads((tmp_path / "throughput_default_3-2.json").read_text())
    assert len(record["repeats"]) == 3 and record["bounds"] is None


@pytest.mark.parametrize(
    ("workloads", "message"),
    [
        (["6/4"], "write 6/4:1000"),
        (["trace:lengths.csv"], "write trace:lengths.csv:1000"),
        (["6/4:0"], "num_requests must be at least 1"),
        (["6/4:1", "6/4:2"], "two workloads would be written to"),
    ],
)
def test_workloads_that_make_no_sense_are_refused(
    workloads: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        _main(*workloads, folder=tmp_path)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_failed_requests_are_told_and_give_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_a_failure(*arguments: Any) -> Any:
        for record in run_workloads(*arguments):
            run = dataclasses.replace(record.repeats[0], num_failed=1)
            yield dataclasses.replace(record, repeats=[run])

    run_workloads = offline.run_workloads
    monkeypatch.setattr(targets, "run_workloads", with_a_failure)
    assert _main("3/2:2", folder=tmp_path, options=("--no-bounds",)) == 1
    assert capsys.readouterr().out.endswith("; 1 FAILED\n")
