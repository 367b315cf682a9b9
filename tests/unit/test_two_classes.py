"""Interactive requests and background ones: what is counted of each, and the benchmark that measures both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.engine import beside_batch

from nanoflow.run_metrics import RequestRecord
from nanoflow.two_classes import TwoClasses, interactive_of, table, tokens_per_s


def record(
    first_token_s: float | None, *gaps_s: float, num_prompt: int = 10, error: str | None = None
) -> RequestRecord:
    return RequestRecord(
        num_prompt_tokens=10,
        num_requested_tokens=9,
        num_output_tokens=1 + len(gaps_s),
        arrival_s=0.5,
        first_token_s=first_token_s,
        gaps_s=gaps_s,
        error=error,
    )


def test_tokens_count_when_they_come_and_those_of_a_prompt_with_the_first() -> None:
    records = [record(1.0, 1.0, 1.0), record(3.9, 0.2), record(0.9, 1.5), record(None, error="x")]
    # In [1, 4): all of the first, the prompt and a token of the second, a token of the third.
    assert tokens_per_s(records, 1.0, 4.0) == pytest.approx((13 + 11 + 1) / 3)


def test_the_share_is_that_of_what_the_load_leaves() -> None:
    one = interactive_of([record(1.0, 0.2), record(2.0, 0.1), record(None, error="x")])
    assert one.num_requests == 2 and one.ttft_s and one.ttft_s.mean == 1.0
    assert one.itl_s and one.itl_s.mean == pytest.approx(0.15)
    found = TwoClasses(
        load=0.75,
        alone=one,
        together=interactive_of([]),
        batch_alone_tokens_per_s=1000.0,
        batch_tokens_per_s=200.0,
        max_ttft_s=0.3,
        max_itl_s=None,
    )
    assert found.share_of_rest == pytest.approx(0.8)
    lines = list(table(found))
    assert lines[1].split() == ["alone", "1,000.0", "1,490.0", "150.0", "199.0"]
    assert lines[2].split() == ["beside", "batch", "-", "-", "-", "-"] and lines[3].split() == ["limit", "300", "none"]
    assert lines[-1].split()[:5] == ["share", "of", "the", "rest", "80%"]


def test_the_benchmark_runs_both_classes_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    engine = ("--max-num-seqs", "8", "--max-batch-tokens", "64", "--num-pages", "200", "--max-ttft-ms", "500")
    load = ("--workload", "6/4", "--batch-workload", "8/4", "--duration", "0.6", "--request-rate", "10")
    assert beside_batch.main([*engine, *load, "--json", str(path), "--allow-dirty"]) == 0
    assert "share of the rest" in capsys.readouterr().out
    found = json.loads(path.read_text())
    result = found["result"]
    assert result["together"]["num_requests"] == result["alone"]["num_requests"] == 6
    assert result["batch_tokens_per_s"] > 0 and result["max_ttft_s"] == 0.5 and found["options"]["request_rate"] == 10
