"""Kernels of a mixture of experts on a GPU, at the sizes of real models, against the same numbers summed in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import reference_experts as reference
from nanoflow.kernels import triton_experts as fast
from nanoflow.kernels import triton_experts_rows as rows_fast
from nanoflow.kernels.dispatch import are_capturable, kernels_for
from nanoflow.kernels.expert_tiles import ANYWHERE, BESIDE, WHOLE_CARD
from nanoflow.kernels.gemm_tiles import GemmTiles
from nanoflow.kernels.restricted import kernels_beside, kernels_on
from nanoflow.kernels.triton_gemm import has_tma
from nanoflow.models.config_json import load
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism
from tests.driving import greedy, random_prompts, run_model
from tests.elementwise_cases import assert_twins, results_of
from tests.expert_cases import ROUTINGS, ExpertCase, exact
from tests.families import make_model
from tests.gemm_cases import assert_linear, assert_linear_swiglu
from tests.gpu.test_overlap import assert_nearly_equal
from tests.plans import ping_pong_plan

GPU = torch.device("cuda")
if not has_tma(GPU):
    pytest.skip("needs a GPU with a tensor memory accelerator", allow_module_level=True)

pytestmark = pytest.mark.gpu
# E, K, H and I; of the first one an eighth of the width, so that the expected values take no minutes.
SIZES = {"mixtral": (8, 2, 4096, 1792), "qwen3-30b-a3b": (128, 8, 2048, 768), "uneven": (60, 4, 1000, 744)}
NUM_TOKENS = (1, 17, 300, 2048)
TILINGS = tuple(dict.fromkeys(each.first for each in (*WHOLE_CARD, *BESIDE, ANYWHERE)))
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def _case(size: str, routing: str, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> ExpertCase:
    torch.manual_seed(num_tokens)
    num_experts, per_token, width, inner = SIZES[size]
    ids = ROUTINGS[routing](num_tokens, num_experts, per_token, GPU)
    return ExpertCase(num_experts=num_experts, per_token=per_token, width=width, inner=inner, ids=ids, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("size", list(SIZES))
def test_grouped_products(dtype: torch.dtype, num_tokens: int, routing: str, size: str) -> None:
    case = _case(size, routing, num_tokens, dtype)
    launch = case.first()
    fast.experts_in(launch)
    assert_linear_swiglu(launch.writes[0], exact(launch))
    launch = case.second()
    fast.experts_out(launch)
    assert_linear(launch.writes[0], exact(launch))


@pytest.mark.parametrize("num_programs", [132, 84, 7])
@pytest.mark.parametrize("tiles", TILINGS, ids=lambda tiles: f"{tiles.block_m}x{tiles.block_n} s{tiles.num_stages}")
@pytest.mark.parametrize("is_flat", [True, False])
def test_any_tiling_and_number_of_programs(num_programs: int, tiles: GemmTiles, is_flat: bool) -> None:
    """All products end within a tile; the number of programs changes nothing."""
    tiles = replace(tiles, is_flat=is_flat)
    case = _case("uneven", "skewed", 300)
    for launch, run, check in (
        (case.first(), fast.run_experts_in, assert_linear_swiglu),
        (case.second(), fast.run_experts_out, assert_linear),
    ):
        run(launch, tiles, num_programs)
        check(launch.writes[0], exact(launch))
        (again,) = results_of(lambda other, run=run: run(other, tiles, 50), launch)  # type: ignore[misc]
        assert torch.equal(again, launch.writes[0])


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("num_tokens", [1, 64, 513, 2048, 8192])
def test_order(routing: str, size: str, num_tokens: int) -> None:
    launch = _case(size, routing, num_tokens).order()
    for ours, expected in zip(
        results_of(rows_fast.expert_order, launch), results_of(reference.expert_order, launch), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("num_tokens", [1, 300, 4096])
def test_router(is_normalised: bool, size: str, num_tokens: int) -> None:
    """The same probabilities, and of experts that have them: in 16 bits some are equal."""
    launch = _case(size, "balanced", num_tokens).router(is_normalised=is_normalised)
    weights, ids = results_of(rows_fast.router, launch)
    expected, _ = results_of(reference.router, launch)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    probabilities = torch.mm(launch.reads[0], launch.weights[0].t()).float().softmax(-1)
    chosen = probabilities.gather(1, ids.long())
    chosen = chosen / chosen.sum(-1, keepdim=True) if is_normalised else chosen
    torch.testing.assert_close(chosen, expected, rtol=1e-5, atol=1e-7)
    assert all(len({*row}) == len(row) for row in ids.tolist())


def test_a_token_that_is_not_finite_has_experts() -> None:
    launch = _case("qwen3-30b-a3b", "balanced", 20).router(is_normalised=True)
    launch.reads[0][3], launch.reads[0][5, 0] = torch.nan, torch.inf
    weights, ids = results_of(rows_fast.router, launch)
    assert weights.isnan().any(-1).nonzero().flatten().tolist() == [3, 5]
    for row in ids.tolist():
        assert len({*row}) == 8 and min(row) >= 0 and max(row) < 128


@DTYPES
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_combine_and_shared_gate(dtype: torch.dtype, size: str, num_tokens: int) -> None:
    case = _case(size, "balanced", num_tokens, dtype)
    assert_twins(rows_fast.combine, reference.combine, case.combine())
    launch = case.shared_gate()
    (ours,), (expected,) = (results_of(kernel, launch) for kernel in (rows_fast.shared_gate, reference.shared_gate))
    # cuBLAS may sum in another order, and a gate that is rounded to the other side moves its whole row by a step.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, expected, rtol=3 * step, atol=3 * step)


@pytest.mark.parametrize("size", list(SIZES))
def test_a_captured_graph_serves_any_routing(size: str) -> None:
    """From the ids to the weighted sum; among the routings one that leaves most experts without rows."""
    cases = [_case(size, routing, 300) for routing in ("balanced", "same", "skewed")]
    order = cases[0].order()
    ids, (rows, ends) = order.reads[0], order.writes
    first = cases[0].first()
    first = replace(first, reads=(first.reads[0], rows, ends))
    second = cases[0].second()
    second = replace(second, reads=(first.writes[0], rows, ends))
    combine = cases[0].combine()
    combine = replace(combine, reads=(second.writes[0], *combine.reads[1:]))
    chain = (
        (rows_fast.expert_order, order),
        (fast.experts_in, first),
        (fast.experts_out, second),
        (rows_fast.combine, combine),
    )
    hidden = combine.writes[0]
    before = hidden.clone()
    for kernel, launch in chain:
        kernel(launch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for kernel, launch in chain:
            kernel(launch)
    for case in cases:
        first.reads[0].normal_()
        hidden.copy_(before)
        ids.copy_(case.ids)
        for written in (*order.writes, *first.writes, *second.writes):
            written.fill_(torch.nan if written.is_floating_point() else 0)
        graph.replay()
        expected_rows, expected_ends = case.ordered()
        assert torch.equal(rows, expected_rows) and torch.equal(ends[0], expected_ends[0])
        assert_linear_swiglu(first.writes[0], exact(first))
        assert_linear(second.writes[0], exact(second))
        summed = replace(combine, reads=(*combine.reads[:2], before), writes=(before.clone(),))
        reference.combine(summed)
        step = torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(hidden, summed.writes[0], rtol=2 * step, atol=step)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_lanes_compute_the_same(num_tokens: int) -> None:
    """On a part of the card with the same tiles, so the same to the last digit; beside attention with others."""
    case = _case("qwen3-30b-a3b", "balanced", num_tokens)
    launches = case.first(), case.second()
    whole = {OpKind.EXPERTS_IN: fast.experts_in, OpKind.EXPERTS_OUT: fast.experts_out}
    kernels = {**kernels_for(GPU, torch.bfloat16, ()), **whole}
    for launch, check in zip(launches, (assert_linear_swiglu, assert_linear), strict=True):
        (expected,) = results_of(whole[launch.op.kind], launch)
        (on_part,) = results_of(kernels_on(kernels, 84)[launch.op.kind], launch)
        assert torch.equal(on_part, expected)
        (beside,) = results_of(kernels_beside(kernels, 132)[launch.op.kind], launch)
        check(beside, expected)


FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe")
PROMPTS = random_prompts(48, 131, longest=120)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_cpu_but_for_near_ties(family: str, tmp_path: Path) -> None:
    """With CUDA graphs, and without. Experts differ little, so that rounding may choose others."""
    folder = make_model(family, tmp_path, seed=1, dtype="bfloat16", std=0.12, expert_spread=0.2)
    graph = build_graph(load(folder), None)
    kernels = kernels_for(GPU, torch.bfloat16, graph.layer_operations)
    assert kernels[OpKind.EXPERTS_IN] is fast.experts_in and are_capturable(kernels, graph.layer_operations)
    params = greedy(16, logprobs=5)
    options = {"dtype": "bfloat16", "max_num_seqs": len(PROMPTS), "max_batch_tokens": 64}
    theirs = run_model(folder, PROMPTS, params, **options, device="cpu")
    for cuda_graphs in (True, False):
        assert_nearly_equal(
            run_model(folder, PROMPTS, params, **options, device="cuda", cuda_graphs=cuda_graphs), theirs
        )


@pytest.mark.parametrize("mechanism", [Mechanism.STREAM, Mechanism.PARTITION, Mechanism.BESIDE])
def test_a_half_of_a_batch_attends_beside_the_experts_of_the_other(mechanism: Mechanism, tmp_path: Path) -> None:
    """The tokens of the sequential plan, but for near ties."""
    pytest.importorskip("cuda.bindings")
    folder = make_model("qwen3-moe", tmp_path, seed=1, dtype="bfloat16", std=0.12, expert_spread=0.2)
    graph = fuse_swiglu(build_graph(load(folder), None))
    path = tmp_path / "plan.json"
    share = {} if mechanism is Mechanism.STREAM else {"share": 84 / 132}
    path.write_bytes(ping_pong_plan(graph, 64, 40, mechanism, **share).to_json())
    options = {"device": "cuda", "max_batch_tokens": 64, "dtype": "bfloat16", "max_num_seqs": len(PROMPTS)}
    params = greedy(16, logprobs=5)
    theirs = run_model(folder, PROMPTS, params, **options)
    for cuda_graphs in (True, False):
        ours = run_model(folder, PROMPTS, params, **options, cuda_graphs=cuda_graphs, plan=str(path))
        assert_nearly_equal(ours, theirs)
