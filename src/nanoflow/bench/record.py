"""The record of a run: one JSON document with everything needed to judge or repeat it, and a table for people.

Keys name the units; every repeat is included. `run_metrics.py` defines the metrics.
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

from nanoflow.bench.bound import Bounds
from nanoflow.bench.machine import Machine, Software, detect_machine, detect_software
from nanoflow.bench.options import BenchConfig
from nanoflow.bench.processes import ProcessState
from nanoflow.bench.provenance import command, portable_options
from nanoflow.run_metrics import Distribution, RunMetrics

RECORD_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRecord:
    """A benchmark run.

    Attributes:
        benchmark: "throughput" (in process) or "serve" (over HTTP; `machine` is then the client's).
        created_utc: ISO 8601.
        machine, software: What it ran on.
        model: The model under test, as far as known; for an engine in process its `EngineFacts`. `book` has the plans.
        plan: Name and digest of the pipeline plan, or digest of the plan book, that ran; None if unknown.
        workload: The benchmark's options.
        config: The options of the engine, or of the load put on a server.
        repeats: One entry for each repeat.
        bounds: Bounds of the throughput; None if not measured.
        command: The command line.
        settings: Every option of the engine as it ran, with the limits it chose (`settings_of`); None over HTTP.
        processes: The processes that computed, with their peak memory. Over HTTP those of the server, if it is on this
            machine. Empty if unknown.
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
    bounds: Bounds | None = None
    command: str = ""
    settings: Mapping[str, Any] | None = None
    processes: Sequence[ProcessState] = ()
    version: int = RECORD_VERSION


def make_record(
    benchmark: str,
    *,
    model: Mapping[str, Any],
    plan: str | None,
    workload: BenchConfig,
    config: Any,
    repeats: Sequence[RunMetrics],
    bounds: Bounds | None = None,
    settings: Mapping[str, Any] | None = None,
    processes: Sequence[ProcessState] = (),
) -> BenchRecord:
    """Make the record of a run that has just ended on this machine."""
    return BenchRecord(
        benchmark=benchmark,
        created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=detect_machine(),
        software=detect_software(),
        model=model,
        plan=plan,
        # The path of the record is no property of the run.
        workload=portable_options(dataclasses.replace(workload, json=None)),
        config=portable_options(config) if dataclasses.is_dataclass(config) else config,
        repeats=repeats,
        bounds=bounds,
        command=command(),
        settings=settings,
        processes=processes,
    )


def write_record(record: BenchRecord, path: Path) -> None:
    """Write the record as JSON; an infinite request rate is null there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def format_table(
    repeats: Sequence[RunMetrics], bounds: Bounds | None = None, processes: Sequence[ProcessState] = ()
) -> str:
    """A table of the run: rates as median (and range) over repeats, latencies of the median repeat."""
    middle = sorted(repeats, key=lambda run: run.total_tokens_per_s)[len(repeats) // 2]
    bound_lines = ["", *_bound_lines(bounds)] if bounds is not None else []
    return "\n".join(
        [
            *_rate_lines(repeats),
            *_memory_lines(processes),
            *bound_lines,
            "",
            *_latency_lines(middle),
            *_warning_lines(repeats),
        ],
    )


def _rate_lines(repeats: Sequence[RunMetrics]) -> Iterator[str]:
    steady = [run.steady for run in repeats if run.steady is not None]
    rows: tuple[tuple[str, int, list[float | None]], ...] = (
        ("requests completed", 0, [run.num_completed for run in repeats]),
        ("requests failed", 0, [run.num_failed for run in repeats]),
        ("duration (s)", 2, [run.duration_s for run in repeats]),
        ("total tokens/s", 2, [run.total_tokens_per_s for run in repeats]),
        ("output tokens/s", 2, [run.output_tokens_per_s for run in repeats]),
        ("requests/s", 2, [run.requests_per_s for run in repeats]),
        ("energy (mJ/token)", 2, [_times(1e3, run.energy_per_token_j) for run in repeats]),
        ("of the serial bound (%)", 1, [_times(100, run.share_of_serial) for run in repeats]),
        ("of the optimum (%)", 1, [_times(100, run.share_of_optimal) for run in repeats]),
        ("goodput (requests/s)", 2, [run.goodput_requests_per_s for run in repeats]),
        ("steady: duration (s)", 2, [part.duration_s for part in steady]),
        ("steady: total tokens/s", 2, [part.total_tokens_per_s for part in steady]),
        ("steady: energy (mJ/token)", 2, [_times(1e3, part.energy_per_token_j) for part in steady]),
    )
    for label, digits, column in rows:
        values = [value for value in column if value is not None]
        if values:
            low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
            spread = f"   ({low} to {high})" if low != high else ""
            yield f"{label:<28}{statistics.median(values):>12,.{digits}f}{spread}"


def _memory_lines(processes: Sequence[ProcessState]) -> Iterator[str]:
    for state in processes:
        yield f"{f'peak memory (MiB), {state.role}':<28}{state.peak_rss_bytes / 2**20:>12,.0f}"


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else value * factor


def _bound_lines(bounds: Bounds) -> Iterator[str]:
    """The bounds, and the sizes and clocks that they were measured at."""
    batch = bounds.batch
    decodes = f"{batch.num_decodes} decodes of {batch.decode_context:,} tokens"
    prefills = f"{batch.num_prefills} x {batch.prefill_tokens:,} tokens after {batch.prefill_before:,}"
    rows: tuple[tuple[str, float | None, str], ...] = (
        ("serial bound (tokens/s)", bounds.serial_tokens_per_s, f"sum of parts alone{_state(bounds)}"),
        ("optimal (tokens/s)", bounds.optimal_tokens_per_s, "the GEMMs alone"),
        ("serial bound (mJ/token)", _times(1e3, bounds.serial_energy_per_token_j), ""),
        ("optimal (mJ/token)", _times(1e3, bounds.optimal_energy_per_token_j), ""),
        ("GEMMs (TFLOP/s)", bounds.gemm_tflops, f"{batch.num_tokens:,} tokens"),
        ("lm_head (TFLOP/s)", bounds.lm_head_tflops, f"{batch.num_logit_rows:,} rows"),
        ("decode attention (GB/s)", _times(1e-9, bounds.decode_kv_bytes_per_s), decodes),
        ("prefill attention (TFLOP/s)", bounds.prefill_tflops, prefills),
    )
    for label, value, remark in rows:
        if value is not None:
            yield f"{label:<28}{value:>12,.2f}   {remark}".rstrip()


def _state(bounds: Bounds) -> str:
    """Clocks and power during the measurement of the parts, as far as known."""
    power_w = bounds.serial_power_w
    power = "" if power_w is None else f", {power_w:,.0f} W on average"
    return f"{power}{''.join(f', {part} at {clock:,.0f} MHz' for part, clock in bounds.clocks_mhz.items())}"


def _latency_lines(run: RunMetrics) -> Iterator[str]:
    rows: tuple[tuple[str, Distribution | None], ...] = (
        ("TTFT", run.ttft_s),
        ("TPOT", run.tpot_s),
        ("ITL", run.itl_s),
        ("longest gap of a request", run.longest_gap_s),
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
        if run.share_of_serial is not None and run.share_of_serial > 1:
            yield f"repeat {number}: faster than the sum of parts alone, which is no bound here"
        if run.energy_dropped is not None:
            yield f"repeat {number}: {run.energy_dropped}"
        if run.no_steady_reason is not None:
            yield f"repeat {number}: no steady state: {run.no_steady_reason}"
