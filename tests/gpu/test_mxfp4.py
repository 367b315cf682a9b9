"""Experts of a gpt-oss on a GPU at its sizes, in bfloat16 and in MXFP4, against the same numbers summed in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.device.transfer import StagedCopier
from nanoflow.graph.experts import ClampedSwiglu
from nanoflow.graph.mxfp4 import in_mxfp4
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import triton_experts as plain
from nanoflow.kernels import triton_experts_mxfp4 as fast
from nanoflow.kernels.dispatch import are_capturable, kernels_for, unpacks_mxfp4
from nanoflow.kernels.mxfp4_tiles import WHOLE_CARD, Mxfp4Tiles
from nanoflow.models.config_json import load
from nanoflow.models.mxfp4 import numbers_of
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import load_weights, random_weights
from tests.driving import greedy, random_prompts, run_model
from tests.elementwise_cases import results_of
from tests.expert_cases import ROUTINGS, ExpertCase, exact
from tests.families import make_model
from tests.gemm_cases import assert_linear
from tests.gpu.test_overlap import assert_nearly_equal
from tests.mxfp4 import write_twins
from tests.mxfp4_cases import packed

GPU = torch.device("cuda")
if not unpacks_mxfp4(GPU, torch.bfloat16):
    pytest.skip("needs a GPU with a tensor memory accelerator", allow_module_level=True)

pytestmark = pytest.mark.gpu
SCALES = (119, 121)
# Those that a model chooses from, and larger ones, whose products take longest.
TILINGS = (
    *WHOLE_CARD,
    replace(WHOLE_CARD[-1], num_warps=8),
    replace(WHOLE_CARD[-1], block_m=256, num_warps=8, programs_per_sm=1),
)


def _case(routing: str, num_tokens: int, num_experts: int = 32) -> ExpertCase:
    torch.manual_seed(num_tokens)
    return ExpertCase(
        num_experts=num_experts,
        per_token=4,
        width=2880,
        inner=2880,
        ids=ROUTINGS[routing](num_tokens, num_experts, 4, GPU),
        dtype=torch.bfloat16,
        has_biases=True,
        clamped=ClampedSwiglu(alpha=1.702, limit=7.0),
    )


def _assert_activation(out: torch.Tensor, expected: torch.Tensor) -> None:
    """One step of `up` near -1, where the activation is small, changes it by that step times the gate, at most 7."""
    step = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=4 * step, atol=8 * step)


@pytest.mark.parametrize("routing", ["balanced", "skewed"])
@pytest.mark.parametrize("num_tokens", [1, 40, 150, 300, 700, 2400])
def test_packed_products(num_tokens: int, routing: str) -> None:
    """Every tiling once, by the number of rows of an expert."""
    case = _case(routing, num_tokens)
    launch, twin = packed(case.first(), scales=SCALES)
    fast.experts_in_mxfp4(launch)
    _assert_activation(launch.writes[0], exact(twin))
    launch, twin = packed(case.second(), scales=SCALES)
    fast.experts_out_mxfp4(launch)
    assert_linear(launch.writes[0], exact(twin))


@pytest.mark.parametrize("num_tokens", [1, 300, 2400])
def test_biases_and_a_clamped_activation_in_bfloat16(num_tokens: int) -> None:
    case = _case("balanced", num_tokens)
    for launch, kernel, check in (
        (case.first(), plain.experts_in, _assert_activation),
        (case.second(), plain.experts_out, assert_linear),
    ):
        kernel(launch)
        check(launch.writes[0], exact(launch))


@pytest.mark.parametrize("tiles", TILINGS, ids=lambda tiles: f"{tiles.block_m} of {tiles.num_warps} warps")
@pytest.mark.parametrize("is_flat", [False, True])
def test_any_tiling_and_number_of_programs(tiles: Mxfp4Tiles, is_flat: bool) -> None:
    """Also again and again: sums would differ if a step wrote numbers that products of the last one still read."""
    case, tiles = _case("skewed", 200, num_experts=8), replace(tiles, is_flat=is_flat)
    for launch, run in ((case.first(), fast.run_experts_in), (case.second(), fast.run_experts_out)):
        ours, twin = packed(launch, scales=SCALES)
        run(ours, tiles, 7)
        _assert_activation(ours.writes[0], exact(twin))
        for num_programs in (132, 264, 264, 264, 264, 396):
            (again,) = results_of(lambda other, run=run, count=num_programs: run(other, tiles, count), ours)  # type: ignore[misc]
            assert torch.equal(again, ours.writes[0])


def test_every_number_is_exact() -> None:
    """With all scales that make normal numbers: each row of the product takes one column of the matrix."""
    ids = torch.zeros((128, 1), dtype=torch.int32, device=GPU)
    case = ExpertCase(num_experts=2, per_token=1, width=256, inner=128, ids=ids, dtype=torch.bfloat16)
    launch, _ = packed(case.second(), scales=(2, 126))
    launch.reads[0].copy_(torch.eye(128, device=GPU))
    fast.experts_out_mxfp4(launch)
    numbers = numbers_of(launch.weights[0][0], launch.weights[1][0], is_gated=False)
    assert torch.equal(launch.writes[0], numbers.t())


def test_a_model_has_kernels_that_graphs_can_capture() -> None:
    for graph in (
        build_graph(preset_config("gpt-oss-20b"), None),
        in_mxfp4(build_graph(preset_config("gpt-oss-20b"), None)),
    ):
        kernels = kernels_for(GPU, torch.bfloat16, graph.layer_operations)
        assert are_capturable(kernels, graph.layer_operations)
    assert kernels[OpKind.EXPERTS_IN_MXFP4] is fast.experts_in_mxfp4


def test_weights_are_laid_out_as_on_a_cpu_and_drawn_fast(tmp_path: Path) -> None:
    write_twins(make_model("gpt-oss", tmp_path))
    graph, cpu = in_mxfp4(build_graph(load(tmp_path), None)), torch.device("cpu")
    ours = load_weights(graph, tmp_path, torch.bfloat16, GPU, show_progress=False, make_copier=StagedCopier)
    theirs = load_weights(graph, tmp_path, torch.bfloat16, cpu, show_progress=False)
    for one, other in zip((ours.shared, *ours.layers), (theirs.shared, *theirs.layers), strict=True):
        assert all(torch.equal(one[name].cpu(), other[name]) for name in other)
    whole = in_mxfp4(build_graph(preset_config("gpt-oss-20b"), None))
    weights = random_weights(whole, torch.bfloat16, GPU, seed=0)
    assert weights.num_bytes == whole.parameter_bytes(2)
    last = weights.layers[-1]
    numbers = numbers_of(last["experts_in.weight"][31], last["experts_in.weight_scales"][31], is_gated=True)
    assert 0.016 < float(numbers.float().std()) < 0.022


def test_tokens_are_those_of_a_cpu_but_for_near_ties(tmp_path: Path) -> None:
    """A model whose experts are packed on the GPU alone, with CUDA graphs, and without."""
    write_twins(make_model("gpt-oss", tmp_path, seed=1, std=0.12, expert_spread=0.2))
    prompts, params = random_prompts(48, 131, longest=120), greedy(16, logprobs=5)
    options = {"dtype": "bfloat16", "max_num_seqs": 48, "max_batch_tokens": 64}
    theirs = run_model(tmp_path, prompts, params, **options, device="cpu")
    for cuda_graphs in (True, False):
        ours = run_model(tmp_path, prompts, params, **options, device="cuda", cuda_graphs=cuda_graphs)
        assert_nearly_equal(ours, theirs)
