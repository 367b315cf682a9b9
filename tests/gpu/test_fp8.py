"""Operations in FP8 on a GPU at the sizes of Llama-3-8B, and a model in FP8 beside the same model in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import triton_fp8 as fast
from nanoflow.kernels import triton_fp8_split
from nanoflow.kernels.gemm_tiles import BESIDE_TILES, FP8_TILES, GEMM_TILES, PART_TILES
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.reference_fp8 import FP8_KERNELS
from nanoflow.kernels.restricted import kernels_on
from nanoflow.kernels.triton_fp8_rows import FP8_ROW_KERNELS
from nanoflow.models.config_json import load
from nanoflow.models.registry import build_graph
from nanoflow.plan.sequential import nanobatch_plan
from tests.driving import greedy, random_prompts, run_engine
from tests.elementwise_cases import Cases
from tests.families import make_model
from tests.fp8_cases import (
    added_to,
    assert_gated,
    assert_product,
    assert_rows,
    exact_product,
    gated,
    product_case,
    row_case,
)

GPU = torch.device("cuda")
if torch.cuda.get_device_capability()[0] < 9:
    pytest.skip("needs a GPU from Hopper on", allow_module_level=True)

pytestmark = pytest.mark.gpu
SHAPES = {"qkv_proj": (6144, 4096), "o_proj": (4096, 4096), "gate_up_proj": (28672, 4096), "down_proj": (4096, 14336)}
NUM_TOKENS = pytest.mark.parametrize("num_tokens", [1, 17, 300, 2048])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", list(FP8_ROW_KERNELS))
@pytest.mark.parametrize("width", [64, 2304, 14336, 18944])
def test_rows(kind: OpKind, width: int, dtype: torch.dtype) -> None:
    cases = Cases(num_tokens=67, dtype=dtype, device=GPU)
    launch = row_case(cases, kind, width, is_kept=kind is OpKind.RMS_NORM_FP8)
    # exp and rsqrt differ in their last digit.
    assert_rows(FP8_ROW_KERNELS[kind], FP8_KERNELS[kind], launch, moved=0.02)


@pytest.mark.parametrize("operation", list(SHAPES))
@NUM_TOKENS
def test_products_with_scales_of_rows(operation: str, num_tokens: int) -> None:
    launch = product_case(num_tokens, SHAPES[operation], torch.bfloat16, GPU, has_bias="qkv" in operation)
    expected = exact_product(launch)
    assert fast.can_scale(launch)
    fast.run_scaled_mm(launch)
    assert_product(launch.writes[0], expected, has_fast_sums=True)
    launch.writes[0].fill_(torch.nan)
    fast.run_linear_fp8(launch, *fast.choose_cut(launch))
    assert_product(launch.writes[0], expected, has_fast_sums=True)
    added = added_to(launch)
    expected = exact_product(added)
    fast.linear_add_fp8(added)
    assert_product(added.writes[0], expected, has_fast_sums=True)


@NUM_TOKENS
def test_swiglu_in_the_product(num_tokens: int) -> None:
    launch = gated(product_case(num_tokens, SHAPES["gate_up_proj"], torch.bfloat16, GPU))
    expected = torch.empty_like(launch.writes[0])
    FP8_KERNELS[OpKind.LINEAR_SWIGLU_FP8](replace(launch, writes=(expected,)))
    fast.linear_swiglu_fp8(launch)
    assert_gated(launch.writes[0], expected)


@pytest.mark.parametrize("operation", list(SHAPES))
@NUM_TOKENS
def test_products_with_scales_of_blocks(operation: str, num_tokens: int) -> None:
    launch = product_case(num_tokens, SHAPES[operation], torch.bfloat16, GPU, is_blocked=True)
    expected = exact_product(launch)
    fast.linear_fp8(launch)
    assert_product(launch.writes[0], expected, has_fast_sums=True)
    added = added_to(launch)
    expected = exact_product(added)
    fast.linear_add_fp8(added)
    assert_product(added.writes[0], expected, has_fast_sums=True)


@pytest.mark.parametrize("num_programs", [132, 84, 7])
@pytest.mark.parametrize("candidates", [GEMM_TILES, PART_TILES, BESIDE_TILES], ids=["whole", "part", "beside"])
@pytest.mark.parametrize("is_blocked", [False, True])
def test_any_tiles_and_number_of_programs(num_programs: int, candidates: tuple[object, ...], is_blocked: bool) -> None:
    """K and N end within a tile, and tokens begin at any row."""
    whole = product_case(305, (2976, 1008), torch.bfloat16, GPU, is_blocked=is_blocked, has_bias=True)
    launch = replace(whole, reads=tuple(each[5:] for each in whole.reads), writes=(whole.writes[0][5:],))
    expected = exact_product(launch)
    for tiles in FP8_TILES[candidates, is_blocked]:  # type: ignore[index]
        launch.writes[0].fill_(torch.nan)
        fast.run_linear_fp8(launch, tiles, num_programs)
        assert_product(launch.writes[0], expected, has_fast_sums=True)


@pytest.mark.parametrize("operation", ["o_proj", "down_proj"])
@pytest.mark.parametrize("num_tokens", [1, 64, 128])
def test_few_tokens_are_split(operation: str, num_tokens: int) -> None:
    """Twice, as the flags of the first launch have to be 0 again."""
    kernels = triton_fp8_split.products()
    for _ in range(2):
        added = added_to(product_case(num_tokens, SHAPES[operation], torch.bfloat16, GPU))
        expected = exact_product(added)
        kernels[OpKind.LINEAR_ADD_FP8](added)
        assert_product(added.writes[0], expected, has_fast_sums=True)


def test_a_captured_graph_serves_other_numbers() -> None:
    launch = product_case(300, (6144, 4096), torch.bfloat16, GPU)
    added = added_to(product_case(300, (4096, 4096), torch.bfloat16, GPU))
    hidden = added.writes[0].clone()
    few = added_to(product_case(64, (4096, 14336), torch.bfloat16, GPU))
    few_before, kernels = few.writes[0].clone(), triton_fp8_split.products()
    fast.linear_fp8(launch)
    fast.linear_add_fp8(added)
    kernels[OpKind.LINEAR_ADD_FP8](few)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fast.linear_fp8(launch)
        fast.linear_add_fp8(added)
        kernels[OpKind.LINEAR_ADD_FP8](few)
    few.writes[0].copy_(few_before)
    launch.writes[0].fill_(torch.nan)
    launch.reads[1].mul_(2.0)
    added.writes[0].copy_(hidden)
    expected, expected_sum, expected_few = exact_product(launch), exact_product(added), exact_product(few)
    graph.replay()
    assert_product(launch.writes[0], expected, has_fast_sums=True)
    assert_product(added.writes[0], expected_sum, has_fast_sums=True)
    assert_product(few.writes[0], expected_few, has_fast_sums=True)


def test_products_on_a_part_of_the_card() -> None:
    kernels = kernels_on({**REFERENCE_KERNELS, **FP8_KERNELS}, 60)
    for is_blocked, num_tokens in ((False, 512), (False, 64), (True, 512)):
        launch = product_case(num_tokens, (6144, 4096), torch.bfloat16, GPU, is_blocked=is_blocked)
        expected = exact_product(launch)
        kernels[OpKind.LINEAR_FP8](launch)
        assert_product(launch.writes[0], expected, has_fast_sums=True)


def _tokens(folder: Path, **options: object) -> list[list[int]]:
    config = EngineConfig(model=str(folder), device="cuda", dtype="bfloat16", max_num_seqs=32, **options)  # type: ignore[arg-type]
    engine = build_engine(config)
    try:
        return run_engine(engine, random_prompts(24, 131, longest=90), greedy(4)).tokens
    finally:
        engine.close()


def test_engines_agree_with_and_without_graphs_and_plans(tmp_path: Path) -> None:
    """Recorded or not, whole or in nano-batches. By chance one token of 131 would be the same.

    Random weights make tokens nearly tie, and other sums round some numbers in FP8 to their neighbours.
    """
    folder = make_model("llama2", tmp_path, std=0.02, hidden_size=256, intermediate_size=512, dtype="bfloat16")
    exact, whole = _tokens(folder, quantization="none"), _tokens(folder, quantization="fp8")
    graph = fuse_swiglu(in_fp8(build_graph(load(folder), None)))
    plan = tmp_path / "plan.json"
    plan.write_bytes(nanobatch_plan(graph, 256, [77, 150]).to_json())
    eager = _tokens(folder, quantization="fp8", cuda_graphs=False)
    cut = _tokens(folder, quantization="fp8", plan=str(plan), max_batch_tokens=256)

    def same(one: list[list[int]], other: list[list[int]]) -> float:
        pairs = [(a, b) for first, second in zip(one, other, strict=True) for a, b in zip(first, second, strict=True)]
        return sum(a == b for a, b in pairs) / len(pairs)

    assert same(whole, eager) > 0.7 and same(whole, cut) > 0.7
    assert same(exact, whole) > 0.55
