"""Experts in FP8 on a GPU, at the sizes of real models, and models with them beside the same models in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if torch.cuda.get_device_capability()[0] < 9:
    pytest.skip("needs a GPU from Hopper on", allow_module_level=True)

from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import OpKind, RowDims
from nanoflow.kernels import triton_experts_fp8 as fast
from nanoflow.kernels import triton_experts_rows as rows_fast
from nanoflow.kernels.dispatch import are_capturable, kernels_for
from nanoflow.kernels.expert_tiles import BESIDE, FP8_EXPERT_TILES, WHOLE_CARD
from nanoflow.kernels.reference_fp8 import quantise_fp8
from nanoflow.kernels.restricted import kernels_beside, kernels_on
from nanoflow.kernels.triton_fp8_rows import FP8_ROW_KERNELS
from nanoflow.models.config_json import load
from nanoflow.models.fp8 import E4M3
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import random_weights
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profiler.pairs import measure_pairs, pair_tasks
from nanoflow.profiler.profile import new_job
from nanoflow.profiler.sustained import Span
from nanoflow.profiler.work import Sizes
from tests.driving import greedy, random_prompts, run_model
from tests.elementwise_cases import results_of
from tests.expert_cases import ROUTINGS, ExpertCase
from tests.families import make_model
from tests.fp8_cases import assert_experts, assert_rows, experts_case
from tests.plans import experts_beside_plan, ping_pong_plan

GPU = torch.device("cuda")
pytestmark = pytest.mark.gpu
# E, K, H and I; of the first one an eighth of the width, so that the expected values take no minutes.
SIZES = {"mixtral": (8, 2, 4096, 1792), "qwen3-30b-a3b": (128, 8, 2048, 768), "uneven": (60, 4, 1008, 752)}
BLOCKED = pytest.mark.parametrize("is_blocked", [False, True], ids=["rows", "blocks"])


def _case(size: str, routing: str, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> ExpertCase:
    torch.manual_seed(num_tokens)
    num_experts, per_token, width, inner = SIZES[size]
    ids = ROUTINGS[routing](num_tokens, num_experts, per_token, GPU)
    return ExpertCase(num_experts=num_experts, per_token=per_token, width=width, inner=inner, ids=ids, dtype=dtype)


@BLOCKED
@pytest.mark.parametrize("num_tokens", [1, 17, 300, 2048])
@pytest.mark.parametrize(
    ("size", "routing"), [("mixtral", "balanced"), ("qwen3-30b-a3b", "skewed"), ("qwen3-30b-a3b", "same")]
)
def test_grouped_products(size: str, routing: str, num_tokens: int, is_blocked: bool) -> None:
    case = _case(size, routing, num_tokens)
    for launch in (case.first(), case.second()):
        launch = experts_case(launch, is_blocked=is_blocked)
        fast.EXPERT_FP8_PRODUCT_KERNELS[launch.op.kind](launch)
        assert_experts(launch, case.ids.numel())


@BLOCKED
@pytest.mark.parametrize("num_programs", [132, 7])
def test_any_tiling_and_number_of_programs(num_programs: int, is_blocked: bool) -> None:
    """Products end within a tile, unless blocks have scales; the number of programs changes nothing."""
    case = _case("mixtral" if is_blocked else "uneven", "skewed", 300, torch.float16)
    launches = [experts_case(each, is_blocked=is_blocked) for each in (case.first(), case.second())]
    for candidates in (WHOLE_CARD, BESIDE):
        found, anywhere = FP8_EXPERT_TILES[candidates, is_blocked]
        for tiles in (*found, anywhere):
            for launch, run, cut in zip(
                launches, (fast.run_experts_in_fp8, fast.run_experts_out_fp8), (tiles.first, tiles.second), strict=True
            ):
                launch.writes[0].fill_(torch.nan)
                run(launch, cut, num_programs)
                assert_experts(launch, case.ids.numel())
                (again,) = results_of(lambda other, run=run, cut=cut: run(other, cut, 50), launch)  # type: ignore[misc]
                assert torch.equal(again, launch.writes[0])


@pytest.mark.parametrize("size", list(SIZES))
def test_a_captured_graph_serves_any_routing(size: str) -> None:
    """From the ids to the second product; among the routings one that leaves most experts without rows."""
    cases = [_case(size, routing, 300) for routing in ("balanced", "same", "skewed")]
    case, order = cases[0], cases[0].order()
    first = experts_case(case.first())
    first = replace(first, reads=(*first.reads[:2], *order.writes))
    (activation,) = first.writes
    rows = torch.empty_like(activation, dtype=E4M3)
    scales = case.poisoned(300, case.per_token, dtype=torch.float32)
    quantise = replace(
        case.combine(), reads=(activation,), writes=(rows, scales), op=replace(case.combine().op, dims=RowDims(width=1))
    )
    second = experts_case(case.second())
    second = replace(second, reads=(rows, scales, *order.writes))
    chain = (
        (rows_fast.expert_order, order),
        (fast.experts_in_fp8, first),
        (FP8_ROW_KERNELS[OpKind.QUANTISE_FP8], quantise),
        (fast.experts_out_fp8, second),
    )
    for kernel, launch in chain:
        kernel(launch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for kernel, launch in chain:
            kernel(launch)
    for other in cases:
        order.reads[0].copy_(other.ids)
        first.reads[1].mul_(1.5)
        for written in (activation, scales, *second.writes):
            written.fill_(torch.nan)
        graph.replay()
        assert torch.equal(order.writes[0], other.ordered()[0])
        assert_experts(first, order.writes[0].numel())
        assert_experts(second, order.writes[0].numel())
        assert_rows(FP8_ROW_KERNELS[OpKind.QUANTISE_FP8], quantise_fp8, quantise, moved=0.01)


@pytest.mark.parametrize("num_tokens", [17, 2048])
def test_lanes_compute_the_same(num_tokens: int) -> None:
    """On a part of the card with the same tiles, so the same to the last digit; beside attention with others."""
    case = _case("qwen3-30b-a3b", "balanced", num_tokens)
    kernels = {**kernels_for(GPU, torch.bfloat16, ()), **fast.EXPERT_FP8_PRODUCT_KERNELS}
    for launch in map(experts_case, (case.first(), case.second())):
        (expected,) = results_of(kernels[launch.op.kind], launch)
        (on_part,) = results_of(kernels_on(kernels, 84)[launch.op.kind], launch)
        assert torch.equal(on_part, expected)
        kernels_beside(kernels, 132)[launch.op.kind](launch)
        assert_experts(launch, case.ids.numel())


def test_mixtral_is_drawn_within_48_gb() -> None:
    """On a card that has no more, with what is allocated on the way."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = in_fp8(build_graph(preset_config("mixtral-8x7b"), None))
    weights = random_weights(graph, torch.bfloat16, GPU, 0)
    assert weights.num_bytes == graph.parameter_bytes(2)
    assert torch.cuda.max_memory_reserved() - before < 48e9
    del weights
    torch.cuda.empty_cache()


def test_experts_are_measured_beside_attention(tmp_path: Path) -> None:
    """With SMs of their own, and on those of attention: both get a part of what they have alone."""
    pytest.importorskip("cuda.bindings")
    job = new_job(
        "preset:qwen3-30b-a3b",
        PRESETS["qwen3-30b-a3b"],
        device=torch.device("cuda", torch.cuda.current_device()),
        dtype=torch.bfloat16,
        sizes=Sizes.small(1024),
        path=tmp_path / "profile.json",
        is_quick=True,
        is_fp8=True,
    )
    found = [pair for pair in pair_tasks(job.site, 1024, 132) if pair.first.operation == "experts_in"]
    by_mechanism = {pair.mechanism: pair for pair in found}
    assert {Mechanism.PARTITION, Mechanism.BESIDE} <= by_mechanism.keys()
    wanted = [by_mechanism[each] for each in (Mechanism.PARTITION, Mechanism.BESIDE)]
    for point in measure_pairs(job.site, wanted, Span(settle_s=0.1, measure_s=0.25)):
        assert 0.05 < point.first_performance < 1.15 and 0.05 < point.second_performance < 1.15, point


FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2-moe": {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 64},
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_engines_agree_with_and_without_graphs_and_lanes(family: str, tmp_path: Path) -> None:
    """And with a CPU that emulates the products. By chance one token of 131 would be the same.

    Random weights make tokens nearly tie, and other sums round some numbers in FP8 to their neighbours.
    """
    pytest.importorskip("cuda.bindings")
    sizes = FAMILIES[family]
    folder = make_model(family, tmp_path, seed=1, dtype="bfloat16", std=0.05, expert_spread=0.2, **sizes)
    graph = fuse_swiglu(in_fp8(build_graph(load(folder), None)))
    kernels = kernels_for(GPU, torch.bfloat16, graph.layer_operations)
    assert kernels[OpKind.EXPERTS_IN_FP8] is fast.experts_in_fp8 and are_capturable(kernels, graph.layer_operations)
    prompts, params = random_prompts(32, 131, longest=90), greedy(4)
    options: dict[str, Any] = {"dtype": "bfloat16", "quantization": "fp8", "max_batch_tokens": 256}

    def tokens(device: str, **more: Any) -> list[list[int]]:
        return run_model(folder, prompts, params, **options, device=device, **more).tokens

    whole = tokens("cuda")
    runs = {"on a CPU": tokens("cpu"), "without graphs": tokens("cuda", cuda_graphs=False)}
    plans = (
        ping_pong_plan(graph, 256, 128, Mechanism.PARTITION, share=84 / 132),
        experts_beside_plan(graph, 256, 128, share=84 / 132),
    )
    for plan in plans:
        path = tmp_path / "plan.json"
        path.write_bytes(plan.to_json())
        runs[plan.name] = tokens("cuda", plan=str(path))
    alike = {name: _part_alike(whole, other) for name, other in runs.items()}
    assert min(alike.values()) > 0.8, alike


def _part_alike(one: list[list[int]], other: list[list[int]]) -> float:
    """Part of the tokens that are the same."""
    pairs = [pair for both in zip(one, other, strict=True) for pair in zip(*both, strict=True)]
    return sum(first == second for first, second in pairs) / len(pairs)
