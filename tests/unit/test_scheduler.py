"""Each rule of the scheduler on its own, with batches committed at once and one iteration late."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.outputs import Finished, FinishReason
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import Scheduler, SchedulerLimits
from tests.unit.fake_executor import Drive, answer_alone

LENGTH = Finished(reason=FinishReason.LENGTH)
EOS = 1


def make_limits(
    *, budget: int = 16, rows: int = 8, max_model_len: int = 64, num_pages: int = 64, page_size: int = 4
) -> SchedulerLimits:
    return SchedulerLimits(
        max_batch_tokens=budget,
        max_num_seqs=rows,
        max_model_len=max_model_len,
        num_pages=num_pages,
        page_size=page_size,
        vocab_size=100,
    )


def make_request(
    request_id: int,
    num_prompt: int = 4,
    *,
    max_tokens: int = 8,
    min_tokens: int = 0,
    ignore_eos: bool = True,
    stop_token_ids: tuple[int, ...] = (),
    prompt_logprobs: int | None = None,
    logit_bias: dict[int, float] | None = None,
) -> Request:
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
        prompt_logprobs=prompt_logprobs,
        logit_bias=logit_bias,
    )
    prompt = [(request_id * 7 + position) % 100 for position in range(num_prompt)]
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=params,
        seed=request_id,
        max_tokens=max_tokens,
        eos_token_ids=(EOS,),
    )


def tokens(*token_ids: int, errors: dict[int, str] | None = None) -> SampledTokens:
    return SampledTokens(token_ids=np.array(token_ids, dtype=np.int32), errors=errors or {})


def next_batch(scheduler: Scheduler) -> DenseBatch:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check_integrity()
    return batch


def lengths(batch: DenseBatch) -> list[int]:
    return [int(length) for length in np.diff(batch.query_start)]


def request_ids(drive: Drive, batch: DenseBatch) -> list[int]:
    return [drive.executor.tenants[row].joined.seed for row in batch.rows.tolist()]


# Forming a batch


def test_prompts_are_cut_at_token_granularity_to_fill_the_budget_exactly() -> None:
    drive = Drive(make_limits(budget=10), depth=0)
    for request_id, num_prompt in enumerate((4, 23, 5)):
        drive.add(make_request(request_id, num_prompt))
    batches = [drive.step() for _ in range(4)]
    assert [lengths(batch) for batch in batches if batch] == [[4, 6], [1, 9], [1, 8, 1], [1, 1, 4]]
    assert [batch.num_decodes for batch in batches if batch] == [0, 1, 1, 2]
    assert [batch.sampled.tolist() for batch in batches if batch] == [[0], [0], [0, 1], [0, 1, 2]]


def test_decodes_come_first_then_the_oldest() -> None:
    drive = Drive(make_limits(budget=12), depth=0)
    drive.add(make_request(0, 20))
    drive.step()
    drive.add(make_request(1, 2))
    batch = drive.step()
    assert batch and request_ids(drive, batch) == [0, 1]
    drive.add(make_request(2, 29))
    drive.add(make_request(3, 1))
    drive.step()
    batch = drive.step()
    assert batch and request_ids(drive, batch) == [0, 1, 2] and lengths(batch) == [1, 1, 10]
    batch = drive.step()
    assert batch and request_ids(drive, batch) == [0, 1, 3, 2] and lengths(batch) == [1, 1, 1, 9]
    assert batch.num_decodes == 3  # a prompt of one token is like a decode


def test_when_decodes_exceed_the_budget_the_oldest_go_first() -> None:
    drive = Drive(make_limits(budget=3, rows=5), depth=0)
    for request_id in range(3):
        drive.add(make_request(request_id, 1, max_tokens=5))
    drive.step()
    for request_id in range(3, 5):
        drive.add(make_request(request_id, 1, max_tokens=5))
    assert [request_ids(drive, batch) for batch in [drive.step() for _ in range(4)] if batch] == [[0, 1, 2]] * 4
    batch = drive.step()
    assert batch and request_ids(drive, batch) == [3, 4]


def test_nothing_to_do_is_no_batch() -> None:
    assert Scheduler(limits=make_limits()).schedule() is None


def test_rows_limit_what_runs() -> None:
    scheduler = Scheduler(limits=make_limits(rows=2))
    for request_id in range(3):
        scheduler.add(make_request(request_id, 2))
    batch = next_batch(scheduler)
    assert len(batch.joined) == 2
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.has_unfinished) == (2, 1, True)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_sampled_token_is_fed_back_whether_committed_or_not(is_async: bool) -> None:
    scheduler = Scheduler(limits=make_limits())
    scheduler.add(make_request(0, 3))
    first = next_batch(scheduler)
    assert first.is_fed_back.tolist() == [False] * 3 and first.token_ids.tolist() == [0, 1, 2]
    if not is_async:
        scheduler.commit(first, tokens(42))
    second = next_batch(scheduler)
    assert second.is_fed_back.tolist() == [True] and second.positions.tolist() == [3] and second.num_decodes == 1
    assert second.joined == () and second.iteration == first.iteration + 1


def test_length_is_known_without_looking_at_tokens() -> None:
    scheduler = Scheduler(limits=make_limits())
    scheduler.add(make_request(0, 3, max_tokens=2))
    first, second = next_batch(scheduler), next_batch(scheduler)
    assert scheduler.schedule() is None and scheduler.has_unfinished
    assert scheduler.commit(first, tokens(5)).finished == {}
    committed = scheduler.commit(second, tokens(6))
    assert committed.finished == {0: LENGTH} and committed.token_ids.tolist() == [6]
    assert not scheduler.has_unfinished and scheduler.fullest_pool.num_in_use == 0


def test_context_length_ends_a_request() -> None:
    drive = Drive(make_limits(max_model_len=10), depth=1)
    drive.add(make_request(0, 7, max_tokens=50))
    drive.run_until_idle()
    assert len(drive.answers[0].token_ids) == 3 and drive.answers[0].finish == LENGTH


# Committing a result


def test_the_token_after_the_end_of_sequence_is_dropped() -> None:
    scheduler = Scheduler(limits=make_limits())
    scheduler.add(make_request(0, ignore_eos=False))
    scheduler.add(make_request(1, ignore_eos=False))
    first, second = next_batch(scheduler), next_batch(scheduler)
    committed = scheduler.commit(first, tokens(EOS, 9))
    assert committed.request_ids.tolist() == [0, 1] and committed.token_ids.tolist() == [EOS, 9]
    assert committed.finished == {0: Finished(reason=FinishReason.STOP)}
    scheduler.check_integrity()
    late = scheduler.commit(second, tokens(8, 7))
    assert (late.request_ids.tolist(), late.token_ids.tolist(), late.places.tolist()) == ([1], [7], [1])
    assert late.token_ids.dtype == late.places.dtype == np.int32 and late.request_ids.dtype == np.int64


def test_a_dropped_token_does_not_reach_the_next_tenant_of_the_row() -> None:
    scheduler = Scheduler(limits=make_limits(rows=1))
    scheduler.add(make_request(0, ignore_eos=False))
    scheduler.add(make_request(1))
    first, second = next_batch(scheduler), next_batch(scheduler)
    scheduler.commit(first, tokens(EOS))
    third = next_batch(scheduler)
    assert third.rows.tolist() == second.rows.tolist() and third.epochs[0] == second.epochs[0] + 1
    assert scheduler.commit(second, tokens(8)).token_ids.tolist() == []
    committed = scheduler.commit(third, tokens(7))
    assert committed.request_ids.tolist() == [1] and committed.token_ids.tolist() == [7]


def test_a_stop_token_of_its_own_is_named_and_the_end_of_sequence_is_not() -> None:
    scheduler = Scheduler(limits=make_limits())
    scheduler.add(make_request(0, stop_token_ids=(50, 51), ignore_eos=False))
    scheduler.add(make_request(1, stop_token_ids=(50, EOS), ignore_eos=False))
    scheduler.add(make_request(2, stop_token_ids=(50, EOS), ignore_eos=True))
    scheduler.add(make_request(3))
    batch = next_batch(scheduler)
    assert [joined.stop_token_ids for joined in batch.joined] == [(EOS, 50, 51), (EOS, 50, EOS), (50, EOS), ()]
    assert scheduler.commit(batch, tokens(51, EOS, EOS, EOS)).finished == {
        0: Finished(reason=FinishReason.STOP, stop_token_id=51),
        1: Finished(reason=FinishReason.STOP),
        2: Finished(reason=FinishReason.STOP, stop_token_id=EOS),
    }


def test_min_tokens_holds_a_stop_back_but_not_the_length() -> None:
    scheduler = Scheduler(limits=make_limits())
    scheduler.add(make_request(0, min_tokens=3, max_tokens=3, ignore_eos=False))
    for expected in ({}, {}, {0: Finished(reason=FinishReason.STOP)}):
        assert scheduler.commit(next_batch(scheduler), tokens(EOS)).finished == expected


def test_an_error_ends_only_its_request_and_gives_no_token() -> None:
    scheduler = Scheduler(limits=make_limits())
    for request_id in range(3):
        scheduler.add(make_request(request_id))
    batch, late = next_batch(scheduler), next_batch(scheduler)
    committed = scheduler.commit(batch, tokens(5, 0, 7, errors={1: "logits are not finite"}))
    assert committed.finished == {1: Finished(reason=FinishReason.ERROR, error="logits are not finite")}
    assert committed.request_ids.tolist() == [0, 2] and committed.places.tolist() == [0, 2]
    scheduler.check_integrity()
    assert scheduler.commit(late, tokens(5, 0, 7, errors={1: "still not"})).finished == {}
    assert scheduler.num_running == 2


# Leaving early


@pytest.mark.parametrize("depth", [0, 1])
def test_abort_of_waiting_running_and_in_flight(depth: int) -> None:
    drive = Drive(make_limits(rows=2), depth=depth)
    for request_id in range(4):
        drive.add(make_request(request_id, max_tokens=20))
    drive.step()
    drive.step()
    assert drive.scheduler.abort(3) and drive.scheduler.abort(0)
    assert not drive.scheduler.abort(0) and not drive.scheduler.abort(99)
    drive.scheduler.check_integrity()
    num_before = len(drive.answers[0].token_ids)
    drive.run_until_idle()
    assert len(drive.answers[0].token_ids) == num_before and drive.answers[3].token_ids == []
    for request_id in (1, 2):
        assert len(drive.answers[request_id].token_ids) == 20
    assert drive.scheduler.fullest_pool.num_in_use == 0


def test_an_id_can_be_used_again_once_its_request_has_ended() -> None:
    scheduler = Scheduler(limits=make_limits())
    scheduler.add(make_request(0, max_tokens=1))
    with pytest.raises(ValueError, match="id 0 is already there"):
        scheduler.add(make_request(0))
    batch = next_batch(scheduler)
    with pytest.raises(ValueError, match="id 0 is already there"):
        scheduler.add(make_request(0))
    scheduler.commit(batch, tokens(5))
    scheduler.add(make_request(0))
    assert scheduler.num_waiting == 1


# Too few pages


def make_misjudging_drive(*, depth: int, num_pages: int = 7) -> Drive:
    """A scheduler that believes outputs are short, so that it admits too many and must preempt."""
    limits = make_limits(budget=64, max_model_len=28, num_pages=num_pages, page_size=4)
    drive = Drive(limits, depth=depth)
    drive.scheduler._lengths.interactive.observe_tokens(np.ones(500, dtype=np.int64), np.ones(500, dtype=np.bool_))
    return drive


@pytest.mark.parametrize("depth", [0, 1])
def test_the_newest_is_preempted_returns_to_the_front_and_loses_nothing(depth: int) -> None:
    drive = make_misjudging_drive(depth=depth)
    requests = [make_request(request_id, 5, max_tokens=16, ignore_eos=False) for request_id in range(4)]
    for request in requests:
        drive.add(request)
    drive.step()
    assert drive.scheduler.drain_events().scheduled == {0: 0, 1: 0, 2: 0}
    preempted: list[int] = []
    while not preempted:
        drive.step()
        drive.scheduler.check_integrity()
        preempted = drive.scheduler.drain_events().preempted
    assert preempted == [2] and drive.scheduler.num_preemptions == 1
    assert [each.request.request_id for each in drive.scheduler._waiting] == [2, 3]
    drive.run_until_idle()
    for request in requests:
        assert drive.answers[request.request_id] == answer_alone(request, drive.executor.limits)
    assert drive.scheduler.drain_events().scheduled == {3: 0}


def test_a_preempted_request_joins_again_with_all_tokens_it_has_shown() -> None:
    drive = make_misjudging_drive(depth=1)
    for request_id in range(3):
        drive.add(make_request(request_id, 4, max_tokens=16, ignore_eos=False))
    joined_again = None
    while joined_again is None:
        batch = drive.step()
        if batch is not None and drive.scheduler.num_preemptions:
            joined_again = next((joined for joined in batch.joined if joined.seed == 2), None)
            if joined_again is not None:
                start = batch.query_start[batch.num_requests - 1]
                assert not batch.is_fed_back[start:].any() and batch.positions[start] == 0
    shown = drive.answers[2].token_ids
    num_generated = len(joined_again.token_ids) - joined_again.num_prompt_tokens
    assert num_generated > 0 and joined_again.token_ids[4:].tolist() == shown[:num_generated]


def test_the_newest_is_the_one_admitted_last_whatever_its_row() -> None:
    drive = make_misjudging_drive(depth=0)
    drive.add(make_request(0, 5, max_tokens=2))
    drive.add(make_request(1, 5, max_tokens=16, ignore_eos=False))
    drive.step()
    drive.step()
    drive.add(make_request(2, 5, max_tokens=16, ignore_eos=False))
    drive.add(make_request(3, 2, max_tokens=1))
    batch = drive.step()
    assert batch and request_ids(drive, batch) == [1, 2, 3] and batch.rows[0] > batch.rows[1]
    while not drive.scheduler.num_preemptions:
        drive.step()
    assert drive.scheduler.drain_events().preempted == [2]


@pytest.mark.parametrize("depth", [0, 1])
def test_nobody_is_admitted_in_a_pass_that_preempted(depth: int) -> None:
    drive = make_misjudging_drive(depth=depth, num_pages=8)
    for request_id in range(3):
        drive.add(make_request(request_id, 4, max_tokens=16, ignore_eos=False))
    while not drive.scheduler.num_preemptions:
        batch = drive.step()
    assert batch and batch.joined == () and drive.scheduler.num_waiting == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_a_pool_that_holds_one_request_serves_them_all(depth: int) -> None:
    drive = make_misjudging_drive(depth=depth)
    for request_id in range(5):
        drive.add(make_request(request_id, 10, max_tokens=18, ignore_eos=False))
    drive.run_until_idle(max_steps=400)
    assert [len(drive.answers[request_id].token_ids) for request_id in range(5)] == [18] * 5
    assert drive.scheduler.fullest_pool.num_in_use == 0


def test_exact_lengths_are_packed_without_preemption() -> None:
    drive = Drive(make_limits(budget=64, num_pages=16, max_model_len=16), depth=1)
    for request_id in range(12):
        drive.add(make_request(request_id, 8, max_tokens=8))
    drive.step()
    assert drive.scheduler.num_running == 4
    drive.run_until_idle()
    assert drive.scheduler.num_preemptions == 0


# Prompt log probabilities


def test_each_prompt_token_after_the_first_is_scored_once() -> None:
    drive = Drive(make_limits(budget=5), depth=0)
    drive.add(make_request(0, 11, prompt_logprobs=2))
    drive.add(make_request(1, 3))
    batches = [drive.step() for _ in range(4)]
    scores = [batch.prompt_scores for batch in batches if batch]
    assert [[(s.first_position, s.start, s.stop, s.num_logprobs) for s in part] for part in scores] == [
        [(1, 0, 5, 2)],
        [(6, 0, 5, 2)],
        [],
        [],
    ]
    assert drive.scored == {0: set(range(1, 11))}


def test_scores_of_a_request_that_has_left_are_nobodys() -> None:
    scheduler = Scheduler(limits=make_limits())
    for request_id in range(2):
        scheduler.add(make_request(request_id, prompt_logprobs=0))
    batch = next_batch(scheduler)
    scheduler.abort(0)
    assert scheduler.commit(batch, tokens(5, 6)).scored == (None, 1)


# What is refused


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request(0, 0), "the prompt is empty"),
        (make_request(0, 64), "the prompt has 64 tokens; at most 63 fit"),
        (
            make_request(0, stop_token_ids=(5, 100)),
            "stop_token_ids: token id 100 is out of vocabulary, which has 100 tokens",
        ),
        (make_request(0, logit_bias={-3: 1.0}), "logit_bias: token id -3 is out of"),
        (
            Request(request_id=0, prompt_token_ids=[3, -1], params=SamplingParams(), seed=0, max_tokens=1),
            "prompt: token id -1 is out of vocabulary",
        ),
        (
            Request(request_id=0, prompt_token_ids=[2**40], params=SamplingParams(), seed=0, max_tokens=1),
            f"prompt: token id {2**40} is out of",
        ),
        (
            Request(request_id=0, prompt_token_ids=[3], params=SamplingParams(), seed=0, max_tokens=0),
            "max_tokens must be at least 1, got 0",
        ),
    ],
)
def test_what_can_never_run_is_refused(request_: Request, message: str) -> None:
    scheduler = Scheduler(limits=make_limits())
    with pytest.raises(ValueError, match=message):
        scheduler.add(request_)
    assert not scheduler.has_unfinished


def test_an_end_of_sequence_beyond_the_vocabulary_ends_nothing() -> None:
    drive = Drive(make_limits(), depth=1)
    request = make_request(0, ignore_eos=False)
    drive.add(replace(request, eos_token_ids=(100, 2**40, -1)))
    drive.run_until_idle()
    assert len(drive.answers[0].token_ids) == request.max_tokens


def test_the_longest_prompt_fits() -> None:
    drive = Drive(make_limits(max_model_len=64, num_pages=16), depth=1)
    drive.add(make_request(0, 63))
    drive.run_until_idle()
    assert len(drive.answers[0].token_ids) == 1


def test_limits_must_be_positive_and_one_request_must_fit_the_pool() -> None:
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1, got 0"):
        make_limits(rows=0)
    with pytest.raises(ValueError, match=r"max_model_len \(17\) exceeds the KV cache: 4 pages of 4 tokens hold 16"):
        make_limits(max_model_len=17, num_pages=4)


def test_integrity_check_notices_a_request_with_too_few_pages() -> None:
    scheduler = Scheduler(limits=make_limits())
    scheduler.add(make_request(0))
    batch = next_batch(scheduler)
    scheduler._pages.release(np.array([batch.rows[0]], dtype=np.int64))
    with pytest.raises(RuntimeError, match="more or fewer pages"):
        scheduler.check_integrity()


def test_what_is_computed_of_a_prompt_is_not_computed_again() -> None:
    """It takes pages like any other, and none of the budget."""
    scheduler = Scheduler(limits=make_limits(budget=8, num_pages=16))
    scheduler.add(make_request(0, 14, max_tokens=20), 13)
    scheduler.add(make_request(1, 12, max_tokens=2), 5)
    first = next_batch(scheduler)
    assert first.query_start.tolist() == [0, 1, 8] and first.context_len.tolist() == [14, 12]
    assert first.positions.tolist() == [13, *range(5, 12)] and first.num_decodes == 1
    assert not first.is_fed_back.any() and scheduler.fullest_pool.num_in_use == 4 + 3
    with pytest.raises(ValueError, match=r"num_computed must be in 0\.\.3, got 4"):
        scheduler.add(make_request(2, 4), 4)
