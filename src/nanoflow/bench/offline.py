"""Throughput in process: all requests at once through `LLM.generate`.

Completions have a fixed length (the end of sequence is ignored). They are greedy and not decoded to text unless options
say otherwise. The bounds of the device are measured before the run (`rates.py`). Iterations are observed during it,
for its rate in the steady state (`measurement_window.py`). `online.py` sends requests over HTTP, at times of arrival.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nanoflow.bench.bound import Bounds
from nanoflow.bench.measurement_window import NoSteadyState, ProgressRecorder, find_window, steady_state
from nanoflow.bench.options import BenchConfig, ThroughputConfig
from nanoflow.bench.processes import processes_of
from nanoflow.bench.provenance import facts_of, settings_of
from nanoflow.bench.record import BenchRecord, make_record
from nanoflow.config import EngineConfig
from nanoflow.device.energy import energy_of, gpu_power_limit_w
from nanoflow.models.presets import preset_name
from nanoflow.outputs import FinishReason, RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.run_metrics import RequestRecord, RunMetrics, measure, parse_limits
from nanoflow.workload import BenchRequest, Lengths, draw_lengths, make_requests

if TYPE_CHECKING:
    from nanoflow.engine.llm import LLM


def run_throughput(engine_config: EngineConfig, config: ThroughputConfig) -> BenchRecord:
    """Measure the bounds, load the engine, warm it up, measure every repeat.

    Raises:
        ValueError: The model, the workload or a limit is invalid.
        EngineError: The engine cannot start, or died.
    """
    (record,) = run_workloads(engine_config, [config])
    return record


def run_workloads(engine_config: EngineConfig, configs: Sequence[ThroughputConfig]) -> Iterator[BenchRecord]:
    """The same for several workloads on one engine, which is loaded once; yields each record when it is complete.

    All bounds are measured first, while the device is empty. Weights are random if one of the workloads asks for that.

    Raises:
        ValueError, EngineError: As `run_throughput`; everything that can be checked in advance is, for all workloads.
    """
    all_limits_ms = [parse_limits(config.goodput) for config in configs]
    all_lengths = [draw_lengths(config.workload, config.num_requests, config.seed) for config in configs]
    if any(config.random_weights for config in configs) or preset_name(engine_config.model) is not None:
        engine_config = dataclasses.replace(engine_config, load_format="random")
    # Imported here, as it needs torch.
    from nanoflow.bench.rates import measure_bounds
    from nanoflow.engine.llm import LLM

    all_bounds = [
        measure_bounds(engine_config, lengths) if config.bounds else None
        for config, lengths in zip(configs, all_lengths, strict=True)
    ]
    with LLM(**dataclasses.asdict(engine_config)) as llm:
        settings = settings_of(engine_config, llm.facts)
        for config, lengths, limits_ms, bounds in zip(configs, all_lengths, all_limits_ms, all_bounds, strict=True):
            yield make_record(
                "throughput",
                model={
                    "name": engine_config.model,
                    "weights": engine_config.load_format,
                    **facts_of(llm.facts),
                },
                plan=llm.facts.plan,
                workload=config,
                config=engine_config,
                repeats=[with_shares(run, bounds) for run in _measure_repeats(llm, config, lengths, limits_ms)],
                bounds=bounds,
                settings=settings,
                processes=processes_of([os.getpid()]),
            )


def _measure_repeats(
    llm: LLM, config: ThroughputConfig, lengths: Sequence[Lengths], limits_ms: dict[str, float]
) -> list[RunMetrics]:
    """Warm up, then measure every repeat of one workload."""
    runs = [
        make_requests(lengths, vocab_size=llm.facts.vocab_size, seed=config.seed, repeat=repeat)
        for repeat in range(config.repeats)
    ]
    if config.num_warmup:
        _generate(llm, config, runs[0][: config.num_warmup], use_tqdm=False)
    power_limit_w = gpu_power_limit_w(llm.facts.device)
    return [without_impossible_energy(_measure_run(llm, config, each, limits_ms), power_limit_w) for each in runs]


def _measure_run(
    llm: LLM, config: ThroughputConfig, requests: Sequence[BenchRequest], limits_ms: dict[str, float]
) -> RunMetrics:
    recorder = ProgressRecorder()
    llm.observe(recorder)
    with energy_of(llm.facts.device) as energy:
        start_s = time.monotonic()
        outputs = _generate(llm, config, requests, use_tqdm=sys.stderr.isatty())
        stop_s = time.monotonic()
    records = [
        record_of_output(output, request.num_output_tokens) for request, output in zip(requests, outputs, strict=True)
    ]
    run = dataclasses.replace(
        measure(records, stop_s - start_s, limits_ms, energy_j=energy.used_j(start_s, stop_s)),
        plan_iterations=recorder.plan_iterations,
    )
    try:
        window = find_window(recorder.progress, stop_s - start_s)
    except NoSteadyState as reason:
        return dataclasses.replace(run, no_steady_reason=str(reason))
    return dataclasses.replace(run, steady=steady_state(window, energy))


def with_shares(run: RunMetrics, bounds: Bounds | None) -> RunMetrics:
    """The run with its rate relative to the bounds, if there are any."""
    if bounds is None:
        return run
    return dataclasses.replace(
        run,
        share_of_serial=run.total_tokens_per_s / bounds.serial_tokens_per_s,
        share_of_optimal=run.total_tokens_per_s / bounds.optimal_tokens_per_s,
    )


def without_impossible_energy(run: RunMetrics, power_limit_w: float | None) -> RunMetrics:
    """The run without energies that are impossible at the card's power limit: its counter was wrong.

    Args:
        run: One repeat.
        power_limit_w: Power limit of the card; None if unknown.
    """
    reason = impossible_power(run.energy_per_token_j, run.total_tokens_per_s, power_limit_w)
    if reason is not None:
        run = dataclasses.replace(run, energy_per_token_j=None, energy_dropped=reason)
    if run.steady is None:
        return run
    steady = run.steady
    reason = impossible_power(steady.energy_per_token_j, steady.total_tokens_per_s, power_limit_w)
    if reason is None:
        return run
    return dataclasses.replace(
        run, steady=dataclasses.replace(steady, energy_per_token_j=None), energy_dropped=run.energy_dropped or reason
    )


def impossible_power(energy_per_token_j: float | None, tokens_per_s: float, power_limit_w: float | None) -> str | None:
    """Why an energy is impossible: its mean power exceeds the card's limit. None if it is possible or unknown."""
    if energy_per_token_j is None or power_limit_w is None:
        return None
    power_w = energy_per_token_j * tokens_per_s
    if power_w <= power_limit_w:
        return None
    return f"energy dropped: {power_w:.1f} W on average is above the card's limit of {power_limit_w:.0f} W"


def _generate(
    llm: LLM, config: ThroughputConfig, requests: Sequence[BenchRequest], *, use_tqdm: bool
) -> list[RequestOutput]:
    params = [params_of(config, request.num_output_tokens, has_text=config.text) for request in requests]
    return llm.generate([request.prompt_token_ids for request in requests], params, use_tqdm=use_tqdm)


def params_of(config: BenchConfig, num_output_tokens: int, *, has_text: bool) -> SamplingParams:
    """The sampling parameters of a request for that many tokens."""
    return SamplingParams(
        **{
            **config.sampling,
            "min_tokens": min(config.min_tokens, num_output_tokens),
            "max_tokens": num_output_tokens,
            # If the end of sequence is ignored, nothing can end a completion early.
            "ignore_eos": not config.min_tokens,
            "detokenize": has_text,
        }
    )


def record_of_output(output: RequestOutput, num_requested_tokens: int) -> RequestRecord:
    """The record of a request, from the times that the engine noted."""
    (completion,), times = output.outputs, output.metrics
    num_prompt_tokens = len(output.prompt_token_ids)
    if completion.finish_reason is FinishReason.ERROR or not completion.token_ids:
        error = output.error or f"no token, finish reason {completion.finish_reason}"
        return RequestRecord(
            num_prompt_tokens=num_prompt_tokens, num_requested_tokens=num_requested_tokens, error=error
        )
    if times is None or times.first_token_s is None or times.finished_s is None:
        raise ValueError(f"the engine noted no times for request {output.request_id}")
    return RequestRecord(
        num_prompt_tokens=num_prompt_tokens,
        num_requested_tokens=num_requested_tokens,
        num_output_tokens=len(completion.token_ids),
        arrival_s=times.arrival_s,
        first_token_s=times.first_token_s,
        finished_s=times.finished_s,
    )
