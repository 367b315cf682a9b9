"""The predicted peak is that of a simulation, and admission takes the longest prefix of the queue that fits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.batch import Int64
from nanoflow.kvcache import PagePools, PoolSize
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler.admission import PeakOfPages, num_admissible
from nanoflow.scheduler.key_events import NoKeyEvents
from nanoflow.scheduler.lengths import OutputLength
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.progress import Progress
from nanoflow.scheduler.reuse import PrefixReuse
from nanoflow.scheduler.waiting import WaitingQueue, WaitingRequest

Lengths = list[tuple[int, int]]


def simulated_peak(lengths: Lengths, page_size: int) -> int:
    """Step by step: in step t each request that is still there has s + t tokens, all but the last in pages."""
    steps = range(1, max((r for _, r in lengths), default=0) + 1)
    return max((sum(-(-(s + t - 1) // page_size) for s, r in lengths if r >= t) for t in steps), default=0)


def progress(lengths: Lengths, *, num_generated: int = 0, is_exact: bool = True) -> Progress:
    columns = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    return Progress(
        num_tokens=columns[:, 0],
        num_generated=np.full(len(lengths), num_generated),
        max_remaining=columns[:, 1],
        is_exact=np.full(len(lengths), is_exact),
        is_background=np.zeros(len(lengths), np.bool_),
    )


def predicted_peak_pages(num_tokens: Int64, num_remaining: Int64, page_size: int) -> int:
    """The fewest pages that all of them fit."""
    peak, count = PeakOfPages(num_tokens, num_remaining, page_size), len(num_tokens)
    return next(pages for pages in itertools.count() if peak.fits(count, pages))


lengths_lists = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=12)


@given(lengths_lists, st.integers(1, 20))
def test_peak_is_that_of_a_simulation(lengths: Lengths, page_size: int) -> None:
    columns = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    assert predicted_peak_pages(columns[:, 0], columns[:, 1], page_size) == simulated_peak(lengths, page_size)


def test_peak_of_equal_requests_wastes_no_page() -> None:
    lengths = np.full(8, 64)
    assert predicted_peak_pages(lengths, lengths, 16) == 8 * 128 // 16
    assert predicted_peak_pages(lengths, lengths + 1, 16) == 8 * 128 // 16
    assert predicted_peak_pages(lengths, lengths + 2, 16) == 8 * (128 // 16 + 1)


def test_peak_lets_requests_that_end_at_different_times_share_pages() -> None:
    together = predicted_peak_pages(np.array([10, 10]), np.array([100, 100]), 10)
    staggered = predicted_peak_pages(np.array([10, 100]), np.array([100, 10]), 10)
    assert (together, staggered) == (22, 13)


@given(lengths_lists, lengths_lists, st.integers(1, 60), st.integers(1, 8))
def test_admission_takes_the_longest_prefix_that_fits(
    running: Lengths, candidates: Lengths, num_pages: int, page_size: int
) -> None:
    fitting = [
        count
        for count in range(len(candidates) + 1)
        if simulated_peak(running + candidates[:count], page_size) <= num_pages
    ]
    expected = max(fitting, default=0)
    if not running and candidates:
        expected = max(expected, 1)
    count = num_admissible(
        progress(running),
        progress(candidates),
        OutputLength().counted_remaining,
        pools=[PoolSize(num_pages=num_pages)],
        page_size=page_size,
        max_batch_tokens=8,
    )
    assert count == expected


def test_the_first_joins_an_empty_engine_unless_pages_are_reserved_that_it_may_need() -> None:
    for is_all_there, expected in ((True, 1), (False, 0)):
        count = num_admissible(
            progress([]),
            progress([(90, 30)]),
            OutputLength().counted_remaining,
            pools=[PoolSize(num_pages=8)],
            page_size=10,
            max_batch_tokens=8,
            is_all_there=is_all_there,
        )
        assert count == expected


def test_no_overtaking() -> None:
    count = num_admissible(
        progress([(4, 4)]),
        progress([(90, 10), (1, 1)]),
        OutputLength().counted_remaining,
        pools=[PoolSize(num_pages=10)],
        page_size=10,
        max_batch_tokens=8,
    )
    assert count == 0


def counted(lengths: OutputLength, num_generated: int, max_remaining: int = 100_000, *, is_exact: bool = False) -> int:
    one = progress([(600, max_remaining)], num_generated=num_generated, is_exact=is_exact)
    return int(lengths.counted_remaining(one)[0])


PART = 1 / math.e  # of the mean


def live(lengths: OutputLength, num_generated: list[int]) -> None:
    """Requests that generate so many tokens each, side by side."""
    ends = np.array(num_generated)
    for step in range(1, int(ends.max()) + 1):
        running = ends[ends >= step]
        lengths.observe_tokens(np.full(len(running), step), running == step)


def test_before_anything_has_ended_a_prior_counts_and_not_all_that_may_come() -> None:
    lengths = OutputLength()
    assert counted(lengths, 0) == pytest.approx(256 * PART, rel=0.1)
    assert counted(lengths, 0, 40) == 40
    assert counted(lengths, 0, 8000, is_exact=True) == 8000
    assert counted(lengths, 400, 0) == 1  # its last token is on its way: it still holds its pages


def test_those_that_outlive_the_prior_correct_it_before_anything_has_ended() -> None:
    lengths = OutputLength()
    for step in range(1, 1001):
        lengths.observe_tokens(np.full(100, step), np.zeros(100, dtype=np.bool_))
    # A newcomer is expected to come as far as they all have, and a part of that counts.
    assert 1000 * PART <= counted(lengths, 0) <= 1400 * PART
    assert counted(lengths, 1000) < counted(lengths, 0)


def test_that_short_ones_end_first_does_not_mislead() -> None:
    """Of many that live between 1 and 1,000 tokens a tenth has ended, with 50 on average; the mean is 500."""
    lengths, ends = OutputLength(), np.arange(1, 1001)
    for step in range(1, 101):
        running = ends[ends >= step]
        lengths.observe_tokens(np.full(len(running), step), running == step)
    assert 260 * PART <= counted(lengths, 0) <= 1000 * PART
    live(lengths, ends.tolist())
    assert counted(lengths, 0) == pytest.approx(500 * PART, rel=0.1)
    assert counted(lengths, 800) == pytest.approx(100 * PART, rel=0.4)


def test_ends_that_the_front_end_found_count_like_others() -> None:
    by_token, by_abort = OutputLength(), OutputLength()
    for _ in range(300):
        for step in range(1, 21):
            by_token.observe_tokens(np.array([step]), np.array([step == 20]))
            by_abort.observe_tokens(np.array([step]), np.array([False]))
        by_abort.observe_end(20)
    assert counted(by_token, 0) == counted(by_abort, 0) == pytest.approx(20 * PART, abs=2)


def test_what_is_counted_follows_a_workload_that_changes() -> None:
    lengths = OutputLength()
    live(lengths, [1000] * 1000)
    assert counted(lengths, 0) == pytest.approx(1000 * PART, rel=0.15)
    for _ in range(8):
        live(lengths, [100] * 400)
    assert counted(lengths, 0) == pytest.approx(100 * PART, rel=0.3)


def test_preemptions_raise_what_is_counted_up_to_a_most_and_ends_bring_it_back() -> None:
    calm, taught = OutputLength(), OutputLength()
    for lengths in (calm, taught):
        live(lengths, [100] * 50)
    taught.observe_preemption()
    assert counted(taught, 0) == pytest.approx(1.2 * counted(calm, 0), rel=0.05)
    for _ in range(100):
        taught.observe_preemption()
    assert counted(taught, 0) == pytest.approx(1.5 / PART * counted(calm, 0), rel=0.05)
    for lengths in (calm, taught):
        live(lengths, [100] * 35)
    assert 1.2 * counted(calm, 0) < counted(taught, 0) < 3.5 * counted(calm, 0), "half of it after 35 ends"
    for lengths in (calm, taught):
        live(lengths, [100] * 400)
    assert counted(taught, 0) == pytest.approx(counted(calm, 0), rel=0.05)


@given(
    st.lists(st.tuples(st.integers(1, 300_000), st.booleans()), max_size=30),
    st.integers(0, 300_000),
    st.integers(0, 300_000),
)
def test_what_is_counted_is_at_least_one_and_at_most_what_may_come(
    seen: list[tuple[int, bool]], num_generated: int, max_remaining: int
) -> None:
    lengths = OutputLength()
    for length, is_last in seen:
        lengths.observe_tokens(np.array([length]), np.array([is_last]))
    assert 1 <= counted(lengths, num_generated, max_remaining) <= max(max_remaining, 1)


def make_waiting(request_id: int, num_tokens: int) -> WaitingRequest:
    request = Request(
        request_id=request_id,
        prompt_token_ids=[0] * num_tokens,
        params=SamplingParams(),
        seed=0,
        max_tokens=1,
    )
    return WaitingRequest(request=request, token_ids=np.zeros(num_tokens, dtype=np.int32))


def ids(waiting: list[WaitingRequest]) -> list[int]:
    return [one.request.request_id for one in waiting]


def test_queue_is_first_in_first_out_with_a_way_back_to_the_front() -> None:
    queue = WaitingQueue()
    for request_id in (1, 2, 3):
        queue.push_back(make_waiting(request_id, 1))
    first = next(iter(queue))
    assert queue.discard(1) and ids(list(queue)) == [2, 3]
    queue.push_front(first)
    assert queue.discard(2) and not queue.discard(2) and 2 not in queue and len(queue) == 2
    assert ids(list(queue)) == [1, 3]


def test_candidates_are_what_can_start_on_the_budget() -> None:
    queue = WaitingQueue()
    for request_id, num_tokens in enumerate((4, 4, 4)):
        queue.push_back(make_waiting(request_id, num_tokens))
    pools = PagePools([PoolSize(num_pages=9)], num_rows=9, max_tokens=9, page_size=2)
    limits = SchedulerLimits(
        max_batch_tokens=9, max_num_seqs=9, max_model_len=9, num_pages=9, page_size=2, vocab_size=9
    )
    reuse = PrefixReuse(pools, limits, NoKeyEvents())

    def first(max_requests: int, max_tokens: int) -> list[int]:
        found = reuse.candidates(queue, max_requests=max_requests, max_tokens=max_tokens)
        return ids([candidate.waiting for candidate in found])

    assert first(9, 9) == [0, 1, 2]
    assert first(9, 8) == [0, 1]
    assert first(1, 8) == [0]
    assert first(9, 0) == first(0, 9) == []
