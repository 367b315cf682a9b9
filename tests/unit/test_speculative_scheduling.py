"""Drafts in the scheduler: tokens are those of every request alone, whatever is guessed, and nothing is left of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import Pace, Scheduler, SchedulerLimits
from nanoflow.scheduler.drafts import MAX_DRAFTED_REQUESTS, Drafter
from nanoflow.scheduler.gain import MAX_TOKENS_UNMEASURED
from nanoflow.speculation import NgramSpeculation
from tests.unit.fake_executor import REPETITIVE, Drive, answer_alone
from tests.unit.test_scheduler_properties import Scenario, check_answers, play, scenarios

LIMITS = SchedulerLimits(
    max_batch_tokens=256, max_num_seqs=64, max_model_len=200, num_pages=4000, page_size=4, vocab_size=31
)


CHEAP, DEAR = (Pace(iteration_time=IterationTime(fixed_s=1.0, token_s=token_s)) for token_s in (1e-9, 10.0))


def drafter(num_tokens: int = 4, *, longest: int = 4, shortest: int = 2, max_num_seqs: int = 64) -> Drafter:
    kind = NgramSpeculation(num_draft_tokens=num_tokens, longest_match=longest, shortest_match=shortest)
    return Drafter(kind, max_num_seqs=max_num_seqs)


def request(request_id: int = 0, *, max_tokens: int = 60, seed: int = REPETITIVE, **params: Any) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params),
        seed=seed,
        max_tokens=max_tokens,
        eos_token_ids=(),
    )


def run(requests: list[Request], *, depth: int = 1, pace: Pace | None = None, **drafts: int) -> tuple[Drive, int]:
    """Run requests, compare every answer, return the drive and the number of iterations."""
    drive = Drive(LIMITS, depth=depth, drafts=drafter(**drafts), pace=pace)
    for one in requests:
        drive.add(one)
    drive.run_until_idle()
    for one in requests:
        assert drive.answers[one.request_id] == answer_alone(one, LIMITS)
    drive.scheduler.check_integrity()
    return drive, drive.scheduler._iteration


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(scenarios(first_seed=REPETITIVE), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_every_request_gets_the_tokens_it_would_get_alone(
    scenario: Scenario, num_tokens: int, shortest: int, more: int, is_measured: bool
) -> None:
    drafts = drafter(num_tokens, longest=shortest + more, shortest=shortest, max_num_seqs=scenario.limits.max_num_seqs)
    pace = CHEAP if is_measured else Pace()
    drive, aborted = play(scenario, drafts, pace)
    counts = drive.scheduler.draft_counts
    event(f"preempted: {drive.scheduler.num_preemptions > 0}")
    event(f"wrong: {counts.num_accepted_tokens < counts.num_draft_tokens}, right: {counts.num_accepted_tokens > 0}")
    check_answers(scenario, drive, aborted)
    assert counts.num_accepted_tokens <= counts.num_draft_tokens <= num_tokens * counts.num_drafts


@pytest.mark.parametrize("depth", [0, 1])
def test_right_drafts_save_iterations(depth: int) -> None:
    drive, num_iterations = run([request(max_tokens=100)], depth=depth)
    counts = drive.scheduler.draft_counts
    assert counts.num_accepted_tokens > 50
    assert num_iterations < 100 - counts.num_accepted_tokens + 5


@pytest.mark.parametrize("depth", [0, 1])
def test_without_repetition_nothing_is_lost(depth: int) -> None:
    # Hashes of all tokens before: what is found is wrong nearly always, and looked for less and less.
    wrong = [request(number, max_tokens=150, seed=number) for number in range(4)]
    drive, num_iterations = run(wrong, depth=depth, shortest=1)
    counts = drive.scheduler.draft_counts
    assert 0 < counts.num_drafts < 60
    assert num_iterations <= 152


def test_requests_whose_choice_hangs_on_tokens_of_the_same_step_have_no_drafts() -> None:
    drive, _ = run([request(0, presence_penalty=0.5), request(1, repetition_penalty=1.5), request(2)])
    assert drive.scheduler.draft_counts.num_undrafted_requests == 2
    assert drive.scheduler.draft_counts.num_accepted_tokens > 10
    drive, _ = run([request(0, frequency_penalty=0.5)])
    assert drive.scheduler.draft_counts.num_drafts == 0


def test_drafts_end_where_a_request_ends() -> None:
    for max_tokens in range(1, 40):
        run([request(max_tokens=max_tokens)])


def shapes(requests: list[Request], pace: Pace, drafts: Drafter | None) -> list[tuple[int, int]]:
    """Tokens and guessed tokens of every batch."""
    drive, seen = Drive(LIMITS, depth=1, drafts=drafts, pace=pace), []
    for one in requests:
        drive.add(one)
    while drive.scheduler.has_unfinished or drive.in_flight:
        batch = drive.step()
        if batch is not None:
            seen.append((batch.num_tokens, batch.num_draft_tokens))
    return seen


def test_where_tokens_cost_more_than_they_bring_batches_are_those_without_drafts() -> None:
    requests = [request(number) for number in range(4)]
    assert shapes(requests, DEAR, drafter()) == shapes(requests, DEAR, None)
    assert any(guessed for _, guessed in shapes(requests, CHEAP, drafter()))


def test_where_many_run_batches_are_those_without_drafts() -> None:
    requests = [request(number) for number in range(MAX_DRAFTED_REQUESTS + 1)]
    assert shapes(requests, CHEAP, drafter()) == shapes(requests, CHEAP, None)


def test_before_anything_is_measured_the_number_of_tokens_is_bounded() -> None:
    seen = shapes([request(number, max_tokens=150) for number in range(12)], Pace(), drafter())
    assert any(guessed for _, guessed in seen)
    assert max(tokens for tokens, guessed in seen if guessed) <= MAX_TOKENS_UNMEASURED


def test_while_a_draft_is_on_its_way_nothing_else_is_formed() -> None:
    drive = Drive(LIMITS, depth=1, drafts=drafter())
    drive.add(request(0))
    drive.add(request(1, seed=7))
    num_waited = 0
    while drive.scheduler.has_unfinished or drive.in_flight:
        is_drafted = any(batch.num_draft_tokens for batch, _ in drive.in_flight)
        batch = drive.step()
        num_waited += is_drafted
        assert not (is_drafted and batch is not None)
    assert num_waited > 5


def test_drafts_take_no_pages_that_are_not_free() -> None:
    # Two requests that fill the pool exactly: with the page of a draft one of them would be sent back.
    limits = SchedulerLimits(
        max_batch_tokens=64, max_num_seqs=2, max_model_len=24, num_pages=12, page_size=4, vocab_size=31
    )
    drive = Drive(limits, depth=1, drafts=drafter(6, max_num_seqs=2))
    for number in range(2):
        drive.add(request(number, max_tokens=21))
    drive.run_until_idle()
    assert drive.scheduler.num_preemptions == 0
    assert all(drive.answers[n] == answer_alone(request(n, max_tokens=21), limits) for n in range(2))


def test_a_wrong_draft_leaves_no_page_behind() -> None:
    drive = Drive(LIMITS, depth=0, drafts=drafter(8, shortest=1))
    drive.add(request(seed=3, max_tokens=150))
    while drive.scheduler.has_unfinished:
        drive.step()
        if drive.scheduler.num_running:
            num_tokens = 3 + len(drive.answers[0].token_ids)
            assert drive.scheduler.pages_in_use <= -(-num_tokens // LIMITS.page_size)
    assert drive.scheduler.draft_counts.num_draft_tokens > drive.scheduler.draft_counts.num_accepted_tokens


def _drafted(scheduler: Scheduler, drive: Drive) -> tuple[DenseBatch, SampledTokens]:
    """The first batch with a draft, run and not committed."""
    while True:
        batch = scheduler.schedule()
        assert batch is not None
        result = drive.executor.run(batch)
        if batch.num_draft_tokens:
            return batch, result
        scheduler.commit(batch, result)


@pytest.mark.parametrize("place", [0, 1])
def test_a_request_that_fails_at_a_draw_has_the_tokens_before_it(place: int) -> None:
    drive = Drive(LIMITS, depth=0, drafts=drafter())
    drive.scheduler.add(request())
    batch, _result = _drafted(drive.scheduler, drive)
    right = np.array([*batch.token_ids[1:], 0], np.int32)
    committed = drive.scheduler.commit(batch, SampledTokens(token_ids=right, errors={place: "not finite"}))
    assert committed.token_ids.tolist() == right[:place].tolist()
    assert committed.finished[0].error == "not finite"
    assert drive.scheduler.pages_in_use == drive.scheduler.num_running == 0


def test_an_error_behind_a_wrong_guess_is_none() -> None:
    drive = Drive(LIMITS, depth=0, drafts=drafter())
    drive.scheduler.add(request())
    batch, _result = _drafted(drive.scheduler, drive)
    wrong = ((np.array([*batch.token_ids[1:], 0]) + 1) % LIMITS.vocab_size).astype(np.int32)
    committed = drive.scheduler.commit(batch, SampledTokens(token_ids=wrong, errors={1: "not finite"}))
    assert committed.token_ids.tolist() == wrong[:1].tolist() and not committed.finished
    assert committed.num_rejected == batch.num_draft_tokens


def test_an_aborted_draft_counts_for_nobody() -> None:
    drive = Drive(LIMITS, depth=0, drafts=drafter())
    drive.scheduler.add(request())
    batch, result = _drafted(drive.scheduler, drive)
    drive.scheduler.abort(0)
    drive.scheduler.add(request(1))
    committed = drive.scheduler.commit(batch, result)
    assert not len(committed.token_ids) and committed.num_rejected == 0
    assert drive.scheduler.draft_counts.num_drafts == 0
    drive.scheduler.check_integrity()
