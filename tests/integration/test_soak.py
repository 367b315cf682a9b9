"""The soak of `tests/soak.py` on a CPU, short: the one on a GPU is the same and lasts longer."""

from __future__ import annotations

from pathlib import Path

from tests.soak import NUM_RUN_ALONE, make_soak_model, soak


def test_soak(tmp_path: Path) -> None:
    report = soak(make_soak_model(tmp_path), device="cpu", dtype="float32", duration_s=3.0)
    print(report)
    assert report.num_finished > NUM_RUN_ALONE and report.num_cancelled > 0 and report.num_preemptions > 0
    assert report.num_compared == NUM_RUN_ALONE and report.num_ties <= 2
