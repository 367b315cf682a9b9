"""Products in FP8: the graph, the reference kernels, and how far a model in FP8 is from the same model without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from nanoflow.config import EngineConfig
from nanoflow.cost.analysis import optimal_throughput
from nanoflow.cost.model import costed_model
from nanoflow.cost.roofline import iteration_costs, resource_times
from nanoflow.engine.tier_memory import fingerprint_of
from nanoflow.executor.buffers import DeviceModel
from nanoflow.executor.inputs import InputBuilder
from nanoflow.executor.lanes import _carrier
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.executor.steps import bind
from nanoflow.executor.streams import LaneError
from nanoflow.graph.fp8 import fp8_candidates, in_fp8, with_fp8
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import Element, Fp8, OpGraph
from nanoflow.graph.layers import FP8_BLOCK
from nanoflow.graph.operation import BatchShape, OpKind, RowDims
from nanoflow.graph.shard import Exchange, shard
from nanoflow.hardware import HardwareError, parse_gpus
from nanoflow.kernels import reference, reference_fp8
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.reference_fp8 import FP8_KERNELS
from nanoflow.models.config_json import load, parse
from nanoflow.models.fp8 import LARGEST, dequantised, quantise_rows
from nanoflow.models.locate import locate_model
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import Weights, random_weights
from nanoflow.plan.carry import carriers
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import PlanError
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.table import PairPoint, Profile
from nanoflow.profiler import carry
from nanoflow.profiler.carry import carry_tasks
from nanoflow.profiler.site import Site
from nanoflow.profiler.work import Sizes
from nanoflow.search.carry import carry_plan
from nanoflow.search.search import Search
from nanoflow.simulate.iteration import graphs_of
from tests.agreement import PYTHON_TEXT, Agreement, agreement
from tests.driving import greedy, random_prompts, run_model
from tests.families import make_model
from tests.graphs import batch_of, batches, device_model, graphs, valid_plans, with_fresh_caches, with_operations
from tests.logits import prompt_logits
from tests.reference_executor import ReferenceExecutor
from tests.unit.test_carry import ReferenceCarrier, lanes_of
from tests.unit.test_lanes import CONFIG

CPU = torch.device("cpu")
KERNELS = {**REFERENCE_KERNELS, OpKind.LINEAR_SWIGLU: reference.linear_swiglu, **FP8_KERNELS}
PROMPT = [number * 37 % 131 for number in range(60)]


def _preset(name: str) -> OpGraph:
    return build_graph(preset_config(name), None)


# Numbers.


def test_rows_are_quantised_by_their_largest_number() -> None:
    rows = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None]
    rows[3] = 0.0
    numbers, scales = quantise_rows(rows)
    assert numbers.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert (numbers[3].float() == 0).all() and scales.isfinite().all()
    others = [place for place in range(7) if place != 3]
    assert (numbers.float().abs().amax(1)[others] == LARGEST).all()
    # Three bits of mantissa: a number is off by at most a 16th of itself, or by half of the smallest step.
    bound = torch.maximum(rows.abs() / 16, scales * 2**-10)
    assert (numbers.float() * scales - rows).abs().le(bound * 1.0001).all()


def test_random_weights_are_those_without_fp8_quantised() -> None:
    config = replace(preset_config("qwen2.5-7b"), hidden_size=64, intermediate_size=80, vocab_size=32, num_layers=1)
    small = build_graph(replace(config, num_heads=4, num_kv_heads=2, head_dim=16), None)
    plain = random_weights(small, torch.bfloat16, CPU, 3)
    quantised = random_weights(in_fp8(small), torch.bfloat16, CPU, 3)
    for name, tensor in plain.layers[0].items():
        other = quantised.layers[0][name]
        if other.dtype == torch.float8_e4m3fn:
            numbers, scales = quantise_rows(tensor)
            assert torch.equal(other.view(torch.uint8), numbers.view(torch.uint8))
            assert torch.equal(quantised.layers[0][f"{name}_scales"], scales[:, 0])
        else:
            assert torch.equal(other, tensor)
    assert quantised.num_bytes == in_fp8(small).parameter_bytes(2)


# The graph.


def test_a_llama_in_fp8_quantises_where_rows_are_written() -> None:
    graph = in_fp8(_preset("llama-3-8b"))
    assert [(op.name, op.kind) for op in graph.layer] == [
        ("attn_norm", OpKind.RMS_NORM_FP8),
        ("qkv_proj", OpKind.LINEAR_FP8),
        ("rope_append", OpKind.ROPE_APPEND),
        ("decode_attention", OpKind.DECODE_ATTENTION),
        ("prefill_attention", OpKind.PREFILL_ATTENTION),
        ("o_proj_quantise", OpKind.QUANTISE_FP8),
        ("o_proj", OpKind.LINEAR_ADD_FP8),
        ("ffn_norm", OpKind.RMS_NORM_FP8),
        ("gate_up_proj", OpKind.LINEAR_FP8),
        ("activation", OpKind.SWIGLU_FP8),
        ("down_proj", OpKind.LINEAR_ADD_FP8),
    ]
    assert graph.epilogue == _preset("llama-3-8b").epilogue
    by_name = {spec.name: spec for spec in graph.tensors}
    assert "normed" not in by_name and "activation" not in by_name
    assert by_name["normed_fp8"].element is Element.FP8 and by_name["normed_fp8"].row_bytes(2) == 4096
    assert by_name["normed_scale"].element is Element.FLOAT32 and by_name["normed_scale"].width == 1


def test_rows_that_others_read_too_are_written_in_both_types() -> None:
    ops = {op.name: op for op in in_fp8(_preset("qwen2-57b-a14b")).layer}
    assert ops["ffn_norm"].writes == ("normed_fp8", "normed_scale", "normed")
    assert ops["router"].reads == ("normed",)
    assert ops["shared_gate_up_proj"].reads == ("normed_fp8", "normed_scale")
    assert ops["attn_norm"].writes == ("normed_fp8", "normed_scale")
    # The gate changes the activation in place, so it is quantised after that.
    assert ops["shared_down_proj_quantise"].reads == ("shared_activation",)


def test_what_is_written_again_is_quantised_again() -> None:
    """Two attention blocks in a layer, which share their tensors."""
    plain = _preset("llama-3-8b")
    place = next(i for i, op in enumerate(plain.layer) if op.name == "ffn_norm")
    again = [replace(op, name=f"{op.name}_again") for op in plain.layer[:place]]
    graph = in_fp8(with_operations(plain, (*plain.layer[:place], *again, *plain.layer[place:])))
    names = [op.name for op in graph.layer]
    assert names[names.index("o_proj_again") - 1] == "o_proj_again_quantise" and "o_proj_quantise" in names


def test_products_of_odd_sizes_are_left_alone() -> None:
    graph = build_graph(replace(preset_config("llama-3-8b"), intermediate_size=1000), None)
    assert fp8_candidates(graph) == ("qkv_proj.weight", "o_proj.weight", "gate_up_proj.weight")
    kinds = {op.name: op.kind for op in in_fp8(graph).layer}
    assert kinds["down_proj"] is OpKind.LINEAR_ADD and kinds["activation"] is OpKind.SWIGLU


def test_a_weight_counts_a_byte() -> None:
    plain, graph = _preset("llama-3-8b"), in_fp8(_preset("llama-3-8b"))
    of_layer = 4096 * (6144 + 4096 + 28672 + 14336)
    rows = 6144 + 4096 + 28672 + 4096
    assert plain.parameter_bytes(2) == 2 * plain.num_parameters
    assert plain.parameter_bytes(2) - graph.parameter_bytes(2) == 32 * (of_layer - 4 * rows)
    assert graph.num_parameters == plain.num_parameters
    one, none = (BatchShape(num_tokens=count) for count in (1, 0))
    down = next(op for op in graph.layer if op.name == "down_proj")
    assert down.memory_bytes(none, 2) == 4096 * (14336 + 4)
    # The row and its scale, and the residual read and written.
    assert down.memory_bytes(one, 2) - down.memory_bytes(none, 2) == 14336 + 4 + 2 * 2 * 4096
    activation = next(op for op in graph.layer if op.name == "activation")
    assert activation.memory_bytes(one, 2) == 2 * 14336 * 2 + 14336 + 4
    norm = next(op for op in graph.layer if op.name == "ffn_norm")
    assert norm.memory_bytes(one, 2) == 4096 * 2 + 4096 * 2 + 4096 + 4


def _quantised(plain: DeviceModel, graph: OpGraph) -> DeviceModel:
    """A model with some of its weights in FP8."""
    layers = []
    for kind, group in zip(graph.layers, plain.weights.layers, strict=True):
        changed = dict(group)
        for parameter in kind.parameters:
            if parameter.fp8 is not None:
                numbers, scales = quantise_rows(group[parameter.name])
                changed |= {parameter.name: numbers, parameter.scales_name: scales[:, 0]}
        layers.append(changed)
    return replace(plain, graph=graph, weights=replace(plain.weights, layers=tuple(layers)), kernels=KERNELS)


def test_one_of_several_gpus_has_a_part_of_it() -> None:
    graph = in_fp8(_preset("llama-3-8b"))
    for exchange in Exchange:
        ops = {op.name: op for op in shard(graph, 8, exchange).layer}
        plain = {op.name: op for op in shard(_preset("llama-3-8b"), 8, exchange).layer}
        assert ops.keys() - plain.keys() == {"o_proj_quantise"} and plain.keys() <= ops.keys()
        assert ops["o_proj_quantise"].dims == RowDims(width=4096 // 8)
        assert all(ops[name].dims == plain[name].dims for name in plain if name != "o_proj_input_all_gather")


def test_costs_are_those_of_a_byte_a_weight_and_of_the_ratein_fp8() -> None:
    gpus, config = parse_gpus("h200"), preset_config("llama-3-8b")
    plain, model = costed_model(config), costed_model(config, is_fp8=True)
    assert model.num_parameters == plain.num_parameters and model.num_fp8_parameters == 32 * 4096 * 53248
    assert model.weight_bytes == in_fp8(_preset("llama-3-8b")).parameter_bytes(2)
    rates = gpus.peak_rates()
    seconds = 2 * (model.num_parameters - model.num_fp8_parameters / 2) / 989e12
    assert optimal_throughput(model, gpus, rates) == pytest.approx(1 / seconds)
    shape = BatchShape(num_tokens=2048, num_sampled=1)
    costs, before = ({cost.name: cost for cost in iteration_costs(each, shape)} for each in (model, plain))
    for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"):
        factor = 1.0 if name == "lm_head" else 2.0
        times = [resource_times(each[name], gpus, rates) for each in (before, costs)]
        assert times[0].compute_s == pytest.approx(factor * times[1].compute_s)
        assert (times[1].power_s is None) == (name != "lm_head")
    with pytest.raises(HardwareError, match="A100 80 GB SXM has no products in FP8"):
        parse_gpus("a100-80").require_fp8()


def test_a_profile_of_a_model_in_fp8_has_every_operation_of_its_graph() -> None:
    made = estimated_profile("toy", PRESETS["llama-3.2-1b"], parse_gpus("h200"), 256, is_fp8=True)
    profile = Profile.from_json(made.to_json())
    assert profile.is_fp8 and graphs_of(profile)[0].layer == in_fp8(_preset("llama-3.2-1b")).layer
    plain = estimated_profile("toy", PRESETS["llama-3.2-1b"], parse_gpus("h200"), 256)
    times = [{p.operation: p.time_s for p in each.points if p.num_tokens == 256} for each in (plain, profile)]
    assert times[1]["down_proj"] < 0.6 * times[0]["down_proj"] and times[1]["lm_head"] == times[0]["lm_head"]


def test_attention_inside_products_is_not_for_scales_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _preset("llama-3-8b")
    kept = dict.fromkeys(fp8_candidates(plain), Fp8())
    in_blocks = with_fp8(plain, {**kept, "down_proj.weight": Fp8(block=FP8_BLOCK)})
    plan: Any = SimpleNamespace(name="carried")
    workspace: Any = SimpleNamespace(model=SimpleNamespace(graph=in_blocks))
    with pytest.raises(LaneError, match=r"plan 'carried': .* those of down_proj have one for each block"):
        _carrier(workspace, plan, ())
    site = Site(graph=in_blocks, device=torch.device("cuda", 0), dtype=torch.bfloat16, page_size=16)
    monkeypatch.setattr(carry, "can_carry", lambda *_: True)
    monkeypatch.setattr(carry, "kernels_for", lambda *_: {OpKind.LINEAR_SWIGLU})
    assert carry_tasks(site, Sizes(max_tokens=1024), 132) == []
    found = carry_tasks(replace(site, graph=in_fp8(plain)), Sizes(max_tokens=1024), 132)
    assert {task.products for task in found} == {"products", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    # Half as many k-steps as in 16 bits carry half as many keys.
    theirs = carry_tasks(replace(site, graph=plain), Sizes(max_tokens=1024), 132)
    for ours, other in ((ours, other) for ours, other in zip(found, theirs, strict=True) if ours.steps != 3):
        assert ours.attention.num_tokens in (other.attention.num_tokens // 2, other.attention.num_tokens // 2 + 1)


def test_products_in_fp8_that_carry_give_what_the_graph_gives() -> None:
    plain = build_graph(parse(CONFIG), None)
    graph = fuse_swiglu(in_fp8(plain))
    plan, carrier = carry_plan(graph, 8, 4, 0.8), ReferenceCarrier()
    batch = batch_of([(3, 1), (5, 1), (2, 1), (4, 1), (0, 4)], 4, graph.vocab_size, 0)
    model = _quantised(device_model(plain, int(batch.new_pages.pages.max()) + 1), graph)
    inputs = InputBuilder(graph.ropes, num_rows=batch.num_requests, device=CPU).build(batch)
    expected = ReferenceExecutor(with_fresh_caches(model)).forward(inputs)
    executor = PipelinedExecutor(with_fresh_caches(model), (plan,), max_batch_tokens=8, max_logits=batch.num_requests)
    executor._lanes[plan.digest] = lanes_of(plan, graph, executor, carrier)
    executor.forward(inputs, plan)
    assert sum(carrier.shares) > 0
    torch.testing.assert_close(executor.logits(inputs), expected, rtol=0.02, atol=0.02 * float(expected.std()) + 1e-4)


def test_a_search_leaves_attention_to_products_in_fp8() -> None:
    made = estimated_profile("toy", PRESETS["llama-3-8b"], parse_gpus("h200"), 2048, is_fp8=True)
    pair = PairPoint(
        first="products",
        second="decode_attention",
        first_tokens=1024,
        second_tokens=300,
        second_context=1280.0,
        mechanism=Mechanism.INSIDE,
        share=2 / 3,
        first_performance=0.7,
        second_performance=0.6,
    )
    shape = BatchShape(num_tokens=2048, num_decode_tokens=680, decode_context=680 * 1280, num_sampled=680)
    found = Search(replace(made, pairs=(pair,)), shape).run().plan
    assert found.carry_lanes
    graph = graphs_of(made)[0]
    steps = bind(found, graph)
    carried = {steps[at].op.kind for at, _ in carriers(found, graph, graph.layers)}
    assert carried == {OpKind.LINEAR_FP8, OpKind.LINEAR_ADD_FP8}


def test_pages_of_a_model_in_fp8_are_not_those_of_the_model_without(tmp_path: Path) -> None:
    prints = [
        fingerprint_of(None, EngineConfig(quantization=choice), name="name", device="cpu", dtype="float32")
        for choice in ("auto", "fp8", "none")
    ]
    assert len(set(prints)) == 3


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_plan_of_a_graph_in_fp8_gives_what_its_own_order_gives(data: st.DataObject) -> None:
    plain = data.draw(graphs())
    names = sorted(
        {parameter.name for kind in plain.kinds for parameter in kind.parameters if "proj" in parameter.name}
    )
    chosen = data.draw(st.sets(st.sampled_from(names), min_size=1))
    graph = with_fp8(plain, dict.fromkeys(chosen, Fp8()))
    fused = fuse_swiglu(graph) if data.draw(st.booleans()) else graph
    batch = data.draw(batches(12, graph.vocab_size))
    plan = data.draw(valid_plans(fused, 12))
    model = _quantised(device_model(plain, int(batch.new_pages.pages.max()) + 1), graph)
    inputs = InputBuilder(graph.ropes, num_rows=batch.num_requests, device=CPU).build(batch)
    expected = ReferenceExecutor(with_fresh_caches(model)).forward(inputs)
    model = replace(with_fresh_caches(model), graph=fused)
    executor = PipelinedExecutor(model, (plan,), max_batch_tokens=12, max_logits=batch.num_requests)
    executor.forward(inputs, plan)
    # Sums of other numbers of rows differ in their last digit, which may round a number in FP8 to another one.
    torch.testing.assert_close(executor.logits(inputs), expected, rtol=0.02, atol=0.02 * float(expected.std()) + 1e-4)


# Kernels.


def _launch(
    reads: tuple[Tensor, ...], writes: tuple[Tensor, ...], weights: tuple[Tensor, ...] = (), **dims: Any
) -> Any:
    op = SimpleNamespace(dims=SimpleNamespace(**dims))
    return SimpleNamespace(reads=reads, writes=writes, weights=weights, op=op)


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [None, (128, 128)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_the_numbers(block: tuple[int, int] | None, has_bias: bool) -> None:
    x, x_scales = quantise_rows(_drawn(5, 320))
    weight, _ = quantise_rows(_drawn(208, 320, seed=1))
    scales = _drawn(*Fp8(block=block).scales_shape((208, 320)), seed=2).abs() + 0.1
    bias = [_drawn(208, seed=3)] if has_bias else []
    numbers = dequantised(weight, scales, block)
    if block is not None:
        assert torch.equal(numbers[200, 300], weight.float()[200, 300] * scales[1, 2])
    exact = (x.double() * x_scales.double()) @ numbers.double().t() + (bias[0].double() if has_bias else 0.0)
    out, hidden = torch.empty(5, 208), _drawn(5, 208, seed=4)
    reference_fp8.linear_fp8(_launch((x, x_scales), (out,), (weight, scales, *bias)))
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-2)
    added = hidden.clone()
    reference_fp8.linear_add_fp8(_launch((x, x_scales, added), (added,), (weight, scales, *bias)))
    torch.testing.assert_close(added.double(), hidden.double() + exact, rtol=1e-4, atol=1e-2)


# The model.


def _after(folder: Path, tokens: list[int], change: Callable[[Weights], object] = lambda weights: None) -> Agreement:
    exact = _exact_logits(folder, tuple(tokens))
    return agreement(exact, prompt_logits(folder, tokens, is_fp8=True, change=change), tokens)


@lru_cache(maxsize=2)
def _exact_logits(folder: Path, tokens: tuple[int, ...]) -> Tensor:
    return prompt_logits(folder, tokens)


@pytest.mark.parametrize(
    ("family", "most"), [("llama-bias", 0.005), ("qwen3", 0.005), ("phi3", 0.01), ("gemma3", 0.08)]
)
def test_tiny_models_say_nearly_the_same(family: str, most: float, tmp_path: Path) -> None:
    """Matrices drawn wider, or many layers with norms after the blocks, would amplify any error."""
    sizes: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    folder = make_model(family, tmp_path, std=0.1, **{**sizes, "num_hidden_layers": 2})
    found = _after(folder, PROMPT)
    assert 0.0 < found.divergence < most and found.same_top > 0.75


def test_an_engine_in_fp8_runs_plans_in_nano_batches(tmp_path: Path) -> None:
    """Its tokens are those of its sequential run, but for ties that the order of sums decides."""
    folder = make_model("llama2", tmp_path, std=0.05)
    plan = tmp_path / "plan.json"
    graph = build_graph(load(folder), None)
    plan.write_bytes(nanobatch_plan(in_fp8(graph), 64, [20, 40]).to_json())
    prompts, params = random_prompts(5, 131, longest=40), greedy(5)
    options: dict[str, Any] = {"device": "cpu", "quantization": "fp8", "max_batch_tokens": 64, "max_num_seqs": 8}
    whole = run_model(folder, prompts, params, **options).tokens
    cut = run_model(folder, prompts, params, plan=str(plan), **options).tokens
    pairs = [pair for both in zip(whole, cut, strict=True) for pair in zip(*both, strict=True)]
    assert sum(one == other for one, other in pairs) >= 0.9 * len(pairs)
    plan.write_bytes(nanobatch_plan(graph, 64, [20]).to_json())
    with pytest.raises(PlanError, match="o_proj_quantise"):
        run_model(folder, prompts, params, plan=str(plan), **options)


def _embedded() -> tuple[Path, list[int]]:
    folder = locate_model("default", None)
    return folder, Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PYTHON_TEXT).ids


def test_the_embedded_model_says_the_same_and_is_as_little_surprised() -> None:
    found = _after(*_embedded())
    assert found.same_top > 0.95
    assert found.divergence < 0.01
    exact, quantised = found.perplexities
    assert exact < 6.0 and quantised == pytest.approx(exact, rel=0.03)


def test_one_tensor_with_a_wrong_scale_is_noticed() -> None:
    """Of all tensors in its first layer, the output projection's matters least."""

    def double(weights: Weights) -> None:
        weights.layers[0]["o_proj.weight_scales"].mul_(2.0)

    assert _after(*_embedded(), double).divergence > 0.03


def test_every_tensor_with_a_wrong_scale_changes_tiny_models(tmp_path: Path) -> None:
    folder = make_model("llama2", tmp_path, std=0.1, num_hidden_layers=1)
    right = _after(folder, PROMPT).divergence

    def double(name: str, weights: Weights) -> None:
        weights.layers[0][f"{name}.weight_scales"].mul_(2.0)

    for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        assert _after(folder, PROMPT, partial(double, name)).divergence > 3 * right, name
