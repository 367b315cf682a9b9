"""The engine's estimate of an iteration's time follows what it observes."""

from __future__ import annotations

import pytest

from nanoflow.engine.iteration_times import IterationTimes
from nanoflow.graph.operation import BatchShape
from tests.iteration_shapes import shape_of


def _time_s(shape: BatchShape, factor: float = 1.0) -> float:
    return factor * (2e-3 + 2e-5 * shape.num_tokens + 1e-8 * shape.decode_context + 1e-9 * shape.prefill_context)


SHAPES = [shape_of(n, k, c, 0) for n in (1, 64, 256) for k in (10, 1000) for c in (0, 128, 1024)]


def test_nothing_is_known_before_anything_has_run() -> None:
    assert IterationTimes().estimate is None


def test_batches_timed_beforehand_are_enough() -> None:
    times = IterationTimes([(shape, _time_s(shape)) for shape in SHAPES])
    assert times.estimate is not None
    for shape in SHAPES:
        assert times.estimate.predict_s(shape) == pytest.approx(_time_s(shape), rel=0.02)


def test_a_card_that_becomes_slower_is_followed() -> None:
    times = IterationTimes([(shape, _time_s(shape)) for shape in SHAPES])
    changes = [times.observe(shape, _time_s(shape, 1.5)) for _ in range(60) for shape in SHAPES]
    assert any(changes) and not all(changes)
    assert times.estimate is not None
    for shape in SHAPES:
        assert 1.2 < times.estimate.predict_s(shape) / _time_s(shape) < 1.55


def test_an_engine_without_a_start_learns_from_what_runs() -> None:
    times = IterationTimes()
    for _ in range(30):
        for shape in SHAPES:
            times.observe(shape, _time_s(shape))
    assert times.estimate is not None
    assert times.estimate.predict_s(SHAPES[5]) == pytest.approx(_time_s(SHAPES[5]), rel=0.05)


def test_what_no_clock_saw_is_no_sample() -> None:
    times = IterationTimes()
    assert not any(times.observe(SHAPES[0], 0.0) for _ in range(500))
    assert times.estimate is None
