"""Whole runs of the scheduler against a toy model: who is let in when lengths are not known in advance."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from nanoflow.batch import DenseBatch, SampledTokens
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import Scheduler, SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.progress import Progress
from tests.unit.test_scheduler import make_limits, make_request

EOS, WORD = 1, 5


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came out: iterations, running requests in each, share of pages in use while others waited, preemptions."""

    num_running: list[int] = field(default_factory=list)
    page_shares: list[float] = field(default_factory=list)
    preempted: Counter[int] = field(default_factory=Counter)

    @property
    def num_iterations(self) -> int:
        return len(self.num_running)


def run(
    lengths: list[tuple[int, int]],
    *,
    num_pages: int,
    max_tokens: int | None = None,
    is_aborted: bool = False,
    max_model_len: int = 8192,
    max_num_seqs: int = 512,
) -> Run:
    """Requests of (prompt, output) tokens, all there at the start, one batch ahead.

    Args:
        lengths: The scheduler is not told the second.
        num_pages, max_model_len, max_num_seqs: Limits.
        max_tokens: Of every request; by default what the model's length allows.
        is_aborted: They end by `abort`, as when the front end finds a stop string, and not by the end of sequence.
    """
    limits = SchedulerLimits(
        max_batch_tokens=2048,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        num_pages=num_pages,
        page_size=16,
        vocab_size=10,
    )
    scheduler, found = Scheduler(limits=limits), Run()
    for request_id, (num_prompt, _) in enumerate(lengths):
        allowed = max_tokens or max_model_len - num_prompt
        request = Request(
            request_id=request_id,
            prompt_token_ids=[WORD] * num_prompt,
            params=SamplingParams(max_tokens=allowed),
            seed=0,
            max_tokens=allowed,
            eos_token_ids=(EOS,),
        )
        scheduler.add(request)
    missing = np.array([num_output for _, num_output in lengths])
    running: DenseBatch | None = None
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        if running is not None:
            _commit(scheduler, running, missing, is_aborted=is_aborted)
        running = batch
        found.num_running.append(scheduler.num_running)
        found.preempted.update(scheduler.drain_events().preempted)
        if scheduler.num_waiting:
            found.page_shares.append(scheduler.fullest_pool.num_in_use / num_pages)
        assert found.num_iterations < 50_000
    scheduler.check_integrity()
    assert not missing.any() and scheduler.fullest_pool.num_in_use == 0
    return found


def _commit(scheduler: Scheduler, batch: DenseBatch, missing: np.ndarray, *, is_aborted: bool) -> None:
    rows = batch.rows[batch.sampled]
    is_alive = batch.epochs[batch.sampled] == scheduler._rows.epoch[rows]
    is_last = is_alive & (missing[scheduler._rows.request_id[rows]] == 1)
    token_ids = np.where(is_last & (not is_aborted), EOS, WORD).astype(np.int32)
    committed = scheduler.commit(batch, SampledTokens(token_ids=token_ids))
    missing[committed.request_ids] -= 1
    if is_aborted:
        for request_id in committed.request_ids[missing[committed.request_ids] == 0].tolist():
            assert scheduler.abort(request_id)


def chats(count: int, median: float, seed: int) -> list[tuple[int, int]]:
    """Prompts and outputs as different in length as those of chats: log-normal, outputs of up to 1,024 tokens."""
    draws = np.random.default_rng(seed).lognormal(0.0, 1.0, (count, 2))
    prompts, outputs = np.clip(draws * (120, median), 4, 1024).astype(int).T
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def test_a_stop_string_teaches_as_the_end_of_sequence_does() -> None:
    lengths = [(100, 20)] * 400
    by_token = run(lengths, num_pages=2048, max_tokens=4096)
    by_stop = run(lengths, num_pages=2048, max_tokens=4096, is_aborted=True)
    assert by_stop.num_iterations <= 1.1 * by_token.num_iterations < 110
    assert np.mean(by_stop.num_running) > 90 and not by_stop.preempted


def test_a_cold_start_lets_in_all_who_fit_by_the_prior() -> None:
    """256 chats that may have 8,000 tokens each, on a cache with room for few of them at that length."""
    found = run([(200, 300)] * 256, num_pages=56_000)
    # As fast as the token budget takes in their prompts.
    assert found.num_running[-(-200 * 256 // (2048 - 256))] == 256 and not found.preempted


def test_chats_use_a_tight_cache_well_with_few_preemptions() -> None:
    for seed, median in ((0, 60.0), (1, 200.0)):
        lengths = chats(500, median, seed)
        found = run(lengths, num_pages=2000)
        assert len(found.preempted) <= 0.02 * len(lengths)
        assert np.mean(found.page_shares) > 0.7


def test_a_prior_that_is_wrong_costs_each_request_few_preemptions() -> None:
    found = run([(100, 1500)] * 60, num_pages=2000, max_model_len=4096)
    assert max(found.preempted.values()) <= 3
    assert found.preempted.total() <= 1.5 * 60


def test_requests_that_end_before_their_first_token_teach_nothing() -> None:
    limits = SchedulerLimits(
        max_batch_tokens=64, max_num_seqs=4, max_model_len=512, num_pages=64, page_size=16, vocab_size=10
    )
    scheduler = Scheduler(limits=limits)
    for request_id in range(100):
        params = SamplingParams(max_tokens=100)
        scheduler.add(
            Request(request_id=request_id, prompt_token_ids=[WORD] * 200, params=params, seed=0, max_tokens=100)
        )
        assert scheduler.schedule() is not None
        assert scheduler.abort(request_id)
    assert not scheduler._lengths.interactive._seen.any()


def expected_of_a_newcomer(scheduler: Scheduler) -> int:
    one, none = np.array([4]), np.array([0])
    progress = Progress(
        num_tokens=one,
        num_generated=none,
        max_remaining=np.array([9999]),
        is_exact=np.zeros(1, np.bool_),
        is_background=np.zeros(1, np.bool_),
    )
    return int(scheduler._lengths.counted_remaining(progress)[0])


@pytest.mark.parametrize("leaves_early", [False, True])
@pytest.mark.parametrize("is_exact", [False, True])
def test_a_length_that_was_known_from_the_start_says_nothing_of_others(is_exact: bool, leaves_early: bool) -> None:
    scheduler = Scheduler(limits=make_limits(budget=64, rows=40, num_pages=400))
    before = expected_of_a_newcomer(scheduler)
    for request_id in range(40):
        scheduler.add(make_request(request_id, 1, max_tokens=40 if leaves_early else 2, ignore_eos=is_exact))
    for _ in range(3):
        batch = scheduler.schedule()
        if batch is not None:
            scheduler.commit(batch, SampledTokens(token_ids=np.full(len(batch.sampled), 5, np.int32)))
    for request_id in range(40):
        scheduler.abort(request_id)
    assert not scheduler.has_unfinished
    after = expected_of_a_newcomer(scheduler)
    assert after == before if is_exact else after < before


def test_no_request_is_counted_beyond_the_longest_sequence() -> None:
    """Each of the two may have 16 tokens with its prompt, so both fit at once."""
    scheduler = Scheduler(limits=make_limits(rows=2, max_model_len=16, num_pages=8, page_size=4))
    for request_id in range(2):
        scheduler.add(make_request(request_id, 4, max_tokens=1000))
    scheduler.schedule()
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)


def test_nobody_is_let_in_for_tokens_that_the_pace_does_not_allow() -> None:
    """A decode and part of a prompt fill the time of an iteration, though the budget has room."""
    pace = Pace(max_itl_s=10e-3, iteration_time=IterationTime(token_s=1e-3), min_prompt_tokens=4)
    scheduler = Scheduler(limits=make_limits(budget=64), pace=pace)
    scheduler.add(make_request(0, 1))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.commit(batch, SampledTokens(token_ids=np.array([5], np.int32)))
    scheduler.add(make_request(1, 40))
    scheduler.schedule()
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)
    scheduler.add(make_request(2, 4))
    batch = scheduler.schedule()
    assert batch is not None and batch.num_tokens == 10
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
