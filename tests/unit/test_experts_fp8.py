"""Experts in FP8: the graph and its costs, loading, how near a model stays to itself, and plans in nano-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoflow.cli.main import main
from nanoflow.config import EngineConfig
from nanoflow.cost.model import costed_model
from nanoflow.engine import precision
from nanoflow.engine.precision import served_graph
from nanoflow.graph.fp8 import fp8_candidates, in_fp8
from nanoflow.graph.graph import Element, Fp8, OpGraph
from nanoflow.graph.operation import BatchShape, Operation, OpKind, RowDims
from nanoflow.graph.shard import shard
from nanoflow.models import config_json as model_config
from nanoflow.models import fp8
from nanoflow.models import weights as weights_module
from nanoflow.models.contents import read_contents
from nanoflow.models.fp8 import dequantised, quantise_rows
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import Weights, load_weights, random_weights
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import PipelinePlan, PlanError
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.search import cuts, search
from tests.agreement import Agreement, agreement
from tests.driving import greedy, random_prompts, run_model
from tests.families import make_model
from tests.logits import prompt_logits
from tests.plans import ping_pong_plan
from tests.quantisers import CASES, write_twins

CPU = torch.device("cpu")
PROMPT = [number * 37 % 131 for number in range(60)]
EXPERTS = ("experts_in.weight", "experts_out.weight")
# Widths that suit FP8; experts that are nearly alike, as rounding may choose another one.
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2-moe": {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 64},
    "qwen3-moe": {"moe_intermediate_size": 32},
}


def _preset(name: str) -> OpGraph:
    return build_graph(preset_config(name), None)


def _ops(graph: OpGraph) -> dict[str, Operation]:
    return {op.name: op for op in graph.layer}


# The graph.


def test_rows_of_experts_are_quantised_by_the_norm_and_by_a_pass() -> None:
    graph = in_fp8(_preset("mixtral-8x7b"))
    graph.validate()
    ops = _ops(graph)
    names = list(ops)
    assert names[names.index("ffn_norm") :] == [
        *("ffn_norm", "router", "expert_order", "experts_in", "experts_out_quantise", "experts_out", "combine")
    ]
    assert ops["ffn_norm"].writes == ("normed_fp8", "normed_scale", "normed") and ops["router"].reads == ("normed",)
    assert ops["experts_in"].kind is OpKind.EXPERTS_IN_FP8
    assert ops["experts_in"].reads == ("normed_fp8", "normed_scale", "expert_rows", "expert_ends")
    assert ops["experts_in"].weights == ("experts_in.weight", "experts_in.weight_scales")
    assert ops["experts_in"].writes == ("expert_activation",)
    assert ops["experts_out_quantise"].dims == RowDims(width=2 * 14336, num_parts=2)
    assert ops["experts_out"].reads == (
        *("expert_activation_fp8", "expert_activation_scale", "expert_rows", "expert_ends"),
    )
    rows, scales = (graph.tensor(f"expert_activation_{name}") for name in ("fp8", "scale"))
    assert (rows.width, rows.element, rows.is_by_range) == (2 * 14336, Element.FP8, True)
    assert (scales.width, scales.element, scales.is_by_range) == (2, Element.FLOAT32, True)


def test_costs_of_mixtral_by_hand() -> None:
    """One token passes 2 of 8 experts; a weight is a byte, and each row of a matrix has a scale of 4."""
    plain, graph = _preset("mixtral-8x7b"), in_fp8(_preset("mixtral-8x7b"))
    ops, one, two = _ops(graph), BatchShape(num_tokens=1), BatchShape(num_tokens=2)
    assert ops["experts_in"].memory_bytes(one, 2) == 2 * 28672 * 4100 + 4100 + 2 * 14336 * 2
    assert ops["experts_out"].memory_bytes(two, 2) == 3.5 * 4096 * 14340 + 4 * (14340 + 4096 * 2)
    assert ops["experts_out_quantise"].memory_bytes(two, 2) == 2 * 2 * (14336 * 3 + 4)
    for name in ("experts_in", "experts_out"):
        assert ops[name].flops(two) == _ops(plain)[name].flops(two)
    of_experts = 3 * 4096 * 14336
    assert graph.num_fp8_parameters == 32 * (8 * of_experts + 4096 * (6144 + 4096))
    model = costed_model(preset_config("mixtral-8x7b"), is_fp8=True)
    assert graph.num_fp8_parameters - model.num_active_fp8_parameters == 32 * 6 * of_experts
    # What must be loaded into 48 GB.
    assert 47.0e9 < graph.parameter_bytes(2) < 47.1e9


def test_one_of_several_gpus_has_a_part_of_every_expert() -> None:
    plain, graph = _preset("qwen3-30b-a3b"), in_fp8(_preset("qwen3-30b-a3b"))
    ours, theirs = (_ops(shard(each, 4)) for each in (graph, plain))
    assert ours["experts_out_quantise"].dims == RowDims(width=8 * 768 // 4, num_parts=8)
    assert all(ours[name].dims == theirs[name].dims for name in ("experts_in", "experts_out", "combine"))
    assert [name for name in ours if "all_reduce" in name] == [name for name in theirs if "all_reduce" in name]


def test_experts_with_biases_stay_as_they_are(tmp_path: Path) -> None:
    graph = _preset("gpt-oss-20b")
    assert set(EXPERTS).isdisjoint(fp8_candidates(graph)) and "qkv_proj.weight" in fp8_candidates(graph)
    config = EngineConfig(quantization="fp8", device="cpu")
    served, line = served_graph(config, graph, None, torch.bfloat16, CPU)
    assert _ops(served)["experts_in"].kind is OpKind.EXPERTS_IN
    assert line is not None and line.endswith("; experts with biases stay in bfloat16")
    _, line = served_graph(config, _preset("mixtral-8x7b"), None, torch.bfloat16, CPU)
    assert line is not None and "experts" not in line


# Weights.


def _tiny(**sizes: int) -> OpGraph:
    values = {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 5,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
    }
    return build_graph(model_config.parse({**values, **sizes}), None)


def test_random_experts_are_those_without_fp8_quantised_and_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of more than a matrix is there at once, nor more of its rows in float32 than a chunk has."""
    sizes: list[int] = []
    quantise = fp8.quantise_rows

    def noted(rows: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(rows.numel())
        return quantise(rows)

    monkeypatch.setattr(fp8, "quantise_rows", noted)
    monkeypatch.setattr(fp8, "_CHUNK_NUMBERS", 20 * 32)
    plain, quantised = (random_weights(each, torch.bfloat16, CPU, 3) for each in (_tiny(), in_fp8(_tiny())))
    assert max(sizes) == 20 * 32
    for name in EXPERTS:
        numbers, scales = quantise_rows(plain.layers[0][name])
        assert torch.equal(quantised.layers[0][name].view(torch.uint8), numbers.view(torch.uint8))
        assert torch.equal(quantised.layers[0][f"{name}_scales"], scales[..., 0])
    assert quantised.num_bytes == in_fp8(_tiny()).parameter_bytes(2)


def test_experts_that_are_stored_in_blocks_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen 3 and DeepSeek have them: a scale for each 128 x 128 of each matrix of each expert."""
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "moe_intermediate_size": 256,
        "num_experts": 3,
        "num_experts_per_tok": 2,
    }
    folder = make_model("qwen3-moe", tmp_path, std=0.05, num_hidden_layers=1, mlp_only_layers=[], **sizes)
    twin = write_twins(folder, CASES["fp8-block"])
    graph = build_graph(model_config.load(folder), None)
    served, line = served_graph(
        EngineConfig(quantization="fp8", device="cpu"), graph, read_contents(graph, folder), torch.float32, CPU
    )
    assert line is not None and line.startswith("weights are stored as FP8 and served as FP8 and float32")
    monkeypatch.setattr(precision, "multiplies_fp8", lambda device, dtype: True)
    by_itself, _ = served_graph(EngineConfig(device="cpu"), graph, read_contents(graph, folder), torch.float32, CPU)
    assert set(EXPERTS) <= {each.name for each in by_itself.kinds[0].parameters if each.fp8 is not None}
    ours = load_weights(served, folder, torch.float32, CPU, show_progress=False).layers[0]
    exact = load_weights(graph, twin, torch.float32, CPU, show_progress=False).layers[0]
    (kind,) = served.kinds
    for parameter in kind.parameters:
        if parameter.name in EXPERTS:
            assert parameter.fp8 == Fp8(block=(128, 128))
            for numbers, scales, wanted in zip(
                ours[parameter.name], ours[parameter.scales_name], exact[parameter.name], strict=True
            ):
                torch.testing.assert_close(dequantised(numbers, scales, (128, 128)), wanted)
    in_blocks = prompt_logits(folder, PROMPT, is_fp8=True, kept=dict.fromkeys(EXPERTS, Fp8(block=(128, 128))))
    assert 0.0 < agreement(prompt_logits(twin, PROMPT), in_blocks, PROMPT).divergence < 0.02


def test_a_stack_that_is_stored_whole_is_quantised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("mixtral", tmp_path, num_hidden_layers=1)
    graph = in_fp8(build_graph(model_config.load(folder), None))
    by_part = load_weights(graph, folder, torch.float32, CPU, show_progress=False).layers[0]
    _stack_experts(folder)
    monkeypatch.setattr(weights_module, "_MAPPED_BYTES", 100_000)
    monkeypatch.setattr(fp8, "_CHUNK_NUMBERS", 3_000)
    whole = load_weights(graph, folder, torch.float32, CPU, show_progress=False).layers[0]
    assert all(torch.equal(whole[name].view(torch.uint8), by_part[name].view(torch.uint8)) for name in whole)


def _stack_experts(folder: Path) -> None:
    """Rewrite a Mixtral as transformers 5 may hold it: all experts of a layer in one tensor."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    block = "model.layers.0.block_sparse_moe."
    of = {
        matrix: [tensors.pop(f"{block}experts.{expert}.{matrix}.weight") for expert in range(6)]
        for matrix in ("w1", "w2", "w3")
    }
    gate_up = torch.stack([torch.cat(pair) for pair in zip(of["w1"], of["w3"], strict=True)])
    stacks = {"gate_up_proj": gate_up, "down_proj": torch.stack(of["w2"])}
    save_file({**tensors, **{f"model.layers.0.mlp.experts.{name}": each for name, each in stacks.items()}}, path)


# The model.


def _double(name: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for layer in weights.layers:
            if name in layer:
                layer[name].mul_(2.0)

    return change


@lru_cache(maxsize=4)
def _exact_logits(folder: Path) -> Tensor:
    return prompt_logits(folder, PROMPT)


def _after(folder: Path, change: Callable[[Weights], object] = lambda weights: None) -> Agreement:
    return agreement(_exact_logits(folder), prompt_logits(folder, PROMPT, is_fp8=True, change=change), PROMPT)


@pytest.mark.parametrize("family", list(SIZES))
def test_tiny_models_say_nearly_the_same_unless_a_scale_is_wrong(family: str, tmp_path: Path) -> None:
    folder = make_model(family, tmp_path, std=0.1, expert_spread=0.2, **SIZES[family])
    right = _after(folder)
    assert 0.0 < right.divergence < 0.008 and right.same_top > 0.8
    for name in EXPERTS:
        assert _after(folder, _double(f"{name}_scales")).divergence > 3 * right.divergence, name


# Plans.


def _part_alike(one: list[list[int]], other: list[list[int]]) -> float:
    """Part of the tokens that are the same."""
    pairs = [pair for both in zip(one, other, strict=True) for pair in zip(*both, strict=True)]
    return sum(first == second for first, second in pairs) / len(pairs)


def test_rows_sorted_by_expert_are_quantised_in_the_ranges_that_they_were_sorted_in() -> None:
    graph = in_fp8(_preset("mixtral-8x7b"))
    plan = nanobatch_plan(graph, 64, [20])
    plan.validate(graph)
    first, second = (nano for nano in plan.nano_operations if nano.operation == "experts_out_quantise")
    others = {first: replace(first, stop=30), second: replace(second, start=30)}
    moved = replace(plan, nano_operations=tuple(others.get(nano, nano) for nano in plan.nano_operations))
    with pytest.raises(PlanError, match="must be cut at the same places"):
        moved.validate(graph)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_experts_of_a_half_beside_attention_of_the_other_give_the_same_tokens(family: str, tmp_path: Path) -> None:
    """Of a sequential run: all of them in float32; in FP8 other sums may round a number to its neighbour."""
    folder = make_model(family, tmp_path, std=0.1, expert_spread=0.2, **{"num_hidden_layers": 3, **SIZES[family]})
    graph = build_graph(model_config.load(folder), None)
    prompts, params = random_prompts(8, 131, longest=30), greedy(4)
    path = tmp_path / "plan.json"
    for quantization, least in (("none", 1.0), ("fp8", 0.9)):
        ours = graph if quantization == "none" else in_fp8(graph)
        path.write_bytes(ping_pong_plan(ours, 64, 24, Mechanism.PARTITION, share=0.6).to_json())
        options: dict[str, Any] = {"device": "cpu", "quantization": quantization, "max_batch_tokens": 64}
        whole = run_model(folder, prompts, params, **options).tokens
        cut = run_model(folder, prompts, params, **options, plan=str(path)).tokens
        assert _part_alike(whole, cut) >= least


def test_a_search_proposes_it_for_mixtral_in_fp8_and_a_model_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By estimate, which knows no power in FP8. A tiny Mixtral has operations of the same names.

    The search is cut short to what it finds soonest.
    """
    monkeypatch.setattr(cuts, "_NEIGHBOURS", 0)
    monkeypatch.setattr(search, "_LEAST_SHARED_TOKENS", 2**20)
    profile, path = str(tmp_path / "profile.json"), tmp_path / "plan.json"
    command = ["profile", "preset:mixtral-8x7b", "-o", profile, "--estimate", "h200", "--quantization", "fp8"]
    assert main([*command, "--max-batch-tokens", "1024"]) == 0
    batch = ["--max-batch-tokens", "1024", "--decodes", "512", "--context", "2048"]
    assert main(["search", profile, "-o", str(path), *batch, "--time-limit", "10"]) == 0
    plan = PipelinePlan.load(path)
    lanes = {
        name: {nano.lane for nano in plan.nano_operations if nano.operation == name}
        for name in ("experts_in", "experts_out", "decode_attention")
    }
    assert len({(nano.start, nano.stop) for nano in plan.nano_operations}) == 2
    assert lanes["experts_in"] == lanes["experts_out"] and lanes["experts_in"].isdisjoint(lanes["decode_attention"])
    folder = make_model("mixtral", tmp_path / "model", std=0.1, expert_spread=0.2, num_hidden_layers=2)
    plan.validate(in_fp8(build_graph(model_config.load(folder), None)))
    prompts, params = random_prompts(24, 131, longest=60), greedy(2)
    options: dict[str, Any] = {"device": "cpu", "quantization": "fp8", "max_batch_tokens": 1024}
    whole = run_model(folder, prompts, params, **options).tokens
    cut = run_model(folder, prompts, params, **options, plan=str(path)).tokens
    assert _part_alike(whole, cut) > 0.9
