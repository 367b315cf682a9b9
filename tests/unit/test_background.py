"""Priorities: who goes first, who makes way, and how much of an iteration background requests may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.graph.operation import BatchShape
from nanoflow.kvcache.keys import page_keys, root_key
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.priorities import BATCH, Priority
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import Pace, SchedulerLimits
from nanoflow.scheduler.background import Background, Hurry, Part
from nanoflow.scheduler.class_lengths import ClassLengths
from nanoflow.scheduler.progress import Progress
from tests.all_cases import num_examples
from tests.unit.fake_executor import Drive, answer_alone

TIME = IterationTime(fixed_s=1e-3, token_s=1e-5, sampled_s=1e-6, key_s=1e-7, pair_s=1e-8)
BUDGET = 256


def hurry_of(*num_behind: int) -> Callable[[], Hurry]:
    """Requests that came at 0 and wait for so many tokens after this iteration."""
    return lambda: Hurry(arrival_s=np.zeros(len(num_behind)), num_behind=np.array(num_behind, dtype=np.int64))


NOBODY = hurry_of()


def limits_of(*, rows: int = 8, num_pages: int = 200, budget: int = BUDGET) -> SchedulerLimits:
    return SchedulerLimits(
        max_batch_tokens=budget,
        max_num_seqs=rows,
        max_model_len=min(200, 4 * num_pages),
        num_pages=num_pages,
        page_size=4,
        vocab_size=100,
    )


def request_of(
    request_id: int, priority: Priority = 0, *, num_prompt: int = 4, max_tokens: int = 6, arrival_s: float = 0.0
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=[(request_id * 7 + place) % 100 for place in range(num_prompt)],
        params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        seed=request_id,
        max_tokens=max_tokens,
        priority=priority,
        arrival_s=arrival_s,
    )


def ids_in(drive: Drive) -> list[int]:
    """Requests of the next batch, in its order."""
    batch = drive.step()
    drive.scheduler.check_integrity()
    return [] if batch is None else [drive.executor.tenants[row].joined.seed for row in batch.rows.tolist()]


def assert_all_got_their_tokens(drive: Drive, requests: list[Request]) -> None:
    drive.run_until_idle()
    for request in requests:
        assert drive.answers[request.request_id] == answer_alone(request, drive.executor.limits)
    assert drive.scheduler.fullest_pool.num_in_use == drive.scheduler.num_running == drive.scheduler.num_waiting == 0


# Order


def test_lower_numbers_are_let_in_first_and_equal_ones_as_they_come() -> None:
    drive = Drive(limits_of(rows=1), depth=0)
    priorities: list[Priority] = [BATCH, 3, 0, BATCH, -1, 0, 3]
    requests = [request_of(n, p) for n, p in enumerate(priorities)]
    for request in requests:
        drive.add(request)
    order: list[int] = []
    while drive.scheduler.has_unfinished:
        order += [one for one in ids_in(drive) if one not in order]
    assert order == [4, 2, 5, 1, 6, 0, 3]
    assert_all_got_their_tokens(drive, requests)


def test_urgent_prompts_are_computed_before_those_that_came_earlier() -> None:
    drive = Drive(limits_of(budget=16), depth=0)
    for number, priority in enumerate((5, 5, 0)):
        drive.add(request_of(number, priority, num_prompt=12))
    assert ids_in(drive) == [2, 0]
    assert ids_in(drive) == [2, 0, 1]


@pytest.mark.parametrize("depth", [0, 1])
def test_the_least_urgent_is_sent_back_first(depth: int) -> None:
    drive = Drive(limits_of(num_pages=30), depth=depth)
    priorities: list[Priority] = [1, BATCH, 0, BATCH, 1]
    requests = [request_of(n, p, max_tokens=40) for n, p in enumerate(priorities)]
    # All are let in at once, as if each was to say one token.
    drive.scheduler._lengths.counted_remaining = lambda progress: np.ones_like(progress.num_tokens)  # type: ignore[method-assign]
    for request in requests:
        drive.add(request)
    sent_back: list[int] = []
    while drive.scheduler.has_unfinished or drive.in_flight:
        drive.step()
        drive.scheduler.check_integrity()
        sent_back += drive.scheduler.drain_events().preempted
    assert [*dict.fromkeys(sent_back)][:3] == [3, 1, 4] and 2 not in sent_back
    assert drive.scheduler.num_background_preemptions == sum(one in (1, 3) for one in sent_back)
    assert_all_got_their_tokens(drive, requests)


@pytest.mark.parametrize("depth", [0, 1])
def test_background_requests_make_way_when_rows_or_pages_are_theirs(depth: int) -> None:
    for limits in (limits_of(rows=4), limits_of(num_pages=30)):
        drive = Drive(limits, depth=depth)
        requests = [request_of(n, BATCH, num_prompt=20, max_tokens=40) for n in range(4)]
        requests += [request_of(n, 0, num_prompt=30, max_tokens=30) for n in (4, 5)]
        for request in requests[:4]:
            drive.add(request)
        for _ in range(10):
            drive.step()
        for request in requests[4:]:
            drive.add(request)
        assert {4, 5} <= set(ids_in(drive))
        assert_all_got_their_tokens(drive, requests)
        assert drive.scheduler.num_background_preemptions == drive.scheduler.num_preemptions > 0


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_background_requests_send_each_other_back_for_no_row(rows: int) -> None:
    drive = Drive(limits_of(rows=rows), depth=1)
    requests = [request_of(n, BATCH, max_tokens=3 + n) for n in range(20)] + [request_of(20), request_of(21)]
    for request in requests[:20]:
        drive.add(request)
    drive.step()
    assert drive.scheduler.num_running == rows - rows // 16
    for request in requests[20:]:
        drive.add(request)
    assert_all_got_their_tokens(drive, requests)
    assert drive.scheduler.num_preemptions <= 2


def test_numbers_alone_send_nobody_back_for_a_row() -> None:
    drive = Drive(limits_of(rows=1), depth=0)
    drive.add(request_of(0, 5))
    drive.step()
    drive.add(request_of(1, 0))
    assert ids_in(drive) == [0] and drive.scheduler.num_preemptions == 0


def test_an_interactive_request_waits_for_no_prefix_that_a_background_one_computes() -> None:
    drive = Drive(limits_of(budget=24), depth=1)
    prompt, root = [place % 100 for place in range(80)], root_key()
    keys = b"".join((root, *page_keys(prompt, 4, root)))
    priorities: list[Priority] = [BATCH, 0, 0]
    requests = [replace(request_of(n, p), prompt_token_ids=prompt, page_keys=keys) for n, p in enumerate(priorities)]
    drive.add(requests[0])
    assert ids_in(drive) == [0]
    drive.add(requests[1])
    # It takes the first page, which is there by now, and all of the budget; the next one waits for it.
    assert ids_in(drive) == [1]
    drive.add(requests[2])
    assert ids_in(drive) == [1] and drive.scheduler.num_running == 2
    assert_all_got_their_tokens(drive, requests)


# Bounds


def part(requests: list[tuple[int, int]]) -> Part:
    """Requests of (tokens computed, tokens pending), decodes first."""
    computed, pending = np.array(sorted(requests, key=lambda one: one[1] > 1), dtype=np.int64).reshape(-1, 2).T
    return Part(rows=np.arange(len(computed)), num_before=computed, num_pending=pending)


def time_s(*parts: tuple[Part, list[int]]) -> float:
    """Of an iteration with so many tokens of each request, added up one by one."""
    num_tokens = keys = pairs = sampled = 0
    for one, taken in parts:
        for before, pending, count in zip(one.num_before.tolist(), one.num_pending.tolist(), taken, strict=True):
            num_tokens += count
            keys += count * (before + 1) if pending == 1 else 0
            pairs += 0 if pending == 1 else sum(before + place + 1 for place in range(count))
            sampled += count == pending
    return TIME.predict_s(
        BatchShape(num_tokens=num_tokens, decode_context=keys, prefill_context=pairs, num_sampled=sampled)
    )


@st.composite
def lists_of_requests(draw: st.DrawFn) -> list[tuple[int, int]]:
    decodes = draw(st.lists(st.tuples(st.integers(0, 3000), st.just(1)), max_size=20))
    return [*decodes, *draw(st.lists(st.tuples(st.integers(0, 3000), st.integers(2, 200)), max_size=4))]


@settings(max_examples=num_examples(60), deadline=None)
@given(lists_of_requests(), lists_of_requests(), st.sampled_from([None, 2e-3, 4e-3]), st.sampled_from([None, 9e-3]))
def test_it_is_the_most_tokens_within_the_bounds(
    interactive: list[tuple[int, int]], others: list[tuple[int, int]], itl_s: float | None, ttft_s: float | None
) -> None:
    first, behind = part(interactive), part(others)
    pace = Pace(max_itl_s=itl_s, max_ttft_s=ttft_s, iteration_time=TIME)
    taken = first.taken(BUDGET)
    found = Background(lambda: 0.0, lambda: True).max_tokens(pace, BUDGET, first, taken, behind, NOBODY)
    room = BUDGET - int(taken.sum())
    bounds = [itl_s if (first.num_pending == 1).any() else None, ttft_s and ttft_s / 3]
    bound_s = min((bound for bound in bounds if bound is not None), default=1.0)
    filling = behind.and_a_prompt(BUDGET)

    def with_tokens(count: int) -> float:
        return time_s((first, taken.tolist()), (filling, filling.taken(count).tolist()))

    assert 0 <= found <= room
    assert found == 0 or with_tokens(found) <= bound_s * (1 + 1e-9)
    assert found == room or with_tokens(found + 1) > bound_s * (1 - 1e-9)


def test_a_prompt_in_a_hurry_takes_the_time_of_background_requests() -> None:
    first, behind = part([(0, 100)]), part([(50, 1)] * 40)
    pace = Pace(max_ttft_s=30e-3, iteration_time=TIME)
    taken = first.taken(BUDGET)
    found = []
    for now_s in (0.0, 27.4e-3, 27.97e-3, 40e-3):
        background = Background(lambda now_s=now_s: now_s, lambda: True)  # type: ignore[misc]
        found.append(background.max_tokens(pace, BUDGET, first, taken, behind, hurry_of(0)))
    # The prompt alone takes 2.05 ms of an iteration.
    assert found[0] == BUDGET - 100 and 0 < found[1] < 40 and found[2:] == [0, 0]
    assert Background(lambda: 0.0, lambda: True).max_tokens(pace, BUDGET, first, taken, behind, hurry_of(2000)) == 0


def test_without_interactive_requests_they_have_the_whole_budget_and_never_stand_still_for_long() -> None:
    now_s = [0.0]
    background = Background(lambda: now_s[0], lambda: True)
    tight = Pace(max_itl_s=1e-9, iteration_time=TIME)
    nothing, decode, behind = part([]), part([(10, 1)]), part([(0, 500)])
    taken = decode.taken(BUDGET)
    assert background.max_tokens(tight, BUDGET, nothing, nothing.taken(BUDGET), behind, NOBODY) == BUDGET
    assert background.max_tokens(tight, BUDGET, decode, taken, behind, NOBODY) == 0
    now_s[0] = 1.1
    assert background.max_tokens(tight, BUDGET, decode, taken, behind, NOBODY) == 64
    background.note_formed(64, 65)
    assert background.max_tokens(tight, BUDGET, decode, taken, behind, NOBODY) == 0
    assert (background.counts.num_tokens, background.counts.num_all_tokens) == (64, 65)


def test_late_first_tokens_make_background_iterations_shorter_and_others_longer_again() -> None:
    now_s = [1.0]
    background = Background(lambda: now_s[0], lambda: True)
    pace = Pace(max_ttft_s=6e-3, iteration_time=TIME)
    nothing, behind = part([]), part([(0, 500)])

    def most() -> int:
        return background.max_tokens(pace, BUDGET, nothing, nothing.taken(BUDGET), behind, NOBODY)

    first = most()
    background.note_first_tokens(Pace(iteration_time=TIME), np.array([0.0]))
    background.note_first_tokens(pace, np.array([0.9999, 0.9999]))
    assert most() == first < BUDGET
    background.note_first_tokens(pace, np.array([0.9, 0.9999, 0.5]))
    less = most()
    assert time_s((behind, [less])) <= 2e-3 * 0.82 and less < first
    # About one in a hundred keeps the balance.
    for _ in range(10):
        background.note_first_tokens(pace, np.array([0.5, *[0.9999] * 105]))
    assert abs(most() - less) <= 1
    for _ in range(3):
        background.note_first_tokens(pace, np.full(100, 0.9999))
    assert most() == first


def test_lengths_and_preemptions_of_classes_are_learnt_apart() -> None:
    lengths = ClassLengths()
    is_background = np.array([True, False])
    for generated in range(1, 400):
        ends = np.array([generated % 10 == 0, False])
        lengths.observe_tokens(np.array([(generated - 1) % 10 + 1, generated]), ends, is_background)
    progress = Progress(
        num_tokens=np.array([50, 50]),
        num_generated=np.zeros(2, np.int64),
        max_remaining=np.full(2, 5000),
        is_exact=np.zeros(2, np.bool_),
        is_background=is_background,
    )
    short, long = lengths.counted_remaining(progress).tolist()
    assert short < 30 and long > 3 * short
    assert lengths.held_remaining(progress)[0] < lengths.held_remaining(progress)[1]
    lengths.observe_preemption(is_background=True)
    more, same = lengths.counted_remaining(progress).tolist()
    assert more > short and same == long
    lengths.observe_end(3, is_background=False)
    assert lengths.counted_remaining(progress)[1] < long


def test_decodes_of_background_requests_are_left_out_and_go_on_later() -> None:
    """With a bound that interactive decodes fill, on a clock that stands still."""
    pace = Pace(max_itl_s=1.05e-3, iteration_time=TIME, min_prompt_tokens=1)
    drive = Drive(limits_of(), depth=1, pace=pace, clock=lambda: 0.0)
    requests = [request_of(n, BATCH, max_tokens=30) for n in range(3)]
    requests += [request_of(n, 0, max_tokens=8) for n in range(3, 7)]
    for request in requests[:3]:
        drive.add(request)
    for _ in range(5):
        assert len(ids_in(drive)) == 3
    for request in requests[3:]:
        drive.add(request)
    seen = [set(ids_in(drive)) for _ in range(6)]
    assert any(ids and not ids & {0, 1, 2} for ids in seen) and all(ids & {3, 4, 5, 6} for ids in seen)
    assert_all_got_their_tokens(drive, requests)


def test_who_joins_without_a_token_is_told_to_the_device_with_the_first() -> None:
    """A prompt of one token is like a decode: beside it there is no time for the background request that joins too."""
    pace = Pace(max_itl_s=1e-9, iteration_time=TIME, min_prompt_tokens=1)
    drive = Drive(limits_of(), depth=1, pace=pace, clock=lambda: 0.0)
    requests = [request_of(0, BATCH), request_of(1, 0, num_prompt=1, max_tokens=3)]
    for request in requests:
        drive.add(request)
    assert ids_in(drive) == [1] and drive.scheduler.num_running == 2
    assert_all_got_their_tokens(drive, requests)


@st.composite
def mixed_requests(draw: st.DrawFn) -> list[tuple[float, Request]]:
    """When each comes, in seconds, and the request."""
    found = []
    for number in range(draw(st.integers(2, 12))):
        arrival_s = draw(st.sampled_from([0.0, 0.0, 2e-3, 9e-3, 30e-3]))
        request = request_of(
            number,
            draw(st.sampled_from([0, 0, 3, BATCH, BATCH, BATCH])),
            num_prompt=draw(st.integers(1, 90)),
            max_tokens=draw(st.integers(1, 30)),
            arrival_s=arrival_s,
        )
        found.append((arrival_s, request))
    return sorted(found, key=lambda one: one[0])


@settings(max_examples=num_examples(14), deadline=None)
@given(mixed_requests(), st.sampled_from([1.15e-3, 1.5e-3]), st.sampled_from([None, 6e-3]), st.integers(0, 1))
def test_no_iteration_with_tokens_of_both_classes_takes_longer_than_the_bounds(
    requests: list[tuple[float, Request]], itl_s: float, ttft_s: float | None, depth: int
) -> None:
    """On a clock on which iterations take what is predicted."""
    now_s, of_id = [0.0], {request.request_id: request for _, request in requests}
    pace = Pace(max_itl_s=itl_s, max_ttft_s=ttft_s, iteration_time=TIME, min_prompt_tokens=4)
    drive = Drive(limits_of(rows=6, num_pages=60, budget=64), depth=depth, pace=pace, clock=lambda: now_s[0])
    coming, served_s = list(requests), 0.0
    while coming or drive.scheduler.has_unfinished or drive.in_flight:
        while coming and coming[0][0] <= now_s[0]:
            drive.add(coming.pop(0)[1])
        is_there = sum(drive.scheduler.num_background) > 0
        batch = drive.step()
        drive.scheduler.check_integrity()
        if batch is None:
            now_s[0] += 1e-3
            continue
        classes = [of_id[drive.executor.tenants[row].joined.seed].is_background for row in batch.rows.tolist()]
        counts = np.diff(batch.query_start)
        num_background = int(counts[np.array(classes)].sum())
        time_s = TIME.predict_s(batch.shape)
        has_decodes = not all(classes[: batch.num_decodes])
        if num_background and not (num_background <= 64 and now_s[0] > served_s + 1.0):
            assert not has_decodes or time_s <= itl_s * (1 + 1e-9)
            assert ttft_s is None or time_s <= ttft_s / 3 * (1 + 1e-9)
        if num_background or not is_there:
            served_s = now_s[0]
        now_s[0] += time_s
        assert now_s[0] < 60, "no end in sight"
    for _, request in requests:
        assert drive.answers[request.request_id] == answer_alone(request, drive.executor.limits)
    assert drive.scheduler.fullest_pool.num_in_use == drive.scheduler.num_running == 0
