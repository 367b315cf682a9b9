"""When drafts pay, where nothing is looked up, and that the executor has room and places for their logits."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow.batch import SampledTokens
from nanoflow.executor.inputs import BatchSize
from nanoflow.executor.layout import lay_out
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.scheduler import drafts
from nanoflow.scheduler.drafts import most_draft_tokens
from nanoflow.scheduler.gain import MAX_TOKENS_UNMEASURED, Draft, Gain, with_drafts
from nanoflow.scheduler.pace import Pace
from tests.unit.test_drafts import always_pays, drafted_batch, drive_with_drafts, scheduler_with_drafts
from tests.unit.test_scheduler import make_limits, make_request, tokens

__all__ = ["always_pays"]  # a fixture

# What pays


def shape(num_decodes: int, context: int = 1000) -> BatchShape:
    return BatchShape(
        num_tokens=num_decodes,
        num_decode_tokens=num_decodes,
        decode_context=num_decodes * context,
        num_sampled=num_decodes,
    )


def pays(batch: BatchShape, guesses: list[Draft], iteration_time: IterationTime | None) -> bool:
    return Gain().allows(batch, guesses, iteration_time)


def some(count: int, expected: float = 2.0) -> list[Draft]:
    return [Draft(num_tokens=4, context=1000, expected=expected)] * count


# Reading weights takes 8 ms, as long as 200 tokens.
CARD = IterationTime(fixed_s=1e-4, token_s=4e-5, floor_tokens=200, key_s=1e-9, pair_s=1e-9)


def test_drafts_pay_in_small_batches_and_not_in_large_ones() -> None:
    assert pays(shape(1), some(1), CARD) and pays(shape(8), some(8), CARD) and pays(shape(30), some(30), CARD)
    assert not pays(shape(400), some(30), CARD)
    assert not pays(shape(1), some(1, expected=0.01), CARD)
    # One draft makes many wait for the host.
    assert not pays(shape(190), some(1), CARD)


def test_what_drafts_took_corrects_the_estimate_of_them() -> None:
    """The estimate says that each token costs; in truth a batch with drafts takes as long as one without."""
    wrong = IterationTime(token_s=1e-2)
    gain, plain = Gain(), shape(4)
    drafted = with_drafts(plain, some(4))
    assert not gain.allows(plain, some(4), wrong)
    for _ in range(20):
        gain.note_time(plain, 0.1, is_drafted=False)
        gain.note_time(drafted, 0.1, is_drafted=True)
    assert gain.correction(wrong) == pytest.approx(4 / 20)
    assert gain.allows(plain, some(4), wrong)
    # And the other way round: drafts that take longer than the estimate says.
    for _ in range(20):
        gain.note_time(drafted, 1.0, is_drafted=True)
        gain.note_time(plain, 0.01, is_drafted=False)
    assert pays(plain, some(4), CARD) and not gain.allows(plain, some(4), CARD)


def test_a_draft_is_tried_now_and_then_and_ever_more_rarely() -> None:
    gain, wrong = Gain(), IterationTime(token_s=1e-2)
    tried = []
    for number in range(500):
        if gain.allows(shape(1), some(1), wrong):
            tried.append(number)
            gain.note_formed()
    assert np.diff([-1, *tried]).tolist() == [33, 65, 129, 257]
    # None is, where not even free tokens would pay for the gap that they cost.
    assert not any(Gain().allows(shape(1), some(1, expected=1e-4), CARD) for _ in range(100))


def test_before_anything_is_measured_the_tokens_are_bounded() -> None:
    assert pays(shape(1), some(1), None) and not pays(shape(MAX_TOKENS_UNMEASURED), some(1), None)


def test_the_shape_with_drafts_is_that_of_the_batch(always_pays: None) -> None:
    scheduler = scheduler_with_drafts()
    batch = drafted_batch(scheduler, make_request(1, max_tokens=20), 7)
    before = BatchShape(num_tokens=1, num_decode_tokens=1, decode_context=5, num_sampled=1)
    assert with_drafts(before, [Draft(num_tokens=4, context=5, expected=1.0)]) == batch.shape


def test_where_an_estimate_says_that_drafts_do_not_pay_there_are_none() -> None:
    limits = make_limits(budget=32, max_model_len=64)
    drive = drive_with_drafts(limits, 1)
    drive.scheduler.pace = Pace(iteration_time=IterationTime(token_s=1.0))
    for request_id in range(3):
        drive.add(make_request(request_id, 8, max_tokens=40))
    drive.run_until_idle()
    assert drive.scheduler.drafts.counts.num_drafts == 0


def test_many_running_requests_are_not_looked_up(always_pays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "MAX_DRAFTED_REQUESTS", 2)
    drive = drive_with_drafts(make_limits(budget=32), 1)
    monkeypatch.setattr(drafts, "continuation", lambda *_, **__: pytest.fail("looked up"))
    for request_id in range(3):
        drive.add(make_request(request_id, 8, max_tokens=20))
    drive.run_until_idle()


def test_there_is_room_for_the_logits_of_all_drafts() -> None:
    assert most_draft_tokens(None, 256) == 0
    assert most_draft_tokens("ngram:4", 2) == 8
    assert most_draft_tokens("ngram:4", 256) == 4 * drafts.MAX_DRAFTED_REQUESTS


# The executor's side


def test_a_layout_with_cuts_finds_the_logits_of_a_draft(always_pays: None) -> None:
    scheduler = scheduler_with_drafts()
    for request_id in (1, 2):
        scheduler.add(make_request(request_id, max_tokens=20))
    first = scheduler.schedule()
    assert first is not None
    scheduler.commit(first, tokens(7, 99))
    batch = scheduler.schedule()
    assert batch is not None and batch.num_decodes == 1 and batch.sampled.tolist() == [0, 1, 1, 1, 1, 1]
    for cuts in ((), (2,), (3, 5)):
        layout = lay_out(batch, cuts)
        placed = np.zeros(batch.num_tokens, np.int32)
        placed[layout.places] = batch.positions
        assert (placed[layout.places[batch.logit_tokens]] + 1 == batch.drawn_positions).all()
        assert BatchSize.of(layout).num_prefills >= 1


def test_each_request_of_a_result_keeps_its_own_draws(always_pays: None) -> None:
    scheduler = scheduler_with_drafts(budget=32)
    for request_id in (1, 2, 3):
        scheduler.add(make_request(request_id, max_tokens=20))
    first = scheduler.schedule()
    assert first is not None
    scheduler.commit(first, tokens(7, 14, 99))
    batch = scheduler.schedule()
    assert batch is not None and batch.sampled.tolist() == [0] + [1] * 5 + [2] * 5
    result = SampledTokens(token_ids=np.array([60, 8, 9, 61, 1, 1, 15, 62, 1, 1, 1], np.int32))
    committed = scheduler.commit(batch, result)
    assert list(zip(committed.request_ids.tolist(), committed.token_ids.tolist(), strict=True)) == [
        (3, 60),
        *((1, token) for token in (8, 9, 61)),
        *((2, token) for token in (15, 62)),
    ]
    assert committed.places.tolist() == [0, 1, 2, 3, 6, 7] and committed.num_rejected == 5
