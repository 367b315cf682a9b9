"""The clock of the profiler: what is divided by what, and that settling is not measured."""

from __future__ import annotations

import time

import pytest
import torch

from nanoflow.profiler.sustained import Span, sustained

pytestmark = pytest.mark.timing
CPU = torch.device("cpu")


def test_time_is_that_of_one_call() -> None:
    measured = sustained(lambda: time.sleep(0.002), CPU, Span(settle_s=0.0, measure_s=0.04))
    assert 0.002 <= measured.time_s < 0.004
    assert measured.energy_j is None and measured.clock_mhz is None and measured.spread < 0.5


def test_what_is_slow_at_first_is_not_counted() -> None:
    begin_s = time.perf_counter()

    def work() -> None:
        time.sleep(0.02 if time.perf_counter() - begin_s < 0.05 else 0.001)

    assert sustained(work, CPU, Span(settle_s=0.06, measure_s=0.02)).time_s < 0.003


def test_unsteady_work_has_a_spread() -> None:
    calls = iter(range(1000))
    measured = sustained(lambda: time.sleep(0.001 * (1 + next(calls) % 7)), CPU, Span(settle_s=0.0, measure_s=0.02))
    assert measured.spread == pytest.approx(0.5, abs=0.4) and measured.spread > 0.1
