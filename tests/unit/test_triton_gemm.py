"""Triton products against their reference twins, run by Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.kernels import reference
from nanoflow.kernels import triton_gemm as fast
from nanoflow.kernels.gemm_tiles import GEMM_TILES, GemmTiles, choose_gemm_tiles
from tests.gemm_cases import (
    assert_linear,
    assert_linear_swiglu,
    assert_surroundings_untouched,
    exact_linear,
    exact_linear_swiglu,
    linear_add_case,
    linear_case,
    linear_swiglu_case,
)

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
# The interpreter multiplies no bfloat16.
DTYPE = torch.float16
SMALL = GemmTiles(block_m=16, block_n=32, store_n=32, block_k=16, num_warps=4, num_stages=2, group_m=2)
IN_HALVES = replace(SMALL, store_n=16, is_flat=False)
# A block, and half as much beyond it; of gates, in pieces of 8 columns.
TILES = pytest.mark.parametrize("tiles", [SMALL, IN_HALVES], ids=["whole", "halves"])
# More tiles than programs, and tiles that reach over each of the three edges; then one token.
SHAPES = [(53, (80, 40)), (16, (32, 16)), (1, (176, 24))]


@TILES
@pytest.mark.parametrize(("num_tokens", "shape"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_linear(tiles: GemmTiles, num_tokens: int, shape: tuple[int, int], has_bias: bool, num_programs: int) -> None:
    launch = linear_case(num_tokens, shape, DTYPE, CPU, has_bias=has_bias)
    fast.run_linear(launch, tiles, num_programs)
    assert_linear(launch.writes[0], exact_linear(launch))


@TILES
@pytest.mark.parametrize(("num_tokens", "shape"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_add(tiles: GemmTiles, num_tokens: int, shape: tuple[int, int], has_bias: bool) -> None:
    launch, expected = linear_add_case(num_tokens, shape, DTYPE, CPU, has_bias=has_bias)
    fast.run_linear_add(launch, tiles, 3)
    assert_linear(launch.writes[0], expected)
    assert_surroundings_untouched(launch.writes[0])


@TILES
@pytest.mark.parametrize(("num_tokens", "shape"), [*SHAPES, (5, (16, 8))])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_linear_swiglu(tiles: GemmTiles, num_tokens: int, shape: tuple[int, int], num_programs: int) -> None:
    launch = linear_swiglu_case(num_tokens, shape, DTYPE, CPU)
    fast.run_linear_swiglu(launch, tiles, num_programs)
    assert_linear_swiglu(launch.writes[0], exact_linear_swiglu(launch))


@pytest.mark.parametrize("min_fused_tokens", [1, 128])
def test_a_range_of_a_larger_tensor(min_fused_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows before and behind the range stay what they are, in one kernel and, with few tokens, in two."""
    monkeypatch.setattr(fast, "_MIN_FUSED_TOKENS", min_fused_tokens)
    for kernel, make, exact, check in (
        (lambda launch: fast.run_linear(launch, *fast.choose_cut(launch)), linear_case, exact_linear, assert_linear),
        (fast.linear_swiglu, linear_swiglu_case, exact_linear_swiglu, assert_linear_swiglu),
    ):
        launch = make(70, (272, 72), DTYPE, CPU)
        rows = replace(launch, reads=(launch.reads[0][3:69],), writes=(launch.writes[0][3:69],))
        kernel(rows)
        check(rows.writes[0], exact(rows))
        assert launch.writes[0][:3].isnan().all() and launch.writes[0][69:].isnan().all()


def test_a_row_of_nan_stays_alone() -> None:
    launch = linear_swiglu_case(20, (64, 32), DTYPE, CPU)
    launch.reads[0][17] = torch.nan
    fast.run_linear_swiglu(launch, SMALL, 2)
    assert launch.writes[0].isnan().any(-1).nonzero().flatten().tolist() == [17]


def test_the_twin_of_the_fused_kernel_is_the_two_operations() -> None:
    launch = linear_swiglu_case(20, (64, 32), torch.bfloat16, CPU)
    gate_up = torch.empty(20, 64, dtype=torch.bfloat16)
    expected = torch.empty(20, 32, dtype=torch.bfloat16)
    reference.linear(replace(launch, writes=(gate_up,)))
    reference.swiglu(replace(launch, reads=(gate_up,), writes=(expected,), weights=()))
    reference.linear_swiglu(launch)
    assert torch.equal(launch.writes[0], expected)


@pytest.mark.parametrize("shape", [(64, 28), (36, 32)])
def test_rows_that_are_not_aligned_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        fast.run_linear(linear_case(4, shape, DTYPE, CPU), SMALL, 1)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        fast.run_linear_swiglu(linear_swiglu_case(4, shape, DTYPE, CPU), SMALL, 1)


def test_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16 and float16"):
        fast.run_linear(linear_case(4, (32, 32), torch.float32, CPU), SMALL, 1)


def test_a_cpu_has_no_tma() -> None:
    assert not fast.has_tma(CPU)


HOPPER_BYTES = 227 << 10


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_programs", "expected"),
    [
        (2048, 28672, 132, (128, 256)),
        (1024, 4096, 132, (128, 256)),
        # 192 large tiles would take two rounds, the second of them half empty; 384 small ones take three short rounds.
        (1024, 6144, 132, (128, 128)),
        (128, 28672, 132, (128, 256)),
        (128, 4096, 132, (64, 128)),
        (128, 4096, 4, (128, 256)),
    ],
)
def test_chosen_tiles(num_rows: int, num_columns: int, num_programs: int, expected: tuple[int, int]) -> None:
    tiles = choose_gemm_tiles(GEMM_TILES, num_rows, num_columns, num_programs, HOPPER_BYTES)
    assert (tiles.block_m, tiles.block_n) == expected


def test_chosen_tiles_fit() -> None:
    for limit_bytes in (HOPPER_BYTES, 99 << 10):
        for num_rows in (65, 128, 2048):
            tiles = choose_gemm_tiles(GEMM_TILES, num_rows, 4096, 132, limit_bytes)
            assert tiles.shared_memory_bytes(is_gated=False) <= limit_bytes
            assert tiles.shared_memory_bytes(is_gated=True) <= limit_bytes
