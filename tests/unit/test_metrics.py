"""Metrics: names, labels, counts, and gauges that follow the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanoflow.config import EngineConfig
from nanoflow.engine.book_facts import BookFacts, PlanName
from nanoflow.engine.limits import choose_limits
from nanoflow.engine.messages import ClassCounts, EngineStats
from nanoflow.engine.observer import FinishedRequest, Observer
from nanoflow.hardware import LocalDevice
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.outputs import FinishReason
from nanoflow.server.counters import MAX_COUNTERS, Counters, Histogram, shared_rows
from nanoflow.server.metrics import ServerMetrics, token_count_buckets
from tests.fake_async_engine import FakeAsyncEngine

EXPECTED_NAMES = {
    "num_requests_running_by_priority",
    "num_requests_waiting_by_priority",
    "tokens_by_priority_total",
    "num_preemptions_by_priority_total",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "iteration_tokens_total_count",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "request_time_per_output_token_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "request_inference_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
    "request_prompt_tokens_count",
    "request_generation_tokens_count",
    "request_max_num_generation_tokens_count",
    "request_params_n_count",
    "request_params_max_tokens_count",
    "request_num_preemptions_count",
}


def metrics_of(engine: FakeAsyncEngine) -> ServerMetrics:
    return ServerMetrics(engine, prefix="nanoflow", model_name="toy")


def values(metrics: ServerMetrics) -> dict[str, float]:
    """Value of each series by name without prefix; a finish reason is added to the name."""
    return {
        sample.name.removeprefix("nanoflow:") + sample.labels.get("finished_reason", ""): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def finished(reason: FinishReason = FinishReason.LENGTH, *, n: int = 1, num_tokens: int = 5) -> FinishedRequest:
    return FinishedRequest(
        reason=reason,
        num_prompt_tokens=7,
        num_generated_tokens=num_tokens,
        longest_completion_tokens=num_tokens,
        n=n,
        max_tokens=None,
        num_preemptions=2,
        queue_s=0.1,
        prefill_s=0.2,
        decode_s=0.4,
        inference_s=0.6,
        tpot_s=None,
        e2e_s=0.7,
    )


def test_names_that_dashboards_ask_for() -> None:
    names = {
        name.removesuffix(reason.value) for name in values(metrics_of(FakeAsyncEngine())) for reason in FinishReason
    }
    assert names >= EXPECTED_NAMES


def test_labels_and_prefix() -> None:
    text = ServerMetrics(FakeAsyncEngine(), prefix="vllm", model_name="toy").render().decode()
    assert 'vllm:num_requests_running{engine="0",model_name="toy"} 0.0' in text
    assert 'vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="toy"} 0.0' in text


def test_gauges_follow_the_engine() -> None:
    engine = FakeAsyncEngine()
    metrics = metrics_of(engine)
    engine.num_running = 16
    busy = values(metrics)
    assert (busy["num_requests_running"], busy["kv_cache_usage_perc"]) == (16, 0.25)
    engine.num_running = 0
    idle = values(metrics)
    assert (idle["num_requests_running"], idle["kv_cache_usage_perc"]) == (0, 0)


def test_a_request_is_counted_once_everywhere() -> None:
    metrics = metrics_of(FakeAsyncEngine())
    observer: Observer = metrics
    observer.observe_first_token(0.3, num_prompt_tokens=7)
    observer.observe_tokens(1)
    for _ in range(2):
        observer.observe_tokens(2)
        observer.observe_next_tokens([0.01, 0.02])
    observer.observe_finished(finished())
    seen = values(metrics)
    assert (seen["prompt_tokens_total"], seen["generation_tokens_total"]) == (7, 5)
    assert (seen["inter_token_latency_seconds_count"], seen["time_to_first_token_seconds_count"]) == (4, 1)
    assert (seen["request_success_totallength"], seen["request_success_totalstop"]) == (1, 0)
    assert (seen["e2e_request_latency_seconds_sum"], seen["request_inference_time_seconds_sum"]) == (0.7, 0.6)
    assert (seen["request_params_max_tokens_count"], seen["request_time_per_output_token_seconds_count"]) == (0, 0)
    assert (seen["request_num_preemptions_sum"], seen["request_prompt_tokens_sum"]) == (2, 7)


def test_tokens_are_counted_when_they_come_and_not_made_up_at_the_end() -> None:
    metrics = metrics_of(FakeAsyncEngine())
    metrics.observe_first_token(0.3, num_prompt_tokens=7)
    metrics.observe_tokens(3)
    assert values(metrics)["generation_tokens_total"] == 3
    metrics.observe_finished(finished(FinishReason.ABORT, n=8, num_tokens=3))
    assert values(metrics)["generation_tokens_total"] == 3


def test_iterations_and_preemptions_are_counted() -> None:
    engine = FakeAsyncEngine()
    metrics = metrics_of(engine)
    for num_preemptions in (0, 2, 2, 3):
        engine.num_preemptions = num_preemptions
        metrics.observe_step(EngineStats(num_preemptions=num_preemptions, iteration_tokens=8, prefill_ends=1))
    seen = values(metrics)
    assert seen["num_preemptions_total"] == 3
    assert (seen["iteration_tokens_total_count"], seen["iteration_tokens_total_sum"]) == (4, 36)


def test_plans_are_named_and_their_iterations_counted() -> None:
    plans = (PlanName(name="sequential", digest="zz"), PlanName(name="overlapped", digest="bb"))
    engine = FakeAsyncEngine()
    engine.facts = dataclasses.replace(engine.facts, book=BookFacts(digest="cc", plans=plans))
    metrics = metrics_of(engine)
    for digest in ("zz", "bb", "bb", None):
        metrics.observe_step(EngineStats(iteration_tokens=8, plan_digest=digest))
    lines = metrics.render().decode().splitlines()
    labels = 'engine="0",model_name="toy"'
    assert [line for line in lines if line.startswith("nanoflow:plan_info{")] == [
        f'nanoflow:plan_info{{book="cc",digest="zz",{labels},name="sequential"}} 1.0',
        f'nanoflow:plan_info{{book="cc",digest="bb",{labels},name="overlapped"}} 1.0',
    ]
    assert [line for line in lines if line.startswith("nanoflow:iterations_total{")] == [
        f'nanoflow:iterations_total{{digest="zz",{labels},plan="sequential"}} 1.0',
        f'nanoflow:iterations_total{{digest="bb",{labels},plan="overlapped"}} 2.0',
    ]
    assert metrics.plan_iterations() == {"zz": 1, "bb": 2}


def test_limits_are_said_with_where_they_come_from() -> None:
    engine = FakeAsyncEngine()
    assert "limits_info" not in metrics_of(engine).render().decode()
    config = EngineConfig(max_num_seqs=7, max_itl_ms=12.5)
    place = LocalDevice(name="the CPU", is_gpu=False, memory_bytes=2**34, free_bytes=2**33, flops_per_s=1e12)
    graph = build_graph(preset_config("llama-3.2-1b"), None)
    limits = choose_limits(config, graph, place, max_model_len=64, dtype_bytes=4)
    engine.facts = dataclasses.replace(engine.facts, limits=limits)
    (line,) = [line for line in metrics_of(engine).render().decode().splitlines() if "nanoflow:limits_info{" in line]
    for label in (
        'goal="balanced"',
        'max_batch_tokens="512"',
        'max_batch_tokens_origin="chosen"',
        'max_num_seqs="7"',
        'max_num_seqs_origin="given"',
        'max_itl_ms="12.5"',
        'max_itl_ms_origin="given"',
        f'reason="{limits.reason}"',
    ):
        assert label in line
    assert line.endswith("} 1.0")
    unbound = dataclasses.replace(limits, max_itl_ms=None)
    engine.facts = dataclasses.replace(engine.facts, limits=unbound)
    assert 'max_itl_ms="none"' in metrics_of(engine).render().decode()


def test_token_buckets_end_at_the_context_length() -> None:
    assert token_count_buckets(130) == (1, 2, 5, 10, 20, 50, 100)
    assert token_count_buckets(1) == (1,)


# Several front ends


@pytest.fixture
def rows() -> Iterator[int]:
    with shared_rows(3) as file:
        yield file


def test_counts_of_all_front_ends_add_up_and_the_engines_state_does_not(rows: int) -> None:
    engine = FakeAsyncEngine()
    engine.num_running, engine.num_preemptions = 16, 3
    several = [
        ServerMetrics(engine, prefix="nanoflow", model_name="toy", counters=Counters(rows, number))
        for number in range(3)
    ]
    alone = metrics_of(engine)
    for number, metrics in enumerate(several):
        for seen in (metrics, alone):
            seen.observe_first_token(0.3 * number, num_prompt_tokens=7)
            seen.observe_next_tokens([0.01, 0.02, 99.0])
            seen.observe_step(EngineStats(iteration_tokens=8))
            seen.observe_finished(finished())
    for metrics in several:
        assert values(metrics) == values(alone)


@pytest.mark.parametrize("row", [1, 2])
def test_what_a_front_end_counted_stays_when_it_ends(row: int, rows: int) -> None:
    first = ServerMetrics(FakeAsyncEngine(), prefix="p", model_name="toy", counters=Counters(rows, 1))
    first.observe_first_token(0.3, num_prompt_tokens=7)
    del first
    second = ServerMetrics(FakeAsyncEngine(), prefix="nanoflow", model_name="toy", counters=Counters(rows, row))
    second.observe_first_token(0.3, num_prompt_tokens=7)
    assert values(second)["prompt_tokens_total"] == 14


def test_many_observations_at_once_are_those_one_by_one() -> None:
    bounds, observed = (0.01, 0.1, 1.0), [0.0, 0.01, 0.010001, 0.1, 0.5, 1.0, 7.0]
    counters = Counters()
    fast, slow = Histogram(counters, bounds), Histogram(counters, bounds)
    fast.observe_many(observed)
    for value in observed:
        slow.observe(value)
    total = counters.total()
    assert total[fast.place].tolist() == pytest.approx(total[slow.place].tolist())
    assert total[fast.place].tolist()[:-1] == [2, 2, 2, 1]


def test_counters_are_limited() -> None:
    with pytest.raises(ValueError, match="no more than"):
        Counters().take(MAX_COUNTERS + 1)


def test_classes_of_requests_are_counted_apart() -> None:
    engine = FakeAsyncEngine()
    classes = {
        "interactive": ClassCounts(num_running=2, num_waiting=1, num_tokens=70, num_preemptions=0),
        "batch": ClassCounts(num_running=5, num_waiting=9, num_tokens=30, num_preemptions=4),
    }
    shown = {name: [getattr(counts, name) for counts in classes.values()] for name in ClassCounts.__slots__}
    found: dict[str, dict[str, float]] = {}
    cases: tuple[dict[str, ClassCounts], ...] = ({}, classes)
    for counts in cases:
        engine.classes = counts
        families = text_string_to_metric_families(metrics_of(engine).render().decode())
        for sample in (sample for family in families for sample in family.samples if "_by_priority" in sample.name):
            found.setdefault(sample.name.removeprefix("nanoflow:"), {})[sample.labels["priority"]] = sample.value
        names = ("num_requests_running", "num_requests_waiting", "tokens", "num_preemptions")
        wanted = [*shown.values()] if counts else [[0, 0]] * 4
        ends = ("_by_priority", "_by_priority", "_by_priority_total", "_by_priority_total")
        assert [[*found[name + end].values()] for name, end in zip(names, ends, strict=True)] == wanted
