"""Triton kernels of a mixture of experts against their reference twins, run by Triton's interpreter on the CPU."""

# mypy: allow-untyped-decorators
from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

# isort: split
import triton
import triton.language as tl

from nanoflow.graph.experts import ClampedSwiglu
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import reference_experts as reference
from nanoflow.kernels import triton_experts as fast
from nanoflow.kernels import triton_experts_rows as rows_fast
from nanoflow.kernels.expert_tiles import BESIDE, FP8_EXPERT_TILES, WHOLE_CARD, choose_expert_tiles
from nanoflow.kernels.gemm_tiles import GemmTiles
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.restricted import kernels_beside, kernels_on
from tests.all_cases import RUNS_ALL_CASES, part
from tests.compile_experts import TILINGS
from tests.compile_experts_fp8 import TILINGS as FP8_TILINGS
from tests.compiling import compiled
from tests.elementwise_cases import assert_twins, results_of
from tests.expert_cases import ROUTINGS, ExpertCase, balanced, exact
from tests.gemm_cases import assert_linear, assert_linear_swiglu
from tests.unit.test_beside import (
    RESERVED_BYTES,
    SM_BYTES,
    SM_REGISTERS,
    attention_bytes,
    attention_registers,
    product_registers,
)
from tests.unit.test_triton_gemm import HOPPER_BYTES

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp", "ignore:invalid value encountered")
# The interpreter multiplies no bfloat16.
DTYPE = torch.float16
SMALL = GemmTiles(block_m=16, block_n=32, store_n=32, block_k=16, num_warps=4, num_stages=2, group_m=2)
IN_HALVES = replace(SMALL, store_n=16, is_flat=False, group_m=1)
# E, K, H and I: sizes that end within tiles; K of 1; E that is no power of two; more than one column of tiles.
SIZES = {"k2": (8, 2, 40, 24), "k1": (3, 1, 48, 40), "k8": (11, 8, 32, 16)}


def _case(size: str, routing: str, num_tokens: int, dtype: torch.dtype = DTYPE) -> ExpertCase:
    torch.manual_seed(num_tokens)
    num_experts, per_token, width, inner = SIZES[size]
    ids = ROUTINGS[routing](num_tokens, num_experts, per_token, CPU)
    return ExpertCase(num_experts=num_experts, per_token=per_token, width=width, inner=inner, ids=ids, dtype=dtype)


# More tiles than programs, so that the rows of one expert take several tiles; then more programs than tiles.
CASES = [
    *((SMALL, 20, 3, "k2", routing) for routing in ROUTINGS),
    (SMALL, 20, 3, "k1", "skewed"),
    (SMALL, 20, 3, "k8", "balanced"),
    (IN_HALVES, 9, 1, "k2", "skewed"),
    (IN_HALVES, 9, 1, "k8", "same"),
    *((SMALL, 1, 9, size, "balanced") for size in SIZES),
]


@pytest.mark.parametrize(("tiles", "num_tokens", "num_programs", "size", "routing"), CASES)
def test_grouped_products(tiles: GemmTiles, num_tokens: int, num_programs: int, size: str, routing: str) -> None:
    case = _case(size, routing, num_tokens)
    launch = case.first()
    fast.run_experts_in(launch, tiles, num_programs)
    assert_linear_swiglu(launch.writes[0], exact(launch))
    launch = case.second()
    fast.run_experts_out(launch, tiles, num_programs)
    assert_linear(launch.writes[0], exact(launch))


@pytest.mark.parametrize(
    ("tiles", "num_tokens", "num_programs", "size"), [(SMALL, 20, 3, "k2"), (IN_HALVES, 9, 1, "k8")]
)
def test_biases_and_a_clamped_activation(tiles: GemmTiles, num_tokens: int, num_programs: int, size: str) -> None:
    """As in gpt-oss; the limit is reached on all of its sides, and alpha is not 1."""
    clamped = ClampedSwiglu(alpha=1.702, limit=0.75)
    case = replace(_case(size, "skewed", num_tokens), has_biases=True, clamped=clamped)
    launch = case.first()
    fast.run_experts_in(launch, tiles, num_programs)
    assert_linear_swiglu(launch.writes[0], exact(launch))
    launch = case.second()
    fast.run_experts_out(launch, tiles, num_programs)
    assert_linear(launch.writes[0], exact(launch))


@triton.jit
def _write_tile_ends(ends: tl.tensor, out: tl.tensor, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr) -> None:
    tl.store(out + tl.arange(0, EXPERTS), fast._tile_ends(ends, 3, NUM_EXPERTS, EXPERTS, 16))


@triton.jit
def _write_found(ends: tl.tensor, out: tl.tensor, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr) -> None:
    tile = tl.program_id(0)
    tile_ends = fast._tile_ends(ends, 3, NUM_EXPERTS, EXPERTS, 16)
    expert, first, stop, column = fast._found(tile, 15, tile_ends, ends, 3, 16, 32, 2)
    tl.store(out + 4 * tile, expert)
    tl.store(out + 4 * tile + 1, first)
    tl.store(out + 4 * tile + 2, stop)
    tl.store(out + 4 * tile + 3, column)


def test_an_expert_has_as_many_tiles_as_it_has_rows_for() -> None:
    """None without rows, and none beyond the last expert; three columns of tiles."""
    ends = torch.tensor([16, 16, 49, 49, 50], dtype=torch.int32)
    out = torch.full((8,), -77, dtype=torch.int32)
    _write_tile_ends[(1,)](ends, out, 5, 8)
    assert out.tolist() == [3, 3, 12, 12, 15, 15, 15, 15]
    found = torch.full((20, 4), -77, dtype=torch.int32)
    _write_found[(20,)](ends, found, 5, 8)
    whole = {0: (0, 16), 2: (16, 49), 4: (49, 50)}
    wanted = {
        (expert, row, stop, column)
        for expert, (start, stop) in whole.items()
        for row in range(start, stop, 16)
        for column in (0, 32, 64)
    }
    assert {tuple(tile) for tile in found[:15].tolist()} == wanted
    assert all(torch.equal(tile, found[14]) for tile in found[15:]), "behind the last one"


def test_a_range_of_larger_tensors() -> None:
    """Rows before and behind the range stay what they are; its order is in the rows of the range."""
    case = _case("k2", "balanced", 21)
    for make, run in ((case.first, fast.run_experts_in), (case.second, fast.run_experts_out)):
        launch = make()
        part = launch.reads[1].new_full((21, 2), -77)
        ends = launch.reads[2].new_full((21, 8), -77)
        order = replace(case.order(), reads=(case.ids[4:18],), writes=(part[4:18], ends[4:18]))
        rows_fast.expert_order(order)
        assert (part[:4] == -77).all() and (part[18:] == -77).all() and (ends[5:] == -77).all()
        of_range = replace(
            launch, reads=(launch.reads[0][4:18], part[4:18], ends[4:18]), writes=(launch.writes[0][4:18],)
        )
        run(of_range, SMALL, 2)
        assert_linear_swiglu(of_range.writes[0], exact(of_range))
        assert launch.writes[0][:4].isnan().all() and launch.writes[0][18:].isnan().all()


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_order(routing: str, size: str, num_tokens: int) -> None:
    launch = _case(size, routing, num_tokens).order()
    (rows, ends), (expected, expected_ends) = (
        results_of(kernel, launch) for kernel in (rows_fast.expert_order, reference.expert_order)
    )
    assert torch.equal(rows, expected)
    assert torch.equal(ends, expected_ends)


def test_order_of_more_rows_than_a_program_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_fast, "_ORDERED", 256)  # 560 rows
    monkeypatch.setattr(rows_fast, "_FEW_ORDERED", 128)
    launch = _case("k8", "skewed", 70).order()
    for ours, expected in zip(
        results_of(rows_fast.expert_order, launch), results_of(reference.expert_order, launch), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, DTYPE], ids=str)
@pytest.mark.parametrize("size", list(SIZES))
def test_router(is_normalised: bool, dtype: torch.dtype, size: str) -> None:
    """The same probabilities, and of experts that have them: 16 bits have many equal ones. Some have a bias."""
    case = replace(_case(size, "balanced", 90, dtype), has_biases=is_normalised)
    launch = case.router(is_normalised=is_normalised)
    weights, ids = results_of(rows_fast.router, launch)
    expected, expected_ids = results_of(reference.router, launch)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    probabilities = torch.nn.functional.linear(launch.reads[0], *launch.weights).float().softmax(-1)
    chosen, wanted = (probabilities.gather(1, found.long()) for found in (ids, expected_ids))
    torch.testing.assert_close(chosen, wanted, rtol=1e-5, atol=0.0)
    assert all(len({*row}) == len(row) for row in ids.tolist())


def test_a_token_that_is_not_finite_has_experts_and_stays_alone() -> None:
    launch = _case("k8", "balanced", 20).router(is_normalised=True)
    expected = results_of(rows_fast.router, launch)
    launch.reads[0][3], launch.reads[0][5, 0], launch.reads[0][7] = torch.nan, torch.inf, -torch.inf
    weights, ids = results_of(rows_fast.router, launch)
    bad = torch.tensor([3, 5, 7])
    good = torch.tensor([row for row in range(20) if row not in bad])
    assert torch.equal(weights[good], expected[0][good]) and torch.equal(ids[good], expected[1][good])
    assert weights[bad].isnan().all()
    for row in ids[bad].tolist():
        assert len({*row}) == 8 and min(row) >= 0 and max(row) < 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", list(SIZES))
def test_combine_and_shared_gate(dtype: torch.dtype, size: str) -> None:
    """The interpreter truncates to bfloat16; float16 is rounded."""
    case = _case(size, "balanced", 9, dtype)
    assert_twins(rows_fast.combine, reference.combine, case.combine(), truncates=dtype == torch.bfloat16)
    assert_twins(rows_fast.shared_gate, reference.shared_gate, case.shared_gate(), truncates=dtype == torch.bfloat16)


def test_rows_wider_than_a_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_fast, "_BLOCK", 16)
    case = _case("k2", "balanced", 5, torch.float32)
    assert_twins(rows_fast.combine, reference.combine, case.combine())
    assert_twins(rows_fast.shared_gate, reference.shared_gate, case.shared_gate())


def test_a_row_of_nan_stays_alone() -> None:
    """Rows of other experts are computed in the same tiles."""
    case = _case("k2", "balanced", 20)
    launch = case.first()
    launch.reads[0][11] = torch.nan
    fast.run_experts_in(launch, SMALL, 3)
    bad = launch.reads[1].flatten() // 2 == 11
    assert torch.equal(launch.writes[0].view(40, -1).isnan().any(-1), bad)
    launch = case.second()
    launch.reads[0].view(40, -1)[20] = torch.nan
    fast.run_experts_out(launch, SMALL, 3)
    is_bad = launch.writes[0].view(40, -1).isnan().any(-1)
    assert is_bad.nonzero().flatten().tolist() == [int(launch.reads[1].flatten()[20])]


def test_an_expert_without_rows_is_not_read() -> None:
    case = _case("k2", "same", 9)
    for launch, run in ((case.first(), fast.run_experts_in), (case.second(), fast.run_experts_out)):
        launch.weights[0][:6] = torch.nan
        run(launch, SMALL, 3)
        assert not launch.writes[0].isnan().any()


def test_rows_that_are_not_aligned_are_refused() -> None:
    ids = balanced(4, 3, 2, CPU)
    for width, inner in ((28, 16), (32, 12)):
        case = ExpertCase(num_experts=3, per_token=2, width=width, inner=inner, ids=ids, dtype=DTYPE)
        for launch, run in ((case.first(), fast.run_experts_in), (case.second(), fast.run_experts_out)):
            with pytest.raises(ValueError, match="multiples of 16 bytes"):
                run(launch, SMALL, 1)
    case = ExpertCase(num_experts=3, per_token=2, width=32, inner=16, ids=ids, dtype=torch.float32)
    with pytest.raises(ValueError, match="bfloat16 and float16"):
        fast.run_experts_in(case.first(), SMALL, 1)


def test_lanes_have_products_for_their_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the whole card has them; reference kernels stay."""
    counts: list[tuple[str, int, int]] = []
    for name in ("run_experts_in", "run_experts_out"):
        monkeypatch.setattr(
            fast, name, lambda _launch, tiles, count, name=name: counts.append((name, tiles.block_m, count))
        )
    case = _case("k1", "balanced", 30)
    ours = {**REFERENCE_KERNELS, OpKind.EXPERTS_IN: fast.experts_in, OpKind.EXPERTS_OUT: fast.experts_out}
    for restricted in (kernels_on, kernels_beside):
        kernels = restricted(ours, 100)
        kernels[OpKind.EXPERTS_IN](case.first())
        kernels[OpKind.EXPERTS_OUT](case.second())
        of_reference = restricted(REFERENCE_KERNELS, 100)
        assert of_reference[OpKind.EXPERTS_IN] is REFERENCE_KERNELS[OpKind.EXPERTS_IN]
    # A CPU has no shared memory: the tiling for any card.
    assert counts == [("run_experts_in", 64, 100), ("run_experts_out", 64, 100)] * 2


@pytest.mark.parametrize(
    ("rows_per_expert", "expected"), [(0.5, 16), (8, 16), (9, 32), (40, 64), (49, 128), (5000, 128)]
)
def test_chosen_tiles(rows_per_expert: float, expected: int) -> None:
    for candidates in (WHOLE_CARD, BESIDE):
        assert choose_expert_tiles(candidates, rows_per_expert, HOPPER_BYTES).first.block_m == expected
        assert choose_expert_tiles(candidates, rows_per_expert, 99 << 10).shared_memory_bytes <= 99 << 10


def test_products_fit_beside_attention() -> None:
    """Beside one program of decode attention on an SM; a second product must not, or it would take its place."""
    for each in (*BESIDE, *FP8_EXPERT_TILES[BESIDE, False][0], *FP8_EXPERT_TILES[BESIDE, True][0]):
        for tiles, is_gated in ((each.first, True), (each.second, False)):
            num_bytes = tiles.shared_memory_bytes(is_gated=is_gated) + RESERVED_BYTES
            assert num_bytes + attention_bytes() + RESERVED_BYTES <= SM_BYTES < 2 * num_bytes
            assert product_registers(tiles) + attention_registers() <= SM_REGISTERS


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    """Nothing is spilled, and large tiles are products of warpgroups. Most is asked of the tiling beside attention."""
    wanted = part([BESIDE[-1].first], of=TILINGS)
    in_fp8 = part([(FP8_EXPERT_TILES[BESIDE, False][0][-1].first, False)], of=FP8_TILINGS)
    names = [*(str(TILINGS.index(tiles)) for tiles in wanted), *(f"fp8:{FP8_TILINGS.index(each)}" for each in in_fp8)]
    reports = compiled("tests.compile_experts", *names, *(["rows"] if RUNS_ALL_CASES else []))
    for report in itertools.chain(*reports[len(names) :]):
        assert report["num_spills"] == 0 and report["registers"] < 128
    tilings = [
        *((tiles, "num_warpgroup_products") for tiles in wanted),
        *((tiles, "num_fp8_products") for tiles, _ in in_fp8),
    ]
    for (tiles, products), (first, second) in zip(tilings, reports[: len(names)], strict=True):
        for report, is_gated in ((first, True), (second, False)):
            assert report["num_spills"] == 0
            assert report["shared_bytes"] <= tiles.shared_memory_bytes(is_gated=is_gated)
            assert report["registers"] <= (tiles.max_registers or 255)
            assert bool(report[products]) is (tiles.block_m >= 64)
