"""A few hundred of the inputs of `make fuzz`: a server and the loaders of files take them, and nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.robustness import fuzz

from tests.fuzz.clients import Findings


def test_hostile_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "fuzz.json"
    status = fuzz.main(["--num", "200", "--seed", "5", "--json", str(record)])
    found = json.loads(record.read_text())
    assert status == 0, capsys.readouterr().out
    assert found["findings"] == [] and sum(found["num_of"].values()) >= 200
    assert found["health"]["num_polls"] > 0 and found["health"]["num_failed"] == 0
    assert any(name.startswith("body 200") for name in found["num_of"])
    assert any(name.startswith("file config refused") for name in found["num_of"])


def test_a_finding_is_told_with_how_to_have_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(numbers: list[int], findings: Findings, seed: int) -> None:
        findings.add(numbers[0], "it broke")

    monkeypatch.setattr(fuzz, "_fuzz_files", find)
    assert fuzz.main(["--only", "16", "--seed", "9"]) == 1
    told = capsys.readouterr().out
    assert "it broke" in told and "python -m benchmarks.robustness.fuzz --seed 9 --only 16" in told
