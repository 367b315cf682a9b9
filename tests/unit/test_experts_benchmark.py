"""`benchmarks/kernels/experts.py` in Triton's interpreter: every point is computed right and counted right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

# isort: split
from benchmarks.kernels import expert_works, experts
from benchmarks.kernels.expert_works import Model, works_of
from benchmarks.kernels.expert_works_fp8 import fp8_works, quantised
from benchmarks.kernels.experts import Point, Roof, candidates_for, measured, sums_of, tilings_of

from nanoflow.kernels.launch import Launch

TINY = Model(num_experts=4, per_token=2, width=32, inner=16)
ROOF = Roof(flops_per_s=1e12, fp8_flops_per_s=2e12, bytes_per_s=1e9)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp", "ignore:invalid value encountered")


def test_every_operation_runs_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies no bfloat16. An operation takes 1 ms here, and its roof is 1 TFLOP/s and 1 GB/s."""
    monkeypatch.setattr(expert_works, "DTYPE", torch.float16)
    monkeypatch.setattr(experts, "replayed", lambda work: (work(), 1e-3)[1])
    torch.manual_seed(0)
    weights = TINY.weights(torch.device("cpu"))
    works = works_of(TINY, 3, 5.0, weights)
    assert list(works) == ["router", "expert_order", "experts_in", "experts_out", "combine"]
    num_touched = len({*works["expert_order"].launch.reads[0].flatten().tolist()})
    assert num_touched < 4
    works |= fp8_works(works, num_touched, [quantised(weight, has_blocks=False) for weight in weights[:2]])
    points: dict[str, Point] = {}
    for operation, work in works.items():
        blank = Point(model="tiny", operation=operation, num_tokens=3, routing="skewed", num_touched=num_touched)
        tilings = (None,) if work.with_tiles is None else (None, tilings_of(work.form)[0])
        found = list(measured(blank, work, tilings, 2, ROOF))
        assert [point.error for point in found] == [None] * len(tilings)
        points[operation] = replace(found[-1], tiles=None)
    first, second = points["experts_in"], points["experts_out"]
    assert first.tflop_per_s == pytest.approx(4 * 6 * 32 * 16 / 1e9)
    assert first.gb_per_s == pytest.approx(2 * (num_touched * 2 * 16 * 32 + 3 * 32 + 6 * 16) / 1e6)
    assert second.gb_per_s == pytest.approx(2 * (num_touched * 16 * 32 + 6 * (32 + 16)) / 1e6)
    assert second.of_roof == pytest.approx(second.gb_per_s)
    into, pass_over, out = (points[name] for name in experts.FP8_SUM)
    assert into.tflop_per_s == first.tflop_per_s and out.tflop_per_s == second.tflop_per_s
    assert into.gb_per_s == pytest.approx((num_touched * 2 * 16 * (32 + 4) + 3 * 32 + 2 * 6 * 16) / 1e6)
    assert pass_over.gb_per_s == pytest.approx(6 * (3 * 16 + 4) / 1e6)
    assert out.gb_per_s == pytest.approx((num_touched * 32 * (16 + 4) + 6 * 16 + 2 * 6 * 32) / 1e6)
    # Of 1 ms each, one of three has no FLOPs.
    ((plain, fp8),) = sums_of(points.values()).values()
    assert (plain.time_us, fp8.time_us) == (2000.0, 3000.0)
    assert fp8.tflop_per_s == pytest.approx(plain.tflop_per_s * 2 / 3)
    assert not sums_of([replace(each, error="no", time_us=None) for each in points.values()])


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_works, "DTYPE", torch.float16)
    work = works_of(TINY, 3, 0.0, TINY.weights(torch.device("cpu")))["experts_out"]

    def write_zeros(launch: Launch) -> None:
        launch.writes[0].zero_()

    wrong = replace(work, kernel=write_zeros)
    blank = Point(model="tiny", operation="experts_out", num_tokens=3, routing="balanced", num_touched=4)
    (point,) = measured(blank, wrong, (None,), 2, ROOF)
    assert point.time_us is None and point.error is not None and "wrong result" in point.error


def test_tilings_are_about_as_high_as_an_expert_has_rows() -> None:
    heights = {rows: {tiles.block_m for tiles in candidates_for(rows)} for rows in (4.0, 16.0, 64.0, 512.0)}
    assert heights == {4.0: {16, 32}, 16.0: {16, 32, 64}, 64.0: {32, 64, 128, 256}, 512.0: {64, 128, 256}}
