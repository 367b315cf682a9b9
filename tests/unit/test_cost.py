"""The cost model where the paper has no numbers: energy, tensor parallelism, experts, windows, memory and runs."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from nanoflow.cost.analysis import (
    CostError,
    MeanLengths,
    batch_shape,
    batch_within,
    iteration_views,
    largest_batch,
    serial_bound,
)
from nanoflow.cost.model import CostedModel, costed_model
from nanoflow.cost.roofline import (
    Bound,
    OperationCost,
    dynamic_energy_j,
    energy_j,
    iteration_costs,
    resource_times,
    total,
)
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import BatchShape, LinearDims, OpKind
from nanoflow.graph.shard import Exchange
from nanoflow.hardware import GPUS, Figure, GpuGroup, HardwareError, parse_gpus
from nanoflow.models.presets import PRESETS, preset_config

H200 = parse_gpus("h200")
HALF_LAYER = BatchShape(num_tokens=1024, num_decode_tokens=340, decode_context=340 * 1280)


def costed(preset: str) -> CostedModel:
    return costed_model(preset_config(preset))


def lengths_of(prompt: float, output: float) -> MeanLengths:
    return MeanLengths(prompt_tokens=prompt, output_tokens=output)


# --- hardware ------------------------------------------------------------------------------------------------------


def test_gpus_are_read_as_name_and_count() -> None:
    assert (parse_gpus("h200").name, parse_gpus("h200").num_gpus) == ("h200", 1)
    assert (parse_gpus(" A100-80x8 ").name, parse_gpus("A100-80x8").num_gpus) == ("a100-80x8", 8)
    assert parse_gpus("a100-80x8").memory_bytes == 640e9
    assert parse_gpus("h200x1") == parse_gpus("h200")
    assert (parse_gpus("RTX4090").name, parse_gpus("RTX 4090x2").num_gpus) == ("rtx4090", 2)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_can_be_named_alone_and_several_times(name: str) -> None:
    assert parse_gpus(name) == GpuGroup(name=name, spec=GPUS[name])
    assert parse_gpus(f"{name.upper()}x3") == GpuGroup(name=f"{name}x3", spec=GPUS[name], num_gpus=3)
    spec = GPUS[name]
    # FLOPs a byte and watts a TFLOP/s of every card so far: a slip of a power of ten lies outside.
    assert 70 < spec.compute_flops_per_s.value / spec.memory_bytes_per_s.value < 450 or name == "h20"
    assert 0.3 < spec.power_limit_w.value / (spec.compute_flops_per_s.value / 1e12) < 5.0
    assert 10e9 < spec.memory_bytes.value < 300e9 and spec.network_bytes_per_s.value < spec.memory_bytes_per_s.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100", "unknown GPU 'a100'; did you mean 'a100-80'[?]"),
        ("H300x4", "unknown GPU 'h300'; did you mean 'h100'[?]"),
        ("tpu", "unknown GPU 'tpu'; known: a100-80, h100, h200, b200, ada6000, "),
        ("", "unknown GPU ''; known: "),
        ("rtx4099", "unknown GPU 'rtx4099'; did you mean 'rtx4090'[?]"),
        ("2xh100", "did you mean 'h100x2'[?]"),
        ("rtx4090x0", "N from 1"),
        ("mi300x", "unknown GPU 'mi300x'; known: "),
        ("h200x0", "NAMExN with N from 1 .as h200 or a100-80x8., got 'h200x0'"),
    ],
)
def test_what_is_no_gpu_is_told_the_nearest(text: str, message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("name", "flops_per_byte", "network_per_memory"),
    [("a100-80", 156, 0.30), ("h100", 295, 0.268), ("h200", 206, 0.19), ("b200", 281, 0.23), ("ada6000", 190, 0.067)],
)
def test_ratios_of_table_1_of_the_paper(name: str, flops_per_byte: float, network_per_memory: float) -> None:
    rates = GpuGroup(name=name, spec=GPUS[name]).peak_rates()
    assert rates.compute_flops_per_s / rates.memory_bytes_per_s == pytest.approx(flops_per_byte, abs=0.5)
    # The table counts both directions of the network.
    assert 2 * rates.network_bytes_per_s / rates.memory_bytes_per_s == pytest.approx(network_per_memory, abs=0.0051)


def test_every_figure_of_a_gpu_has_a_source_and_no_sustained_rate_exceeds_its_peak() -> None:
    for name, spec in GPUS.items():
        figures = [value for field in spec.__slots__ if isinstance(value := getattr(spec, field), Figure)]
        assert all(figure.value > 0 and figure.source for figure in figures)
        gpus = GpuGroup(name=name, spec=spec)
        assert gpus.sustained_rates().compute_flops_per_s <= gpus.peak_rates().compute_flops_per_s
        assert gpus.sustained_rates().memory_bytes_per_s <= gpus.peak_rates().memory_bytes_per_s


# --- energy and power ----------------------------------------------------------------------------------------------


def test_energy_of_the_h200_gives_back_what_it_was_derived_from() -> None:
    graph = costed("llama-3-8b").graph
    # The measurement had plain products: no residual is read.
    products = [replace(op, kind=OpKind.LINEAR) for op in graph.layer if isinstance(op.dims, LinearDims)]
    attention = [op for op in graph.layer if op.kind is OpKind.DECODE_ATTENTION]
    for ops, energy_mj in ((products, 480.0), (attention, 283.0)):
        flops = sum(op.flops(HALF_LAYER) for op in ops)
        moved = sum(op.memory_bytes(HALF_LAYER, 2) for op in ops)
        joules = dynamic_energy_j(OperationCost(name="half layer", flops=flops, memory_bytes=moved), H200)
        assert joules is not None and joules * 1e3 == pytest.approx(energy_mj, rel=0.01)


# Measured on one H200: serial bound (products, head and attention alone) in tokens/s, its mJ/token, and a whole run of
# the sequential engine in tokens/s. The bound computed here is lower, for it counts row-wise operations too.
MEASURED = [
    ("llama-3-8b", 512, 512, 30_127, 22.0, 27_411),
    ("llama-3-8b", 1024, 512, 29_164, 24.6, 27_336),
    ("llama-3-8b", 512, 1024, 23_733, 28.8, 21_534),
    ("llama-3-8b", 1000, 1000, 22_743, 31.3, 20_963),
    ("llama-3-8b", 2048, 128, 38_517, 18.9, 36_512),
    ("llama-3.2-1b", 1024, 512, 154_024, 4.61, 148_059),
    ("llama-3.2-1b", 512, 1024, 116_597, 5.90, 113_080),
]


@pytest.mark.parametrize(("preset", "prompt", "output", "bound", "energy_mj", "run"), MEASURED)
def test_serial_bound_lies_between_the_measured_bound_and_the_engine(
    preset: str, prompt: int, output: int, bound: float, energy_mj: float, run: float
) -> None:
    model, lengths = costed(preset), lengths_of(prompt, output)
    shape = batch_shape(model, batch_within(model, H200, lengths, 8192), lengths)
    serial = serial_bound(iteration_costs(model, shape), H200, H200.sustained_rates(), shape.num_tokens)
    assert run < serial.tokens_per_s_per_gpu < bound
    assert serial.tokens_per_s_per_gpu == pytest.approx(bound, rel=0.04)
    assert serial.energy_per_token_j is not None
    assert serial.energy_per_token_j * 1e3 == pytest.approx(energy_mj, rel=0.10)


def test_on_the_h200_power_bounds_the_workload_and_elsewhere_nobody_knows() -> None:
    model, lengths = costed("llama-3-8b"), lengths_of(1024, 512)
    for name, bound in (("h200", Bound.POWER), ("h100", Bound.MEMORY)):
        gpus = parse_gpus(name)
        batch = largest_batch(model, gpus, lengths)
        whole = total(iteration_costs(model, batch_shape(model, batch, lengths)))
        views = iteration_views(model, gpus, gpus.peak_rates(), batch, lengths, whole)
        assert views.bound is bound
        assert (views.power_s is None) is (name != "h200")
        assert views.longest_s == max(views.by_bound.values())


def test_static_power_leaves_less_for_work_and_is_paid_all_the_time() -> None:
    spec = replace(
        H200.spec,
        power_limit_w=Figure(value=600.0, source="made up"),
        static_power_w=Figure(value=100.0, source="made up"),
        flop_j=Figure(value=1e-12, source="made up"),
        byte_j=Figure(value=1e-10, source="made up"),
    )
    gpus = GpuGroup(name="made up", spec=spec, num_gpus=2)
    cost = OperationCost(name="x", flops=1e12, memory_bytes=1e10)
    assert dynamic_energy_j(cost, gpus) == pytest.approx(2.0)
    assert resource_times(cost, gpus, gpus.peak_rates()).power_s == pytest.approx(2.0 / (2 * 500))
    assert energy_j(cost, gpus, 0.01) == pytest.approx(2.0 + 2 * 100 * 0.01)
    assert energy_j(cost, parse_gpus("b200"), 0.01) is None


# --- tensor parallelism --------------------------------------------------------------------------------------------


def test_one_gpu_has_no_collectives_and_counts_what_the_graph_counts() -> None:
    model = costed("llama-3-8b")
    shape = replace(HALF_LAYER, num_sampled=340, prefill_context=684 * 342, prefill_kv_tokens=684)
    costs = iteration_costs(model, shape)
    operations = [op.name for op in model.graph.operations()]
    assert [cost.name for cost in costs] == operations
    whole = total(costs)
    assert (whole.flops, whole.memory_bytes, whole.network_bytes) == (
        model.graph.flops(shape),
        model.graph.memory_bytes(shape, 2),
        0,
    )


def test_a_gpu_has_an_even_share() -> None:
    whole = total(iteration_costs(costed("llama-3-70b"), HALF_LAYER, 4))
    share = whole.per_gpu(4)
    assert (4 * share.flops, 4 * share.memory_bytes, 4 * share.network_bytes) == (
        whole.flops,
        whole.memory_bytes,
        whole.network_bytes,
    )


def test_collectives_stand_around_the_last_products_and_move_the_same_either_way() -> None:
    model = costed("llama-3-70b")
    names, moved = {}, {}
    for exchange in Exchange:
        costs = [cost for cost in iteration_costs(model, HALF_LAYER, 2, exchange) if cost.network_bytes]
        names[exchange], moved[exchange] = [cost.name for cost in costs], total(costs).network_bytes
    assert names == {
        Exchange.ALL_REDUCE: ["o_proj_all_reduce", "down_proj_all_reduce"],
        Exchange.ALL_GATHER: ["o_proj_input_all_gather", "o_proj_all_gather", "down_proj_all_reduce"],
    }
    assert moved[Exchange.ALL_REDUCE] == moved[Exchange.ALL_GATHER] == 4 * 1024 * 8192 * 2 * 80


def test_a_fused_graph_costs_less_memory_and_as_many_products() -> None:
    model = costed("llama-3-8b")
    fused = replace(model, graph=fuse_swiglu(model.graph))
    plain_cost, fused_cost = (total(iteration_costs(each, HALF_LAYER)) for each in (model, fused))
    assert fused_cost.memory_bytes < plain_cost.memory_bytes
    assert fused_cost.flops == pytest.approx(plain_cost.flops, rel=1e-3)


# --- experts -------------------------------------------------------------------------------------------------------


def test_mixtral_has_its_published_sizes() -> None:
    model = costed("mixtral-8x7b")
    assert (model.num_parameters, model.num_active_parameters) == (46_702_792_704, 12_879_925_248)
    assert model.graph.name == "MixtralForCausalLM 46.7B"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_costs(preset: str) -> None:
    model, gpus, lengths = costed(preset), parse_gpus("a100-80x8"), lengths_of(512, 512)
    shape = batch_shape(model, largest_batch(model, gpus, lengths), lengths)
    costs = iteration_costs(model, shape, 8)
    assert all(cost.memory_bytes > 0 and math.isfinite(cost.flops) for cost in costs)
    assert serial_bound(costs, gpus, gpus.peak_rates(), shape.num_tokens).tokens_per_s_per_gpu > 0


# --- batches -------------------------------------------------------------------------------------------------------


def test_a_request_keeps_no_more_than_the_windows_of_its_layers() -> None:
    model = costed("gemma-3-1b")
    token_bytes = 2 * 2 * 256
    assert model.kv_bytes(300) == 26 * 300 * token_bytes
    assert model.kv_bytes(10_000) == (22 * 512 + 4 * 10_000) * token_bytes


def test_the_largest_batch_fills_the_memory() -> None:
    model, gpus, lengths = costed("llama-3-8b"), parse_gpus("a100-80"), lengths_of(512, 1024)
    batch = largest_batch(model, gpus, lengths)
    kept = batch.num_decodes * 1024 * model.graph.kv_bytes_per_token(2) + model.weight_bytes
    assert kept == pytest.approx(80e9)
    assert batch.num_tokens == pytest.approx(1.5 * batch.num_decodes)
    views = iteration_views(
        model, gpus, gpus.peak_rates(), batch, lengths, OperationCost(name="", flops=0, memory_bytes=0)
    )
    assert views.memory_s == pytest.approx(80e9 / 2.0e12)


def test_a_token_budget_keeps_the_ratio_of_decodes() -> None:
    model, lengths = costed("llama-3-8b"), lengths_of(1024, 512)
    batch = batch_within(model, H200, lengths, 1536)
    assert (batch.num_tokens, batch.num_decodes) == (1536, 512)
    assert batch_within(model, H200, lengths, 10**9) == largest_batch(model, H200, lengths)
    shape = batch_shape(model, batch, lengths)
    assert (shape.decode_context, shape.prefill_kv_tokens) == (512 * 1280, 1024)
    assert shape.prefill_context == round(1024 * 512.5)


def test_sliding_windows_shorten_what_is_seen() -> None:
    model, lengths = costed("mistral-7b"), lengths_of(8000, 1000)
    shape = batch_shape(model, batch_within(model, H200, lengths, 900), lengths)
    assert shape.decode_context == shape.num_decode_tokens * 4096


def test_what_does_not_fit_is_said_with_numbers() -> None:
    model, lengths = costed("llama-2-70b"), lengths_of(512, 512)
    with pytest.raises(
        CostError, match=r"weights \(138.0 GB\) and one request \(0.25 GB\) do not fit into the 80 GB of"
    ):
        largest_batch(model, parse_gpus("a100-80"), lengths)
    with pytest.raises(CostError, match="it takes 2 of these GPUs"):
        largest_batch(model, parse_gpus("a100-80"), lengths)
    assert largest_batch(model, parse_gpus("a100-80x2"), lengths).num_decodes >= 1
    with pytest.raises(CostError, match="max_batch_tokens must be positive, got 0"):
        batch_within(model, parse_gpus("a100-80x2"), lengths, 0)


def test_costs_need_no_torch() -> None:
    code = "import sys, nanoflow.cost.analysis, nanoflow.hardware; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
