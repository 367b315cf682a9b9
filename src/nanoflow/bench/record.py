"""The record of a run: one JSON document with everything needed to judge or repeat it, and a table for people.

Units stand in the keys; every repeat is there. What the numbers mean: `metrics.py`.
"""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nanoflow.bench.config import BenchConfig
from nanoflow.bench.machine import Machine, Software, detect_machine, detect_software
from nanoflow.bench.metrics import Distribution, RunMetrics

RECORD_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRecord:
    """A benchmark run.

    Attributes:
        benchmark: "throughput" (in process) or "serve" (over HTTP, `machine` being the client's).
        created_utc: ISO 8601.
        machine, software: What it ran on.
        model: The model under test, as far as known.
        plan: Name and digest of the pipeline plan that the engine runs; None if unknown.
        workload: The benchmark's options.
        config: The options of the engine, or of the load put on a server.
        repeats: One entry each.
    """

    benchmark: str
    created_utc: str
    machine: Machine
    software: Software
    model: Mapping[str, Any]
    plan: str | None
    workload: BenchConfig
    config: Any
    repeats: Sequence[RunMetrics]
    version: int = RECORD_VERSION


def make_record(
    benchmark: str,
    *,
    model: Mapping[str, Any],
    plan: str | None,
    workload: BenchConfig,
    config: Any,
    repeats: Sequence[RunMetrics],
) -> BenchRecord:
    """A record of a run that has just ended on this machine."""
    return BenchRecord(
        benchmark=benchmark,
        created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=detect_machine(),
        software=detect_software(),
        model=model,
        plan=plan,
        # Where the record is written says nothing about the run.
        workload=dataclasses.replace(workload, json=None),
        config=config,
        repeats=repeats,
    )


def write_record(record: BenchRecord, path: Path) -> None:
    """Write the record as JSON; an infinite request rate is null there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def format_table(repeats: Sequence[RunMetrics]) -> str:
    """The run for people: rates as median (and range) of the repeats, latencies of the repeat in the middle."""
    middle = sorted(repeats, key=lambda run: run.total_tokens_per_s)[len(repeats) // 2]
    return "\n".join([*_rate_lines(repeats), "", *_latency_lines(middle), *_warning_lines(repeats)])


def _rate_lines(repeats: Sequence[RunMetrics]) -> Iterator[str]:
    rows: tuple[tuple[str, int, list[float | None]], ...] = (
        ("requests completed", 0, [run.num_completed for run in repeats]),
        ("requests failed", 0, [run.num_failed for run in repeats]),
        ("duration (s)", 2, [run.duration_s for run in repeats]),
        ("total tokens/s", 2, [run.total_tokens_per_s for run in repeats]),
        ("output tokens/s", 2, [run.output_tokens_per_s for run in repeats]),
        ("requests/s", 2, [run.requests_per_s for run in repeats]),
        ("energy (mJ/token)", 2, [_milli(run.energy_per_token_j) for run in repeats]),
        ("goodput (requests/s)", 2, [run.goodput_requests_per_s for run in repeats]),
    )
    for label, digits, column in rows:
        values = [value for value in column if value is not None]
        if values:
            low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
            spread = f"   ({low} to {high})" if low != high else ""
            yield f"{label:<28}{statistics.median(values):>12,.{digits}f}{spread}"


def _milli(value: float | None) -> float | None:
    return None if value is None else value * 1e3


def _latency_lines(run: RunMetrics) -> Iterator[str]:
    rows: tuple[tuple[str, Distribution | None], ...] = (
        ("TTFT", run.ttft_s),
        ("TPOT", run.tpot_s),
        ("ITL", run.itl_s),
        ("latency", run.latency_s),
        ("normalized latency", run.normalized_latency_s),
    )
    yield f"{'milliseconds':<28}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}"
    for label, spread in rows:
        if spread is not None:
            cells = (spread.mean, spread.p50, spread.p90, spread.p99)
            yield f"{label:<28}" + "".join(f"{value_s * 1e3:>12,.2f}" for value_s in cells)


def _warning_lines(repeats: Sequence[RunMetrics]) -> Iterator[str]:
    for number, run in enumerate(repeats):
        for message, count in run.errors.items():
            yield f"repeat {number}: {count} failed: {message}"
        if run.num_short:
            yield f"repeat {number}: {run.num_short} requests gave fewer tokens than asked for"
