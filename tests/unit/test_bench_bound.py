"""Serial bound, optimal throughput and steady state: the sums by hand, the measuring on a CPU with a tiny model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nanoflow.bench import offline, rates
from nanoflow.bench.bound import (
    Bounds,
    Cost,
    Rates,
    TypicalBatch,
    Work,
    bounds_of,
    typical_batch,
    visible_keys,
    work_of,
)
from nanoflow.bench.measurement_window import (
    NoSteadyState,
    Progress,
    ProgressRecorder,
    find_window,
    steady_state,
)
from nanoflow.bench.options import ThroughputConfig
from nanoflow.bench.record import format_table, write_record
from nanoflow.config import EngineConfig
from nanoflow.device.energy import EnergySampler
from nanoflow.engine.messages import EngineStats
from nanoflow.executor.buffers import Workspace
from nanoflow.models.config_json import ModelError
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.profiler import site
from nanoflow.profiler.sustained import SPANS, Span
from nanoflow.run_metrics import measure
from nanoflow.workload import Lengths
from tests.toy_models import ENGINE_OPTIONS, write_toy_model


def lengths(*pairs: tuple[int, int]) -> list[Lengths]:
    return [Lengths(num_prompt_tokens=prompt, num_output_tokens=output) for prompt, output in pairs]


# --- counting ------------------------------------------------------------------------------------------------------


def test_work_by_hand() -> None:
    # Prompt 3: pairs 1 + 2 + 3. Outputs 3: the first from the prompt, then decodes that see 4 and 5 keys. Two layers.
    assert work_of(lengths((3, 3)), (None, None)) == Work(
        num_tokens=6, num_logit_rows=3, num_decode_keys=2 * 9, num_prefill_keys=2 * 6
    )
    assert work_of(lengths((3, 3), (5, 1)), (None,)) == Work(
        num_tokens=12, num_logit_rows=4, num_decode_keys=9, num_prefill_keys=6 + 15
    )


def test_a_window_hides_keys_in_its_layer_only() -> None:
    assert visible_keys(np.arange(1, 6), (None, 2)) == 15 + (1 + 2 + 2 + 2 + 2)
    assert work_of(lengths((3, 3)), (4,)).num_decode_keys == 8


def test_work_is_that_of_the_formulas() -> None:
    prompt, output, layers = 1024, 512, 32
    work = work_of(lengths((prompt, output)) * 10, (None,) * layers)
    assert work.num_prefill_keys == 10 * layers * prompt * (prompt + 1) // 2
    assert work.num_decode_keys == 10 * layers * ((output - 1) * prompt + output * (output - 1) // 2)


def test_typical_batch_fills_the_budget_in_the_workloads_ratio() -> None:
    batch = typical_batch(lengths((1024, 512)) * 5000, max_batch_tokens=2048, max_num_seqs=4096)
    assert batch == TypicalBatch(
        num_tokens=2048,
        num_logit_rows=683,
        num_decodes=681,
        decode_context=1280,
        num_prefills=1,
        prefill_before=0,
        prefill_tokens=1024,
    )


def test_typical_batch_knows_few_rows_long_prompts_and_single_tokens() -> None:
    assert typical_batch(lengths((1024, 512)) * 5000, max_batch_tokens=2048, max_num_seqs=256).num_logit_rows == 256
    few = typical_batch(lengths((16, 8)) * 6, max_batch_tokens=2048, max_num_seqs=256)
    assert (few.num_logit_rows, few.num_prefills, few.prefill_tokens) == (6, 6, 16)
    long = typical_batch(lengths((5000, 1000)) * 50, max_batch_tokens=600, max_num_seqs=256)
    assert (long.num_prefills, long.prefill_before, long.prefill_tokens) == (1, 2250, 500)
    single = typical_batch(lengths((7, 1)) * 50, max_batch_tokens=64, max_num_seqs=256)
    assert (single.num_logit_rows, single.num_decodes, single.decode_context) == (8, 0, 0)


BATCH = typical_batch(lengths((3, 3)), max_batch_tokens=8, max_num_seqs=4)


def test_bounds_by_hand() -> None:
    graph = build_graph(preset_config("llama-3-8b"), None)
    work = Work(num_tokens=1000, num_logit_rows=100, num_decode_keys=10, num_prefill_keys=5)
    measured = Rates(
        token=Cost(time_s=1e-3, energy_j=0.5),
        logit_row=Cost(time_s=1e-2, energy_j=1.0),
        decode_key=Cost(time_s=0.1, energy_j=10.0),
        prefill_key=Cost(time_s=0.2, energy_j=20.0),
    )
    bounds = bounds_of(graph, work, BATCH, measured, dtype_bytes=2)
    assert bounds.optimal_tokens_per_s == pytest.approx(1000 / (1 + 1))
    assert bounds.serial_tokens_per_s == pytest.approx(1000 / (1 + 1 + 1 + 1))
    assert bounds.optimal_energy_per_token_j == pytest.approx((500 + 100) / 1000)
    assert bounds.serial_energy_per_token_j == pytest.approx((500 + 100 + 100 + 100) / 1000)
    # Every weight but the embedding's and the norms' is multiplied once a token.
    layers = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    assert bounds.gemm_tflops == pytest.approx(2 * layers / 1e-3 / 1e12)
    assert bounds.lm_head_tflops == pytest.approx(2 * 4096 * 128256 / 1e-2 / 1e12)
    assert bounds.decode_kv_bytes_per_s == pytest.approx(2 * 8 * 128 * 2 / 0.1)
    assert bounds.prefill_tflops == pytest.approx(4 * 32 * 128 / 0.2 / 1e12)


def test_bounds_without_decodes_or_counter() -> None:
    graph = build_graph(preset_config("qwen2.5-0.5b"), None)
    work = work_of(lengths((4, 1)), graph.windows)
    cost = Cost(time_s=1e-3)
    bounds = bounds_of(graph, work, BATCH, Rates(token=cost, logit_row=cost, decode_key=None, prefill_key=cost), 2)
    assert bounds.decode_kv_bytes_per_s is None
    assert bounds.serial_energy_per_token_j is None and bounds.optimal_energy_per_token_j is None
    assert bounds.serial_tokens_per_s == pytest.approx(5 / (5e-3 + 1e-3 + 24 * 10 * 1e-3))


# --- measuring -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine_config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = write_toy_model(tmp_path_factory.mktemp("model"))
    return EngineConfig(model=str(folder), **{**ENGINE_OPTIONS, "max_num_seqs": 4, "max_batch_tokens": 32})


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPANS, "cpu", Span(settle_s=0.0, measure_s=0.01))


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize("workload", [(12, 5), (100, 3), (6, 1)], ids=str)
def test_rates_of_a_tiny_model(engine_config: EngineConfig, workload: tuple[int, int]) -> None:
    bounds = rates.measure_bounds(engine_config, lengths(workload) * 20)
    assert 0 < bounds.serial_tokens_per_s < bounds.optimal_tokens_per_s
    assert min(bounds.gemm_tflops, bounds.lm_head_tflops, bounds.prefill_tflops) > 0
    assert (bounds.decode_kv_bytes_per_s is None) == (workload[1] == 1)
    assert bounds.serial_energy_per_token_j is None


@pytest.mark.parametrize("min_data_bytes", [1, 1 << 40], ids=["one layer for all", "all layers"])
def test_units_of_the_rates(engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch, min_data_bytes: int) -> None:
    """A device that takes a microsecond for whatever it is given: a layer's operations, or the language-model head."""
    calls: list[object] = []

    def sustained(work: Callable[[], None], _device: object) -> Cost:
        calls.clear()
        work()
        return Cost(time_s=len(calls) * 1e-6)

    monkeypatch.setattr(rates, "_cost_of", sustained)
    monkeypatch.setattr(Workspace, "run_whole", lambda *args: calls.append(args))
    monkeypatch.setattr(site, "_MIN_DATA_BYTES", min_data_bytes)
    bounds = rates.measure_bounds(engine_config, lengths((12, 4)) * 20)
    batch = bounds.batch
    assert (batch.num_tokens, batch.num_logit_rows, batch.num_decodes, batch.decode_context) == (32, 4, 3, 14)
    assert (batch.num_prefills, batch.prefill_tokens) == (2, 12)
    hidden, inner, kv_width = 32, 64, 16
    layer_weights = hidden * (hidden + 2 * kv_width) + hidden * hidden + 3 * hidden * inner
    assert bounds.gemm_tflops == pytest.approx(2 * layer_weights * 32 / 1e-6 / 1e12)
    assert bounds.lm_head_tflops == pytest.approx(2 * hidden * 320 * 4 / 1e-6 / 1e12)
    assert bounds.decode_kv_bytes_per_s == pytest.approx(2 * kv_width * 4 * (3 * 14) / 1e-6)
    assert bounds.prefill_tflops == pytest.approx(4 * hidden * (2 * 12 * 13 / 2) / 1e-6 / 1e12)


def test_bounds_of_an_unknown_preset_are_refused() -> None:
    with pytest.raises(ModelError, match="unknown preset 'mixtral'; did you mean 'mixtral-8x7b'"):
        rates.measure_bounds(EngineConfig(model="preset:mixtral"), lengths((4, 4)))


# --- steady state --------------------------------------------------------------------------------------------------


def run_of(*parts: tuple[int, int, int, bool], step_s: float = 0.1) -> list[Progress]:
    """Parts of a run as (iterations, running, waiting, whether one has finished), 10 tokens an iteration."""
    progress: list[Progress] = []
    for count, num_running, num_waiting, has_finished in parts:
        for _ in range(count):
            number = len(progress) + 1
            progress.append(
                Progress(
                    time_s=number * step_s,
                    num_tokens=number * 10,
                    num_running=num_running,
                    num_waiting=num_waiting,
                    has_finished=has_finished,
                )
            )
    return progress


RAMP, FULL, DIP, DRAIN = (30, 40, 99, False), (50, 100, 50, True), (3, 60, 50, True), (20, 95, 0, True)


def test_window_is_between_the_first_finish_and_the_last_that_waited() -> None:
    progress = run_of(RAMP, (10, 100, 90, False), FULL, DIP, FULL, DRAIN)
    window = find_window(progress, duration_s=17.0)
    assert window.start_s == pytest.approx(4.1) and window.stop_s == pytest.approx(14.3)
    assert (window.num_iterations, window.num_tokens) == (102, 1020)
    steady = steady_state(window, EnergySampler(lambda: None))
    assert steady.total_tokens_per_s == pytest.approx(100.0)
    assert (steady.num_iterations, steady.energy_per_token_j) == (102, None)


def test_a_window_begins_and_ends_nearly_full() -> None:
    """Of 100 requests 90 are full, 89 are not; iterations that are half full lie outside, also where others wait."""
    half, nearly, almost = (5, 50, 50, True), (1, 89, 50, True), (1, 90, 50, True)
    window = find_window(run_of(RAMP, half, nearly, almost, FULL, almost, nearly, half), duration_s=9.0)
    assert window.start_s == pytest.approx(3.7) and window.stop_s == pytest.approx(8.8)


@pytest.mark.parametrize(
    ("progress", "duration_s", "reason"),
    [
        ([], 1.0, "give more requests"),
        (run_of(RAMP, (50, 100, 0, True)), 9.0, "give more requests"),
        (run_of(RAMP, (20, 100, 5, True)), 5.0, "lasted 19 iterations, fewer than 20"),
        (run_of(RAMP, FULL), 50.0, r"lasted 4\.90 s of 50\.00 s"),
    ],
)
def test_what_is_not_steady_says_why(progress: list[Progress], duration_s: float, reason: str) -> None:
    with pytest.raises(NoSteadyState, match=reason):
        find_window(progress, duration_s)


def test_recorder_notes_every_iteration() -> None:
    ticks: Iterator[float] = iter([1.0, 2.0])
    recorder = ProgressRecorder(lambda: next(ticks))
    recorder.observe_step(EngineStats(num_running=3, num_waiting=2, iteration_tokens=5))
    recorder.observe_first_token(0.1, 4)
    recorder.observe_next_tokens([0.1])
    recorder.observe_step(EngineStats(num_running=3, num_waiting=1, iteration_tokens=7))
    assert recorder.progress == [
        Progress(time_s=1.0, num_tokens=5, num_running=3, num_waiting=2, has_finished=False),
        Progress(time_s=2.0, num_tokens=12, num_running=3, num_waiting=1, has_finished=False),
    ]


def test_energy_of_a_short_window_is_not_told() -> None:
    energy = EnergySampler(lambda: None)
    energy._ticks = [(0.1 * place, 70.0 * place) for place in range(30)]
    short = dataclasses.replace(find_window(run_of(RAMP, FULL), 5.0), start_s=0.0, stop_s=1.9)
    assert steady_state(short, energy).energy_per_token_j is None
    long = dataclasses.replace(short, stop_s=2.1)
    assert steady_state(long, energy).energy_per_token_j == pytest.approx(700 * 2.1 / 490)


# --- together ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_spans")
def test_a_run_with_bounds_and_steady_state(engine_config: EngineConfig, tmp_path: Path) -> None:
    config = ThroughputConfig(workload="9/6", num_requests=60, num_warmup=0, repeats=2, random_weights=True)
    record = offline.run_throughput(dataclasses.replace(engine_config, load_format="safetensors"), config)
    assert record.model["weights"] == "random" and record.config.load_format == "random"
    assert record.bounds is not None
    for run in record.repeats:
        assert run.steady is not None and run.no_steady_reason is None
        assert run.steady.num_iterations >= 20 and run.steady.duration_s < run.duration_s
        assert run.share_of_serial == pytest.approx(run.total_tokens_per_s / record.bounds.serial_tokens_per_s)
        assert run.share_of_optimal == pytest.approx(run.total_tokens_per_s / record.bounds.optimal_tokens_per_s)
    table = format_table(record.repeats, record.bounds)
    for label in ("serial bound (tokens/s)", "of the serial bound (%)", "steady: total tokens/s", "GEMMs (TFLOP/s)"):
        assert label in table
    write_record(record, tmp_path / "run.json")
    assert '"serial_tokens_per_s"' in (tmp_path / "run.json").read_text()


def test_a_preset_needs_no_word_about_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineConfig] = []

    def stop_here(config: EngineConfig, _lengths: object) -> Bounds:
        seen.append(config)
        raise InterruptedError

    monkeypatch.setattr(rates, "measure_bounds", stop_here)
    with pytest.raises(InterruptedError):
        offline.run_throughput(EngineConfig(model="preset:llama-3-8b"), ThroughputConfig())
    assert seen[0].load_format == "random"


def test_table_tells_energy_shares_and_why_nothing_was_steady() -> None:
    run = dataclasses.replace(measure([], 2.0, {}), no_steady_reason="too short", energy_per_token_j=0.025)
    faster = dataclasses.replace(run, energy_per_token_j=0.02, share_of_serial=0.9)
    table = format_table([run, faster])
    assert "repeat 0: no steady state: too short" in table
    assert "22.50   (20.00 to 25.00)" in table and "90.0" in table
