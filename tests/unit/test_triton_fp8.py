"""Operations in FP8 in Triton against their reference twins, run by Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import triton_fp8 as fast
from nanoflow.kernels import triton_fp8_split as split
from nanoflow.kernels.cpu import CPU_KERNELS
from nanoflow.kernels.gemm_tiles import BESIDE_TILES, FP8_TILES, GEMM_TILES, PART_TILES, GemmTiles
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.reference_fp8 import FP8_KERNELS
from nanoflow.kernels.restricted import kernels_beside, kernels_on, kernels_on_stream
from nanoflow.kernels.triton_attention import Card
from nanoflow.kernels.triton_fp8_rows import FP8_ROW_KERNELS
from nanoflow.kernels.triton_split_k import make_workspace
from tests.all_cases import RUNS_ALL_CASES
from tests.compiling import compiled
from tests.elementwise_cases import Cases
from tests.fp8_cases import added_to, assert_product, assert_rows, exact_product, gated, product_case, row_case
from tests.gemm_cases import assert_linear_swiglu

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
# The interpreter multiplies no bfloat16.
DTYPE = torch.float16
ROWS = GemmTiles(block_m=16, block_n=32, block_k=64, store_n=16, num_warps=4, num_stages=2, group_m=2, item_bytes=1)
BLOCKS = replace(ROWS, block_n=128, block_k=128, store_n=64)


@pytest.mark.parametrize("kind", list(FP8_ROW_KERNELS))
@pytest.mark.parametrize("width", [16, 96, 2304])
def test_rows(kind: OpKind, width: int) -> None:
    """The interpreter rounds to FP8 wrongly where that changes the exponent, and where two numbers are as near."""
    launch = row_case(Cases(num_tokens=5, dtype=DTYPE, device=CPU), kind, width, is_kept=kind is OpKind.RMS_NORM_FP8)
    assert_rows(FP8_ROW_KERNELS[kind], FP8_KERNELS[kind], launch, moved=0.1)


def test_a_row_of_zeros_has_a_scale() -> None:
    launch = row_case(Cases(num_tokens=5, dtype=DTYPE, device=CPU), OpKind.QUANTISE_FP8, 64)
    launch.reads[0][2] = 0.0
    FP8_ROW_KERNELS[OpKind.QUANTISE_FP8](launch)
    numbers, scales = launch.writes
    assert (numbers[2].float() == 0.0).all() and scales[2] > 0.0 and numbers.float().isfinite().all()


# More tiles than programs, with edges within tiles and blocks; then one token.
@pytest.mark.parametrize(("num_tokens", "shape"), [(37, (272, 208)), (1, (144, 272))])
@pytest.mark.parametrize("is_blocked", [False, True])
@pytest.mark.parametrize("is_added", [False, True])
def test_products(num_tokens: int, shape: tuple[int, int], is_blocked: bool, is_added: bool) -> None:
    launch = product_case(num_tokens, shape, DTYPE, CPU, is_blocked=is_blocked, has_bias=not is_added)
    launch = added_to(launch) if is_added else launch
    expected = exact_product(launch)
    run = fast.run_linear_add_fp8 if is_added else fast.run_linear_fp8
    run(launch, BLOCKS if is_blocked else ROWS, 3)
    assert_product(launch.writes[0], expected, has_fast_sums=False)


@pytest.mark.parametrize(("num_tokens", "shape"), [(37, (272, 208)), (1, (144, 272))])
def test_swiglu_in_the_product(num_tokens: int, shape: tuple[int, int]) -> None:
    launch = gated(product_case(num_tokens, shape, DTYPE, CPU))
    expected = torch.empty_like(launch.writes[0])
    FP8_KERNELS[OpKind.LINEAR_SWIGLU_FP8](replace(launch, writes=(expected,)))
    fast.run_linear_swiglu_fp8(launch, ROWS, 3)
    assert_linear_swiglu(launch.writes[0], expected)


@pytest.mark.parametrize(("num_programs", "num_splits"), [(5, 2), (40, 3)])
@pytest.mark.parametrize("is_added", [False, True])
def test_products_whose_last_round_is_split(num_programs: int, num_splits: int, is_added: bool) -> None:
    """12 tiles of 4 steps."""
    launch = product_case(37, (112, 208), DTYPE, CPU, has_bias=not is_added)
    launch = added_to(launch) if is_added else launch
    expected = exact_product(launch)
    workspace = make_workspace((ROWS,), num_programs, CPU)
    workspace.sums.fill_(torch.nan)
    split.run_split_fp8(launch, ROWS, num_programs, workspace, num_splits, is_added=is_added)
    assert_product(launch.writes[0], expected, has_fast_sums=False)
    assert not workspace.flags.any()
    in_blocks = product_case(37, (112, 208), DTYPE, CPU, is_blocked=True)
    with pytest.raises(ValueError, match=r"scales \[1, 2\] of blocks of a weight"):
        split.run_split_fp8(in_blocks, ROWS, num_programs, workspace, num_splits, is_added=False)


def test_few_tokens_are_split_on_a_whole_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down of Llama-3-8B has 32 tiles of 64 tokens for 132 SMs; of 256 tokens all have some."""
    monkeypatch.setattr(split, "card_of", lambda _: Card(num_sms=132, shared_memory_bytes=227 << 10))

    def splits(num_tokens: int, *shape: int) -> int:
        tensors = {"reads": (torch.empty(num_tokens, 1),), "weights": (torch.empty(shape, device="meta"),)}
        return split.choose_split(cast(Launch, SimpleNamespace(**tensors)), GEMM_TILES, 132)[1]

    assert splits(64, 4096, 14336) == 4 and splits(256, 4096, 14336) == 1 and splits(64, 28672, 4096) == 1
    ran: list[int] = []
    monkeypatch.setattr(split, "run_split_fp8", lambda *cut, is_added: ran.append(cut[-1]))
    monkeypatch.setattr(fast, "run_linear_add_fp8", lambda *_: ran.append(1))
    kernels = split.products()
    for num_tokens in (64, 129):
        kernels[OpKind.LINEAR_ADD_FP8](added_to(product_case(num_tokens, (128, 14336), DTYPE, CPU)))
    assert ran[0] > 1 and ran[1:] == [1]


def test_a_stream_of_its_own_has_products_of_its_own() -> None:
    """They share memory for partial sums; reference kernels share nothing."""
    kernels = {**CPU_KERNELS, **split.products()}
    assert kernels_on_stream(kernels)[OpKind.LINEAR_ADD_FP8] is not kernels[OpKind.LINEAR_ADD_FP8]
    assert kernels_on_stream(CPU_KERNELS) is CPU_KERNELS


def test_what_cannot_be_multiplied_is_said() -> None:
    launch = product_case(3, (144, 256), DTYPE, CPU, is_blocked=True)
    with pytest.raises(ValueError, match="do not fit blocks"):
        fast.run_linear_fp8(launch, ROWS, 1)
    with pytest.raises(ValueError, match=r"scales \[2, 2\] of blocks of a weight"):
        fast.run_linear_swiglu_fp8(gated(launch), BLOCKS, 1)
    with pytest.raises(ValueError, match="products in FP8 take float8_e4m3fn"):
        fast.run_linear_fp8(replace(launch, reads=(launch.reads[0].half(), launch.reads[1])), BLOCKS, 1)
    with pytest.raises(ValueError, match="rows every 136 bytes"):
        fast.run_linear_fp8(product_case(3, (144, 136), DTYPE, CPU), ROWS, 1)


def test_torch_multiplies_where_it_can() -> None:
    for has_bias in (False, True):
        launch = product_case(4, (32, 64), torch.bfloat16, CPU, has_bias=has_bias)
        assert fast.can_scale(launch)
        fast.linear_fp8(launch)
        assert_product(launch.writes[0], exact_product(launch), has_fast_sums=False)
    assert not fast.can_scale(product_case(4, (32, 64), torch.float16, CPU))
    assert not fast.can_scale(product_case(4, (32, 64), torch.bfloat16, CPU, is_blocked=True))
    later = replace(launch, reads=(launch.reads[0][1:], launch.reads[1][1:]), writes=(launch.writes[0][1:],))
    assert not fast.can_scale(later)


def test_lanes_with_a_part_of_the_device_have_products_of_their_own() -> None:
    for kernels in (kernels_on(CPU_KERNELS, 60), kernels_beside(CPU_KERNELS, 60)):
        for kind in (OpKind.LINEAR_FP8, OpKind.LINEAR_ADD_FP8, OpKind.LINEAR_SWIGLU_FP8):
            assert kernels[kind] is not CPU_KERNELS[kind]


def test_tiles_have_one_block_of_rows_where_blocks_have_scales() -> None:
    for candidates in (GEMM_TILES, PART_TILES, BESIDE_TILES):
        of_rows, of_blocks = (FP8_TILES[candidates, is_blocked] for is_blocked in (False, True))
        assert of_rows and {(tiles.block_n, tiles.block_k) for tiles in of_blocks} == {(128, 128)}
        assert all(tiles.block_k == 128 and tiles.item_bytes == 1 for tiles in of_rows)
    assert FP8_TILES[GEMM_TILES, False][0].shared_memory_bytes(is_gated=False) == GEMM_TILES[0].shared_memory_bytes(
        is_gated=False
    )


def test_they_compile_for_hopper() -> None:
    """To instructions that multiply FP8, without moving registers to memory."""
    programs = ("gated", "product") if RUNS_ALL_CASES else ("gated",)
    for report in compiled("tests.compile_fp8", *programs):
        assert report["num_spills"] == 0 and report["multiplies_fp8"] and report["shared_bytes"] <= 227 * 1024
