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


def test_what_was_long_ago_is_forgotten() -> None:
    times = IterationTimes()
    for factor, count in ((1.0, 2000), (2.0, 400)):
        for place in range(count):
            times.observe(SHAPES[place % len(SHAPES)], _time_s(SHAPES[place % len(SHAPES)], factor))
    assert times.estimate is not None
    assert times.estimate.predict_s(SHAPES[0]) == pytest.approx(_time_s(SHAPES[0], 2.0), rel=0.05)


def test_what_is_not_met_for_long_is_known_from_the_start() -> None:
    """Long contexts, timed beforehand, among many short iterations."""
    times = IterationTimes([(shape, _time_s(shape)) for shape in SHAPES])
    long, short = shape_of(256, 100_000, 0, 0), shape_of(1, 10, 0, 0)
    before = IterationTimes([(shape, _time_s(shape)) for shape in (*SHAPES, long)])
    for _ in range(1000):
        times.observe(short, _time_s(short))
        before.observe(short, _time_s(short))
    assert before.estimate is not None and times.estimate is not None
    assert before.estimate.predict_s(long) == pytest.approx(_time_s(long), rel=0.1)
    assert times.estimate.predict_s(SHAPES[-1]) == pytest.approx(_time_s(SHAPES[-1]), rel=0.1)


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
