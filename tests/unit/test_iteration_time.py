"""The fit of an iteration's time finds the coefficients that made the samples, and stays sane when there are few."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.engine.warmup import probe_batch, probes
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime, fit_iteration_time
from nanoflow.scheduler.limits import SchedulerLimits
from tests.iteration_shapes import shape_of

TRUE = IterationTime(fixed_s=2e-3, token_s=9e-6, floor_tokens=256, sampled_s=1.5e-6, key_s=3e-8, pair_s=4e-10)
LIMITS = SchedulerLimits(
    max_batch_tokens=2048, max_num_seqs=512, max_model_len=8192, num_pages=999, page_size=16, vocab_size=50
)
SHAPES = [
    shape_of(num_decodes, context, chunk, before)
    for num_decodes, context, chunk, before in itertools.product(
        (0, 1, 128, 512), (64, 2048), (0, 128, 1024), (0, 4096)
    )
    if num_decodes + chunk
]


def samples(noise: float = 0.0) -> list[tuple[BatchShape, float]]:
    factors = 1 + noise * np.random.default_rng(0).standard_normal(len(SHAPES))
    return [(shape, TRUE.predict_s(shape) * float(factor)) for shape, factor in zip(SHAPES, factors, strict=True)]


def test_a_prediction_is_the_sum_of_its_parts_above_the_floor() -> None:
    shape = BatchShape(
        num_tokens=300, num_decode_tokens=100, decode_context=5000, prefill_context=40_000, num_sampled=101
    )
    expected = 2e-3 + 9e-6 * 300 + 1.5e-6 * 101 + 3e-8 * 5000 + 4e-10 * 40_000
    assert TRUE.predict_s(shape) == pytest.approx(expected)
    assert TRUE.predict_s(BatchShape(num_tokens=3)) == TRUE.predict_s(BatchShape(num_tokens=256))


def test_the_coefficients_behind_exact_samples_are_found() -> None:
    found = fit_iteration_time(samples())
    assert found.token_s == pytest.approx(TRUE.token_s, rel=1e-3)
    assert found.key_s == pytest.approx(TRUE.key_s, rel=1e-3)
    assert found.pair_s == pytest.approx(TRUE.pair_s, rel=1e-3)
    for shape, time_s in samples():
        assert found.predict_s(shape) == pytest.approx(time_s, rel=0.01)


def test_the_batches_that_an_engine_times_beforehand_are_enough_for_good_predictions() -> None:
    timed = [probe_batch(probe, LIMITS).shape for probe in probes(LIMITS)]
    found = fit_iteration_time([(shape, TRUE.predict_s(shape)) for shape in timed])
    errors = [abs(found.predict_s(shape) / TRUE.predict_s(shape) - 1) for shape in SHAPES]
    assert max(errors) < 0.2 and np.mean(errors) < 0.05


def test_noise_of_five_percent_leaves_predictions_within_ten() -> None:
    found = fit_iteration_time(samples(noise=0.05))
    for shape, time_s in samples():
        assert found.predict_s(shape) == pytest.approx(time_s, rel=0.1)


def test_short_iterations_count_as_much_as_long_ones() -> None:
    """Of two that differ by a factor of a thousand neither is predicted to be off by more than the other."""
    short, long = shape_of(1, 64, 0, 0), shape_of(0, 0, 2048, 0)
    found = fit_iteration_time([(short, 1e-3), (short, 1.2e-3), (long, 1.0), (long, 1.2)])
    assert 1e-3 <= found.predict_s(short) <= 1.2e-3 and 1.0 <= found.predict_s(long) <= 1.2


@given(st.lists(st.tuples(st.sampled_from(SHAPES), st.floats(1e-4, 1.0)), min_size=1, max_size=12))
def test_whatever_was_measured_no_prediction_falls_when_a_batch_grows(measured: list[tuple[BatchShape, float]]) -> None:
    found = fit_iteration_time(measured)
    for chunk in (0, 1, 500):
        assert 0 <= found.predict_s(shape_of(8, 100, chunk, 0)) <= found.predict_s(shape_of(8, 100, chunk + 1, 0))
        assert found.predict_s(shape_of(8, 100, chunk, 0)) <= found.predict_s(shape_of(8, 200, chunk, 50))


def test_one_sample_is_predicted_as_it_was() -> None:
    shape = shape_of(8, 100, 0, 0)
    assert fit_iteration_time([(shape, 0.02)]).predict_s(shape) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("measured", "message"), [([], "must be a measured"), ([(SHAPES[0], 0.0)], "must be positive")]
)
def test_what_cannot_be_fitted_is_said(measured: list[tuple[BatchShape, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_iteration_time(measured)
    with pytest.raises(ValueError, match="key_s must be at least 0"):
        IterationTime(key_s=-1.0)


def test_it_survives_a_file() -> None:
    assert msgspec.json.decode(msgspec.json.encode(TRUE), type=IterationTime) == TRUE
