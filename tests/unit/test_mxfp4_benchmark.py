"""`benchmarks/kernels/mxfp4_experts.py` in Triton's interpreter: every point is computed right and counted right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

# isort: split
from benchmarks.kernels import experts
from benchmarks.kernels.expert_works import Model
from benchmarks.kernels.experts import Roof
from benchmarks.kernels.mxfp4_experts import Point, candidates_for, launches_of, measured, weights_of

from nanoflow.graph.operation import MXFP4_PRODUCTS
from nanoflow.kernels.mxfp4_tiles import WHOLE_CARD

TINY = Model(num_experts=2, per_token=1, width=64, inner=32)
SMALL = replace(WHOLE_CARD[0], block_n=32, block_k=64)


def test_every_product_runs_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product takes 1 ms here, and its roof is 1 TFLOP/s and 1 GB/s."""
    monkeypatch.setattr(experts, "replayed", lambda work: (work(), 1e-3)[1])
    torch.manual_seed(0)
    launches = launches_of(TINY, 3, weights_of(TINY, torch.device("cpu")))
    assert len(launches) == 4
    for operation, launch in launches.items():
        blank = Point(model="tiny", operation=operation, num_tokens=3)
        if launch.op.kind in MXFP4_PRODUCTS:
            (point,) = measured(
                blank, launch, (SMALL,), 2, Roof(flops_per_s=1e12, fp8_flops_per_s=2e12, bytes_per_s=1e9)
            )
            assert point.error is None and point.tflop_per_s is not None and point.gb_per_s is not None
            # 3 tokens touch 1.75 of 2 experts.
            weights = 1.75 * launch.weights[0][0].numel() * 4.25
            rows = 3 * (64 + 32) * 2
            assert point.tflop_per_s == pytest.approx(2 * 3 * 8 * launch.weights[0][0].numel() / 1e9)
            assert point.gb_per_s == pytest.approx((weights + rows) / 1e6, rel=1e-3)


def test_tilings_are_about_as_high_as_an_expert_has_rows() -> None:
    heights = {rows: {tiles.block_m for tiles in candidates_for(rows)} for rows in (2.0, 32.0, 300.0)}
    assert heights == {2.0: {16, 32}, 32.0: {16, 32, 64, 128}, 300.0: {128, 256}}
