"""Throughput in process: all requests at once through `LLM.generate`, as fast as the engine goes.

Completions are greedy, of fixed length (end of sequence ignored) and not decoded to text. Requests over HTTP, with
arrivals in time, are `online.py`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanoflow.bench.config import BenchConfig
from nanoflow.bench.metrics import RequestRecord, RunMetrics, measure, parse_limits
from nanoflow.bench.record import BenchRecord, make_record
from nanoflow.bench.workload import BenchRequest, draw_lengths, make_requests
from nanoflow.config import EngineConfig
from nanoflow.device.energy import gpu_energy_j
from nanoflow.outputs import FinishReason, RequestOutput
from nanoflow.request import SamplingParams

if TYPE_CHECKING:
    from nanoflow.engine.llm import LLM
    from nanoflow.engine.messages import EngineFacts


def run_throughput(engine_config: EngineConfig, config: BenchConfig) -> BenchRecord:
    """Load the engine, warm it up, measure every repeat.

    Raises:
        ValueError: The model, the workload or a limit is not usable.
        EngineError: The engine cannot start, or died.
    """
    limits_ms = parse_limits(config.goodput)
    lengths = draw_lengths(config.workload, config.num_requests, config.seed)
    from nanoflow.engine.llm import LLM

    with LLM(**dataclasses.asdict(engine_config)) as llm:
        runs = [
            make_requests(lengths, vocab_size=llm.facts.vocab_size, seed=config.seed, repeat=repeat)
            for repeat in range(config.repeats)
        ]
        if config.num_warmup:
            _generate(llm, runs[0][: config.num_warmup], use_tqdm=False)
        repeats = [_measure_run(llm, requests, limits_ms) for requests in runs]
        return make_record(
            "throughput",
            model=_model_facts(engine_config, llm.facts),
            plan=llm.facts.plan,
            workload=config,
            config=engine_config,
            repeats=repeats,
        )


def _measure_run(llm: LLM, requests: Sequence[BenchRequest], limits_ms: dict[str, float]) -> RunMetrics:
    start_j, start_s = gpu_energy_j(), time.monotonic()
    outputs = _generate(llm, requests, use_tqdm=True)
    duration_s, end_j = time.monotonic() - start_s, gpu_energy_j()
    energy_j = None if start_j is None or end_j is None else end_j - start_j
    records = [_record(*pair) for pair in zip(requests, outputs, strict=True)]
    return measure(records, duration_s, limits_ms, energy_j=energy_j)


def _generate(llm: LLM, requests: Sequence[BenchRequest], *, use_tqdm: bool) -> list[RequestOutput]:
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=request.num_output_tokens, detokenize=False)
        for request in requests
    ]
    return llm.generate([request.prompt_token_ids for request in requests], params, use_tqdm=use_tqdm)


def _record(request: BenchRequest, output: RequestOutput) -> RequestRecord:
    """What happened to a request, from the times that the engine noted."""
    (completion,), times = output.outputs, output.metrics
    num_prompt_tokens, num_requested_tokens = len(request.prompt_token_ids), request.num_output_tokens
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


def _model_facts(config: EngineConfig, facts: EngineFacts) -> dict[str, object]:
    return {"name": config.model, "weights": config.load_format, **dataclasses.asdict(facts)}
