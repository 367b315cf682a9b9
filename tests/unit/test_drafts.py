"""Drafts in the scheduler: which draws count, what is taken back, and that nothing is lost over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.outputs import FinishReason
from nanoflow.request import Request
from nanoflow.scheduler import Scheduler, SchedulerLimits, drafts
from nanoflow.scheduler.drafts import Drafter
from nanoflow.scheduler.gain import Gain
from nanoflow.speculation import NgramSpeculation
from tests.all_cases import num_examples
from tests.unit.drafting_executor import DraftingExecutor, periodic_token, repetitive_token
from tests.unit.fake_executor import Answer, Drive, Model, answer_alone
from tests.unit.test_scheduler import make_limits, make_request, tokens
from tests.unit.test_scheduler_properties import Scenario, play, scenarios

NGRAM = NgramSpeculation(num_draft_tokens=4, longest_match=3, shortest_match=1)


@pytest.fixture
def always_pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drafts are taken wherever there are some, whatever they cost."""
    monkeypatch.setattr(Gain, "allows", lambda *_: True)
    yield


# The scheduler


def drive_with_drafts(
    limits: SchedulerLimits, depth: int, kind: NgramSpeculation = NGRAM, model: Model = repetitive_token
) -> Drive:
    drafter = Drafter(kind, max_num_seqs=limits.max_num_seqs)
    return Drive(limits, depth=depth, drafts=drafter, executor=DraftingExecutor(limits, model))


@settings(max_examples=num_examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(scenarios(), st.integers(1, 6), st.integers(1, 3))
def test_every_request_gets_the_tokens_it_would_get_alone(
    always_pays: None, scenario: Scenario, num_draft_tokens: int, shortest: int
) -> None:
    kind = NgramSpeculation(num_draft_tokens=num_draft_tokens, longest_match=3, shortest_match=shortest)
    drive, aborted = play(scenario, drive_with_drafts(scenario.limits, scenario.depth, kind))
    event(f"accepted: {drive.scheduler.drafts.counts.num_accepted_tokens > 0}")
    event(f"rejected and preempted: {drive.scheduler.num_preemptions > 0}")
    for _, request in scenario.arrivals:
        expected = answer_alone(request, scenario.limits, repetitive_token)
        answer = drive.answers[request.request_id]
        if request.request_id in aborted:
            assert answer == Answer(token_ids=expected.token_ids[: len(answer.token_ids)])
        else:
            assert answer == expected
    assert drive.scheduler.fullest_pool.num_in_use == drive.scheduler.num_running == drive.scheduler.num_waiting == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_drafts_save_iterations_and_are_counted(always_pays: None, depth: int) -> None:
    limits = make_limits(budget=32, max_model_len=200, num_pages=200)
    plain = Drive(limits, depth=depth, executor=DraftingExecutor(limits, periodic_token))
    drafting = drive_with_drafts(limits, depth, model=periodic_token)
    steps = []
    for drive in (plain, drafting):
        for request_id in range(4):
            drive.add(make_request(request_id, 6, max_tokens=120))
        steps.append(drive.run_until_idle())
    assert plain.answers == drafting.answers and steps[1] < 0.6 * steps[0]
    counts, executor = drafting.scheduler.drafts.counts, drafting.executor
    assert isinstance(executor, DraftingExecutor)
    assert counts.num_draft_tokens == executor.num_draft_tokens >= counts.num_accepted_tokens > 0
    assert counts.num_draft_tokens / 4 <= counts.num_drafts <= counts.num_draft_tokens
    assert plain.scheduler.drafts.counts == drafts.DraftCounts()


def drafted_batch(scheduler: Scheduler, request: Request, *said: int) -> DenseBatch:
    """Have a request say these tokens one by one, and give the batch that follows, which has its draft."""
    scheduler.add(request)
    for token in said:
        batch = scheduler.schedule()
        assert batch is not None and batch.num_draft_tokens == 0
        scheduler.commit(batch, tokens(token))
    batch = scheduler.schedule()
    assert batch is not None and batch.num_drafted_requests == 1
    return batch


def scheduler_with_drafts(**options: Any) -> Scheduler:
    return Scheduler(limits=make_limits(**options), drafts=Drafter(NGRAM, max_num_seqs=8))


def test_a_draft_stands_in_the_batch_as_tokens_behind_which_is_drawn(always_pays: None) -> None:
    # The prompt is 7, 8, 9, 10.
    batch = drafted_batch(scheduler_with_drafts(), make_request(1), 7)
    assert batch.token_ids.tolist() == [7, 8, 9, 10, 7] and batch.positions.tolist() == [4, 5, 6, 7, 8]
    assert not batch.is_fed_back.any() and batch.num_decodes == 0 and batch.context_len.tolist() == [9]
    assert batch.sampled.tolist() == [0] * 5 and batch.logit_tokens.tolist() == [0, 1, 2, 3, 4]
    assert batch.drawn_positions.tolist() == [5, 6, 7, 8, 9] and batch.num_draft_tokens == 4
    assert batch.shape.num_sampled == 5


@pytest.mark.parametrize(
    ("drawn", "kept"),
    [([8, 9, 10, 7, 50], 5), ([8, 9, 10, 50, 8], 4), ([8, 50, 10, 7, 8], 2), ([50, 9, 10, 7, 8], 1)],
)
def test_draws_count_up_to_the_first_that_is_not_the_draft(always_pays: None, drawn: list[int], kept: int) -> None:
    scheduler = scheduler_with_drafts()
    batch = drafted_batch(scheduler, make_request(1, max_tokens=20), 7)
    committed = scheduler.commit(batch, tokens(*drawn))
    scheduler.check_integrity()
    assert committed.token_ids.tolist() == drawn[:kept] and committed.places.tolist() == list(range(kept))
    assert committed.request_ids.tolist() == [1] * kept and committed.num_rejected == 5 - kept
    assert scheduler.fullest_pool.num_in_use == -(-(4 + kept) // 4)
    counts = scheduler.drafts.counts
    assert (counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens) == (1, 4, kept - 1)
    following = scheduler.schedule()
    assert following is not None and int(following.positions[0]) == 4 + kept
    assert int(following.token_ids[0]) == drawn[kept - 1] and not following.is_fed_back[0]


def test_pages_behind_a_rejected_draft_go_back_at_once(always_pays: None) -> None:
    scheduler = scheduler_with_drafts(page_size=1)
    batch = drafted_batch(scheduler, make_request(1, max_tokens=20), 7)
    assert scheduler.fullest_pool.num_in_use == 9
    scheduler.commit(batch, tokens(8, 50, 1, 1, 1))
    assert scheduler.fullest_pool.num_in_use == 6
    scheduler.check_integrity()


def test_what_ends_a_request_ends_it_inside_a_draft(always_pays: None) -> None:
    scheduler = scheduler_with_drafts()
    batch = drafted_batch(scheduler, make_request(1, max_tokens=20, stop_token_ids=(9,)), 7)
    committed = scheduler.commit(batch, tokens(8, 9, 10, 7, 8))
    assert committed.token_ids.tolist() == [8, 9]
    assert committed.finished[1].reason is FinishReason.STOP and committed.finished[1].stop_token_id == 9
    assert scheduler.fullest_pool.num_in_use == scheduler.num_running == 0


def test_a_stop_token_before_min_tokens_does_not_end_a_draft(always_pays: None) -> None:
    scheduler = scheduler_with_drafts()
    request = make_request(1, max_tokens=20, min_tokens=4, stop_token_ids=(9, 10))
    committed = scheduler.commit(drafted_batch(scheduler, request, 7), tokens(8, 9, 10, 7, 8))
    # 7, 8 and 9 are the first three; 10 is the fourth.
    assert committed.token_ids.tolist() == [8, 9, 10] and committed.finished[1].stop_token_id == 10


@pytest.mark.parametrize("max_tokens", [2, 3, 4, 5])
def test_a_draft_ends_where_its_request_does(always_pays: None, max_tokens: int) -> None:
    scheduler = scheduler_with_drafts()
    scheduler.add(make_request(1, max_tokens=max_tokens))
    got: list[int] = []
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        assert batch is not None and batch.context_len.max() < 4 + max_tokens
        draws = [7 + (int(position) - 4) % 4 for position in batch.drawn_positions]
        committed = scheduler.commit(batch, tokens(*draws))
        got += committed.token_ids.tolist()
    assert got == [7, 8, 9, 10, 7][:max_tokens] and committed.finished[1].reason is FinishReason.LENGTH


def test_a_failure_counts_only_where_it_is_reached(always_pays: None) -> None:
    scheduler = scheduler_with_drafts()
    batch = drafted_batch(scheduler, make_request(1, max_tokens=20), 7)
    committed = scheduler.commit(batch, tokens(50, 1, 1, 1, 1, errors={3: "not finite"}))
    assert committed.token_ids.tolist() == [50] and not committed.finished
    scheduler.abort(1)
    batch = drafted_batch(scheduler, make_request(1, max_tokens=20), 7)
    committed = scheduler.commit(batch, tokens(8, 9, 10, 7, 8, errors={2: "not finite"}))
    assert committed.token_ids.tolist() == [8, 9] and committed.finished[1].error == "not finite"
    assert scheduler.fullest_pool.num_in_use == 0


def test_a_request_that_has_left_takes_its_draft_along(always_pays: None) -> None:
    scheduler = scheduler_with_drafts()
    batch = drafted_batch(scheduler, make_request(1, max_tokens=20), 7)
    assert scheduler.schedule() is None  # a draft is on its way
    scheduler.abort(1)
    scheduler.add(make_request(2))
    committed = scheduler.commit(batch, tokens(8, 9, 10, 7, 8))
    assert len(committed.token_ids) == 0 and scheduler.drafts.counts.num_drafts == 0
    scheduler.check_integrity()
    assert scheduler.schedule() is not None


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_requests_with_penalties_are_not_drafted_for_and_counted(always_pays: None, name: str) -> None:
    limits = make_limits(budget=32)
    drive = drive_with_drafts(limits, 0)
    request = make_request(0, 8, max_tokens=40)
    setattr(request.params, name, 1.5)
    drive.add(request)
    bad = make_request(1, 8, max_tokens=40)
    drive.add(dataclasses.replace(bad, bad_word_ids=((3, 4),)))
    drive.run_until_idle()
    assert drive.scheduler.drafts.counts == drafts.DraftCounts(num_undrafted_requests=2)


def test_drafts_take_only_pages_that_are_free(always_pays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pages of one token each there is room for a token more of each request, and then for none."""
    for num_pages, num_draft_tokens in ((12, 2), (10, 0)):
        scheduler = scheduler_with_drafts(page_size=1, num_pages=num_pages, max_model_len=10)
        # More is let in than there are pages for in the end.
        monkeypatch.setattr(scheduler._lengths, "counted_remaining", lambda progress: np.ones_like(progress.num_tokens))
        for request_id in (1, 2):
            scheduler.add(make_request(request_id, max_tokens=3))
        first = scheduler.schedule()
        assert first is not None
        scheduler.commit(first, tokens(7, 14))
        batch = scheduler.schedule()
        assert batch is not None and batch.num_draft_tokens == num_draft_tokens
        assert scheduler.fullest_pool.num_in_use == num_pages and scheduler.num_preemptions == 0
        scheduler.commit(batch, tokens(*[50] * len(batch.sampled)))
        scheduler.check_integrity()
        assert scheduler.fullest_pool.num_in_use == 10


def test_a_request_whose_drafts_are_wrong_rests_longer_and_longer(always_pays: None) -> None:
    scheduler = scheduler_with_drafts(max_model_len=64)
    scheduler.add(make_request(1, max_tokens=50))
    drafted = []
    for step in range(24):
        batch = scheduler.schedule()
        assert batch is not None
        drafted.append(batch.num_draft_tokens > 0)
        # One of the prompt's tokens, so that there is something to look up, and never what was guessed.
        guess = int(batch.token_ids[1]) if drafted[-1] else -1
        draws = [7 + step % 4 if guess != 7 + step % 4 else 7 + (step + 1) % 4] + [0] * (len(batch.sampled) - 1)
        scheduler.commit(batch, tokens(*draws))
    places = np.flatnonzero(drafted).tolist()
    assert (np.diff(places) - 1).tolist() == [1, 2, 4, 8]


def test_waits_that_bring_no_draft_become_rare(always_pays: None) -> None:
    """Each known token promises a draft, and the next one breaks the promise."""
    scheduler = scheduler_with_drafts(max_model_len=64)
    scheduler.add(make_request(1, 4, max_tokens=50))
    # Pairs of an old token and one that never came before.
    said = iter(token for fresh in range(40, 90) for token in (7, fresh))
    waits: list[int] = []
    waiting: list[tuple[DenseBatch, SampledTokens]] = []
    for step in range(90):
        batch = scheduler.schedule()
        if batch is None and waiting:
            waits.append(step)
        if batch is not None:
            assert batch.num_draft_tokens == 0 or len(batch.sampled) > 1
            waiting.append((batch, tokens(*(next(said) for _ in batch.sampled[:1]), *[0] * (len(batch.sampled) - 1))))
        if waiting and (batch is None or len(waiting) > 1):
            scheduler.commit(*waiting.pop(0))
        if not scheduler.has_unfinished:
            break
    assert 2 <= len(waits) <= 16 and max(np.diff(waits)) > 8


def test_a_wait_is_not_held_against_another_tenant_of_the_row(always_pays: None) -> None:
    drafter = Drafter(NGRAM, max_num_seqs=1)
    scheduler = Scheduler(limits=make_limits(rows=1), drafts=drafter)
    scheduler.add(make_request(1, max_tokens=20))
    first = scheduler.schedule()
    assert first is not None
    scheduler.commit(first, tokens(7))
    drafted = scheduler.schedule()
    assert drafted is not None
    scheduler.commit(drafted, tokens(8, 9, 10, 7, 50))
    plain = scheduler.schedule()
    assert plain is not None
    drafter._awaiting = [0]
    scheduler.abort(1)
    scheduler.commit(plain, tokens(*[8] * len(plain.sampled)))
    scheduler.add(make_request(2, max_tokens=20))
    assert scheduler.schedule() is not None
    assert drafter._awaiting == [] and drafter._rests_until[0] == 0


def test_without_a_find_batches_are_those_of_an_engine_that_does_not_speculate() -> None:
    limits = make_limits(budget=32, max_model_len=64)
    batches: list[list[DenseBatch]] = []
    for drafter in (None, Drafter(NGRAM, max_num_seqs=8)):
        scheduler = Scheduler(limits=limits, drafts=drafter)
        formed: list[DenseBatch] = []
        waiting: list[tuple[DenseBatch, SampledTokens]] = []
        for request_id in range(3):
            scheduler.add(make_request(request_id, 5, max_tokens=9))
        value = 40
        while scheduler.has_unfinished or waiting:
            batch = scheduler.schedule()
            if batch is not None:
                formed.append(batch)
                value += 1  # no token stands twice in a request
                waiting.append((batch, tokens(*[value] * len(batch.sampled))))
            if batch is None or len(waiting) > 1:
                scheduler.commit(*waiting.pop(0))
        batches.append(formed)
    assert len(batches[0]) == len(batches[1]) == 9
    for plain, other in zip(*batches, strict=True):
        for field in dataclasses.fields(DenseBatch):
            ours, theirs = getattr(plain, field.name), getattr(other, field.name)
            same = np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else repr(ours) == repr(theirs)
            assert same, field.name
