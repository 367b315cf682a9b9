"""Grouped products of experts in FP8 in Triton against their reference twins, run by Triton's interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

# isort: split
from nanoflow.graph.operation import OpKind, RowDims
from nanoflow.kernels import triton_experts_fp8 as fast
from nanoflow.kernels.cpu import CPU_KERNELS
from nanoflow.kernels.expert_tiles import ANYWHERE, BESIDE, FP8_EXPERT_TILES, WHOLE_CARD
from nanoflow.kernels.gemm_tiles import GemmTiles
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.reference_fp8 import FP8_KERNELS
from nanoflow.kernels.restricted import kernels_beside, kernels_on
from nanoflow.kernels.triton_fp8_rows import FP8_ROW_KERNELS
from tests.elementwise_cases import Cases
from tests.expert_cases import ROUTINGS, ExpertCase
from tests.fp8_cases import assert_rows, exact_experts, experts_case, row_case
from tests.gemm_cases import assert_linear, assert_linear_swiglu

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp", "ignore:invalid value encountered")
# The interpreter multiplies no bfloat16.
DTYPE = torch.float16
ROWS = GemmTiles(block_m=16, block_n=32, block_k=64, store_n=16, num_warps=4, num_stages=2, group_m=2, item_bytes=1)
BLOCKS = replace(ROWS, block_n=128, block_k=128, store_n=64)
PRODUCTS = ("first", "second")


def _launch(sizes: tuple[int, int, int, int], routing: str, num_tokens: int, product: str, is_blocked: bool) -> Launch:
    torch.manual_seed(num_tokens)
    num_experts, per_token, width, inner = sizes
    ids = ROUTINGS[routing](num_tokens, num_experts, per_token, CPU)
    case = ExpertCase(num_experts=num_experts, per_token=per_token, width=width, inner=inner, ids=ids, dtype=DTYPE)
    return experts_case(getattr(case, product)(), is_blocked=is_blocked)


def _run(launch: Launch, tiles: GemmTiles, num_programs: int) -> None:
    is_first = launch.op.kind is OpKind.EXPERTS_IN_FP8
    (fast.run_experts_in_fp8 if is_first else fast.run_experts_out_fp8)(launch, tiles, num_programs)
    (assert_linear_swiglu if is_first else assert_linear)(launch.writes[0], exact_experts(launch))


# E, K, H and I. Tiles end within an expert's rows and columns and within a step of features; some experts take several.
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("sizes", "routing", "num_tokens", "num_programs"),
    [((5, 2, 80, 48), "skewed", 20, 3), ((3, 1, 48, 80), "same", 20, 2), ((11, 4, 32, 16), "balanced", 2, 9)],
)
def test_with_scales_of_rows(
    product: str, sizes: tuple[int, int, int, int], routing: str, num_tokens: int, num_programs: int
) -> None:
    _run(_launch(sizes, routing, num_tokens, product, is_blocked=False), ROWS, num_programs)


@pytest.mark.parametrize("product", PRODUCTS)
def test_with_scales_of_blocks(product: str) -> None:
    """Several blocks in each direction of a matrix, and experts whose blocks differ."""
    _run(_launch((3, 2, 384, 256), "balanced", 4, product, is_blocked=True), BLOCKS, 2)


def test_an_expert_without_rows_is_not_read() -> None:
    for product in PRODUCTS:
        launch = _launch((8, 2, 48, 32), "same", 5, product, is_blocked=False)
        launch.weights[1][:6] = torch.nan
        _run(launch, ROWS, 3)


def test_what_cannot_be_multiplied_is_said() -> None:
    launch = _launch((3, 2, 128, 128), "balanced", 3, "first", is_blocked=True)
    with pytest.raises(ValueError, match="do not fit blocks"):
        fast.run_experts_in_fp8(launch, ROWS, 1)
    with pytest.raises(ValueError, match="products in FP8 take float8_e4m3fn"):
        fast.run_experts_in_fp8(replace(launch, reads=(launch.reads[0].half(), *launch.reads[1:])), BLOCKS, 1)
    with pytest.raises(ValueError, match="do not fit blocks"):
        fast.run_experts_out_fp8(
            _launch((3, 2, 72, 128), "balanced", 3, "second", is_blocked=True), replace(BLOCKS, block_n=64), 1
        )


def test_parts_of_a_row_are_quantised_each_by_itself() -> None:
    """A token's rows for its experts, which are in one row of the tensor."""
    whole = row_case(Cases(num_tokens=5, dtype=DTYPE, device=CPU), OpKind.QUANTISE_FP8, 96)
    scales = torch.full((5, 3), torch.nan)
    launch = replace(
        whole,
        op=replace(whole.op, dims=RowDims(width=96, num_parts=3)),
        writes=(whole.writes[0], scales),
    )
    launch.reads[0][2, 32:64] = 0.0
    assert_rows(FP8_ROW_KERNELS[OpKind.QUANTISE_FP8], FP8_KERNELS[OpKind.QUANTISE_FP8], launch, moved=0.1)
    largest = launch.reads[0].float().view(5, 3, 32).abs().amax(-1)
    torch.testing.assert_close(scales, (largest / 448.0).clamp(min=1e-12))


def test_lanes_have_products_for_their_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[tuple[str, GemmTiles, int]] = []
    for name in ("run_experts_in_fp8", "run_experts_out_fp8"):
        monkeypatch.setattr(fast, name, lambda _launch, tiles, count, name=name: counts.append((name, tiles, count)))
    ours = {**CPU_KERNELS, **fast.EXPERT_FP8_PRODUCT_KERNELS}
    for restricted, is_blocked in itertools.product((kernels_on, kernels_beside), (False, True)):
        for product in PRODUCTS:
            launch = _launch((3, 1, 128, 128), "balanced", 30, product, is_blocked)
            restricted(ours, 100)[launch.op.kind](launch)
        # A CPU has no shared memory: the tiling for any card.
        anywhere = FP8_EXPERT_TILES[WHOLE_CARD, is_blocked][1]
        assert counts[-2:] == [(name, anywhere.first, 100) for name in ("run_experts_in_fp8", "run_experts_out_fp8")]
    of_reference = kernels_on(CPU_KERNELS, 100)
    assert of_reference[OpKind.EXPERTS_IN_FP8] is CPU_KERNELS[OpKind.EXPERTS_IN_FP8]


def test_tilings_are_those_of_16_bits_with_longer_steps() -> None:
    """They take the same memory; with scales of blocks a tile has the rows of one block, or of one for gate and up."""
    for candidates in (WHOLE_CARD, BESIDE):
        for each, plain in zip(FP8_EXPERT_TILES[candidates, False][0], candidates, strict=True):
            assert each.max_rows == plain.max_rows and each.shared_memory_bytes == plain.shared_memory_bytes
        for each in FP8_EXPERT_TILES[candidates, True][0]:
            assert {(tiles.block_n, tiles.block_k) for tiles in (each.first, each.second)} == {(128, 128)}
    assert FP8_EXPERT_TILES[WHOLE_CARD, False][1].shared_memory_bytes == ANYWHERE.shared_memory_bytes
