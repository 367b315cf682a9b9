"""Products whose last round is split against their reference twins, run by Triton's interpreter on the CPU.

It runs program after program, so one that waited for a later one would hang.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.gemm_tiles import GEMM_TILES, GemmTiles
from nanoflow.kernels.launch import Launch
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.restricted import kernels_on
from nanoflow.kernels.triton_split_k import (
    SplitWorkspace,
    choose_split_cut,
    make_workspace,
    max_splits,
    run_linear_add_split_k,
    run_linear_split_k,
)
from tests.all_cases import covering
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
SMALL = GemmTiles(block_m=16, block_n=32, store_n=32, block_k=16, num_warps=1, num_stages=2, group_m=2)
LARGER = replace(SMALL, block_m=32, block_n=64, store_n=64)
# 12 tiles of 13 steps with edges on all sides; 9 tiles of 3 steps; one tile of 9 steps.
SHAPES = [(53, (80, 200)), (40, (96, 48)), (1, (24, 136))]


def poisoned(num_programs: int, tiles: GemmTiles = SMALL) -> SplitWorkspace:
    workspace = make_workspace((tiles,), num_programs, CPU)
    workspace.sums.fill_(torch.nan)
    return workspace


def splits(launch: Launch, num_programs: int, tiles: GemmTiles = SMALL) -> set[int]:
    """Two, and as many as there can be; none if a round takes all tiles."""
    most = max_splits(tiles.num_tiles(*launch.writes[0].shape), launch.reads[0].shape[1], num_programs, tiles)
    return set() if most < 2 else {2, most}


@pytest.mark.parametrize(
    ("sizes", "num_programs", "kind"),
    covering(SHAPES, [2, 5, 7, 11, 40], [(SMALL, True), (replace(SMALL, store_n=16), False)]),
)
def test_linear(sizes: tuple[int, tuple[int, int]], num_programs: int, kind: tuple[GemmTiles, bool]) -> None:
    (num_tokens, shape), (tiles, has_bias) = sizes, kind
    launch = linear_case(num_tokens, shape, DTYPE, CPU, has_bias=has_bias)
    workspace = poisoned(num_programs, tiles)
    for num_splits in splits(launch, num_programs, tiles):
        launch.writes[0].fill_(torch.nan)
        run_linear_split_k(launch, tiles, num_programs, workspace, num_splits)
        assert_linear(launch.writes[0], exact_linear(launch))
        assert not workspace.flags.any()


@pytest.mark.parametrize(("sizes", "num_programs", "has_bias"), covering(SHAPES, [5, 7, 40], [False, True]))
def test_linear_add(sizes: tuple[int, tuple[int, int]], num_programs: int, has_bias: bool) -> None:
    num_tokens, shape = sizes
    launch, expected = linear_add_case(num_tokens, shape, DTYPE, CPU, has_bias=has_bias)
    workspace, before = poisoned(num_programs), launch.writes[0].clone()
    for num_splits in splits(launch, num_programs):
        launch.writes[0].copy_(before)
        run_linear_add_split_k(launch, SMALL, num_programs, workspace, num_splits)
        assert_linear(launch.writes[0], expected)
        assert not workspace.flags.any()
    assert_surroundings_untouched(launch.writes[0])


def test_every_case_splits_somewhere() -> None:
    for num_tokens, shape in SHAPES:
        launch = linear_case(num_tokens, shape, DTYPE, CPU)
        assert any(splits(launch, num_programs) for num_programs in (5, 7, 40))


def test_one_workspace_serves_products_of_all_sizes() -> None:
    workspace = poisoned(7, LARGER)
    for num_tokens, shape in SHAPES:
        for tiles, num_programs in ((SMALL, 5), (LARGER, 7), (SMALL, 7)):
            launch = linear_case(num_tokens, shape, DTYPE, CPU)
            for num_splits in splits(launch, num_programs, tiles):
                run_linear_split_k(launch, tiles, num_programs, workspace, num_splits)
                assert_linear(launch.writes[0], exact_linear(launch))


def test_a_program_adds_what_others_left() -> None:
    """The sums between do come from the workspace: of 12 tiles on 5 programs 2 are left, and 2 programs begin them."""
    workspace = poisoned(5)
    run_linear_split_k(linear_case(53, (80, 200), DTYPE, CPU), SMALL, 5, workspace, 2)
    assert workspace.sums.isnan().all(1).tolist() == [False, False, True, True, True]


def test_a_row_of_nan_stays_alone() -> None:
    launch = linear_case(53, (80, 200), DTYPE, CPU)
    launch.reads[0][17] = torch.nan
    run_linear_split_k(launch, SMALL, 5, poisoned(5), 2)
    assert launch.writes[0].isnan().any(-1).nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize("num_tokens", [3, 130])
def test_kernels_of_a_partition(num_tokens: int) -> None:
    kernels = kernels_on(REFERENCE_KERNELS, 5)
    launch = linear_case(num_tokens, (272, 136), DTYPE, CPU)
    kernels[OpKind.LINEAR](launch)
    assert_linear(launch.writes[0], exact_linear(launch))
    added, expected = linear_add_case(num_tokens, (272, 136), DTYPE, CPU)
    kernels[OpKind.LINEAR_ADD](added)
    assert_linear(added.writes[0], expected)
    gated = linear_swiglu_case(num_tokens, (272, 72), DTYPE, CPU)
    kernels[OpKind.LINEAR_SWIGLU](gated)
    assert_linear_swiglu(gated.writes[0], exact_linear_swiglu(gated))


@pytest.mark.parametrize("shape", [(64, 28), (36, 32)])
def test_rows_that_are_not_aligned_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        run_linear_split_k(linear_case(4, shape, DTYPE, CPU), SMALL, 3, poisoned(3), 2)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        kernels_on(REFERENCE_KERNELS, 3)[OpKind.LINEAR_ADD](linear_add_case(4, shape, DTYPE, CPU)[0])


@pytest.mark.parametrize(("tiles", "num_programs"), [(SMALL, 4), (LARGER, 3)])
def test_a_workspace_that_is_too_small_is_refused(tiles: GemmTiles, num_programs: int) -> None:
    with pytest.raises(ValueError, match="too small"):
        run_linear_split_k(linear_case(4, (64, 32), DTYPE, CPU), tiles, num_programs, poisoned(3), 2)


@pytest.mark.parametrize(
    ("num_tiles", "num_programs", "expected"),
    [(128, 128, 1), (128, 100, 3), (128, 116, 9), (192, 100, 1), (896, 132, 1), (40, 100, 2), (7, 100, 13)],
)
def test_most_splits(num_tiles: int, num_programs: int, expected: int) -> None:
    """As many as there are programs for, and no more than there are steps."""
    assert max_splits(num_tiles, 13 * 16, num_programs, SMALL) == expected


@pytest.mark.parametrize("num_splits", [1, 3])
def test_splits_without_programs_are_refused(num_splits: int) -> None:
    with pytest.raises(ValueError, match="among 2 to 2 programs each"):
        run_linear_split_k(linear_case(53, (80, 200), DTYPE, CPU), SMALL, 5, poisoned(5), num_splits)


HOPPER_BYTES = 227 << 10


@pytest.mark.parametrize(
    ("num_rows", "shape", "num_programs", "expected"),
    [
        # One round of 128 large tiles that leaves 4 programs idle, and one that leaves 28 tiles for a second.
        (1024, (4096, 14336), 132, (128, 256, 1)),
        (1024, (4096, 14336), 100, (128, 256, 3)),
        # With fewer features, three rounds of smaller tiles are done before one large tile and a third of one.
        (1024, (4096, 4096), 100, (128, 128, 1)),
        # 92 of 100 programs are busy in the last round.
        (1024, (6144, 4096), 100, (128, 256, 1)),
        # 64 large tiles leave no program for a second one; of smaller ones 28 are left.
        (512, (4096, 4096), 68, (128, 256, 1)),
        (512, (4096, 4096), 100, (128, 128, 3)),
        # So little to compute that moving sums would cost more.
        (1024, (4096, 256), 116, (64, 128, 1)),
    ],
)
def test_chosen_cut(num_rows: int, shape: tuple[int, int], num_programs: int, expected: tuple[int, int, int]) -> None:
    tiles, num_splits = choose_split_cut(GEMM_TILES, (num_rows, *shape), num_programs, HOPPER_BYTES)
    assert (tiles.block_m, tiles.block_n, num_splits) == expected


def test_chosen_tiles_fit() -> None:
    for limit_bytes in (HOPPER_BYTES, 99 << 10):
        for num_rows in (65, 300, 2048):
            tiles, _ = choose_split_cut(GEMM_TILES, (num_rows, 4096, 4096), 100, limit_bytes)
            assert tiles.shared_memory_bytes(is_gated=False) <= limit_bytes
