"""Policies of the scheduler: what each decides, and how runs with each are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler.lengths import OutputLength
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.policies import (
    Policies,
    expect_held,
    expect_learnt,
    expect_most,
    expect_next,
    loads_for_new,
    longest_remaining,
    newest,
    up_to_first_load,
)
from nanoflow.scheduler.progress import Progress
from nanoflow.scheduler.reuse import Queueing, loads_for_all, without_loads
from nanoflow.scheduler.rows import RowTable
from nanoflow.scheduler.scheduler import Scheduler
from nanoflow.scheduler.tiers import NOTHING, Below, NoTiers
from nanoflow.scheduler.waiting import WaitingRequest
from nanoflow.simulate.compare import Choice, best, choices, compare, table

LIMITS = SchedulerLimits(
    max_batch_tokens=64, max_num_seqs=4, max_model_len=400, num_pages=200, page_size=4, vocab_size=100
)


def progress(*requests: tuple[int, int, int], is_exact: bool = False) -> Progress:
    """Requests with so many tokens, so many of them generated, and so many to come at most."""
    tokens, generated, most = np.array(requests).T
    return Progress(
        num_tokens=tokens,
        num_generated=generated,
        max_remaining=most,
        is_exact=np.full(len(requests), is_exact),
        is_background=np.zeros(len(requests), np.bool_),
    )


def table_of(*max_tokens: int) -> RowTable:
    """Running requests with a prompt of 4 tokens that may generate so many, the first the oldest."""
    rows = RowTable(LIMITS)
    for number, most in enumerate(max_tokens):
        request = Request(
            request_id=number,
            prompt_token_ids=[1] * 4,
            params=SamplingParams(max_tokens=most, ignore_eos=True),
            seed=0,
            max_tokens=most,
        )
        rows.join([WaitingRequest(request=request, token_ids=np.ones(4, np.int32))], [0])
    return rows


def test_expectations_are_what_is_allowed_what_was_learnt_or_the_next_token() -> None:
    lengths, running = OutputLength(), progress((100, 10, 300), (20, 0, 5), (50, 7, 0))
    assert expect_most(lengths, running).tolist() == [300, 5, 1]
    assert expect_next(lengths, running).tolist() == [1, 1, 1]
    assert expect_learnt(lengths, running).tolist() == lengths.counted_remaining(running).tolist()
    assert 5 < expect_learnt(lengths, running)[0] < 300


def test_what_is_held_is_the_peak_of_requests_that_leave_with_their_prompts() -> None:
    """Against the sum of N exp(-t / m) (s + t) itself, for the mean that the prior has at the start."""
    mean = 256.0
    for prompt in (1, 32, 128, 250, 256, 300, 1000):
        after = np.arange(0, 4000)
        peak = (np.exp(-after / mean) * (prompt + after)).max()
        (counted,) = expect_held(OutputLength(), progress((prompt, 0, 10_000))).tolist()
        assert prompt + counted == pytest.approx(max(peak, prompt + 1), rel=0.02)


def test_preemptions_raise_what_counts_and_exact_lengths_are_known() -> None:
    lengths, running = OutputLength(), progress((1000, 0, 5000), (10, 0, 5000))
    before = expect_held(lengths, running)
    lengths.observe_preemption()
    assert (expect_held(lengths, running) > before).all()
    assert expect_held(lengths, progress((1000, 0, 77), is_exact=True)).tolist() == [77]
    assert expect_held(lengths, progress((1, 0, 3))).tolist() == [3]
    assert (expect_held(OutputLength(), running) <= OutputLength().counted_remaining(running)).all()


def test_victims_are_the_newest_or_the_one_with_the_longest_rest_but_the_oldest_of_several() -> None:
    lengths = OutputLength()
    rows = table_of(300, 20, 200, 30)
    assert [int(rows.request_id[pick(rows, lengths)]) for pick in (newest, longest_remaining)] == [3, 2]
    alone = table_of(300)
    assert longest_remaining(alone, lengths) == newest(alone, lengths) == int(alone.order[0])


class Full(NoTiers):
    is_on = True

    def find(self, keys: Any, num_cached: int) -> Below:
        return Below(num_pages=len(keys))


def test_who_was_sent_back_computes_again_where_nothing_is_swapped() -> None:
    waiting, back = (SimpleNamespace(is_preempted=is_preempted) for is_preempted in (False, True))
    for each in (waiting, back):
        assert loads_for_all(Full(), each, [b"k"] * 3, 0).num_pages == 3  # type: ignore[arg-type]
    assert loads_for_new(Full(), waiting, [b"k"] * 3, 0).num_pages == 3  # type: ignore[arg-type]
    assert loads_for_new(Full(), back, [b"k"] * 3, 0) is NOTHING  # type: ignore[arg-type]


def test_others_overtake_those_that_are_loaded_or_nobody_does() -> None:
    queue: Any = [SimpleNamespace(place=place, num_loadable=number) for place, number in enumerate((0, 0, 5, 0, 5))]
    assert [each.place for each in without_loads(queue)] == [0, 1, 3]  # type: ignore[attr-defined]
    assert up_to_first_load(queue) == queue[:2]
    assert Choice(queue="in order").policies.queueing.most_passed == 0


def test_more_are_let_in_where_those_who_are_sent_back_are_loaded_again() -> None:
    without, with_tiers = Scheduler(limits=LIMITS), Scheduler(limits=LIMITS, make_tiers=lambda _: Full())
    assert without._policies == Choice().policies and with_tiers._policies == Choice(admission="held").policies


def test_the_first_choice_is_what_an_engine_without_tiers_does() -> None:
    found = list(choices())
    assert found[0] == Choice() and found[0].policies == Policies()
    assert len(set(found)) == len(found) == 32
    assert (
        len({(id(p.expect), id(p.victim), p.queueing.below, p.queueing.ready) for p in (c.policies for c in found)})
        == 32
    )
    assert Queueing() == Policies().queueing


@dataclass
class Ran:
    """A run that tells these numbers."""

    rate: float = 100.0
    latency_s: float = 0.1
    num_preemptions: int = 0
    num_loads: int = 0
    metrics: Any = field(init=False)

    def __post_init__(self) -> None:
        ttft = SimpleNamespace(p50=1.0, p99=2.0)
        self.metrics = SimpleNamespace(
            total_tokens_per_s=self.rate, ttft_s=ttft, normalized_latency_s=SimpleNamespace(mean=self.latency_s)
        )


@pytest.mark.parametrize(
    ("num_preemptions", "num_loads", "runs_each"),
    [(0, 0, 1), (5, 0, 4), (0, 5, 2), (5, 5, 8)],
    ids=["nothing happens", "some are sent back", "pages are loaded", "both"],
)
def test_a_choice_runs_unless_it_differs_only_in_what_never_happens(
    num_preemptions: int, num_loads: int, runs_each: int
) -> None:
    ran: list[Policies] = []

    def run(policies: Policies) -> Ran:
        ran.append(policies)
        return Ran(num_preemptions=num_preemptions, num_loads=num_loads)

    found = compare(run)
    assert list(found) == list(choices())
    assert len(ran) == 4 * runs_each


def test_twins_have_the_run_of_the_one_that_they_are_like() -> None:
    """With preemptions and no loads the two queues are alike, and nothing else is."""
    found = compare(lambda policies: Ran(num_preemptions=5))
    for choice, ran in found.items():
        twin = Choice(admission=choice.admission, returns=choice.returns, victim=choice.victim)
        assert ran is found[twin]
    assert len({id(ran) for ran in found.values()}) == 16


def test_the_fastest_wins_and_of_equals_the_one_with_the_lowest_latency_then_the_first() -> None:
    a, b, c = Choice(), Choice(admission="now"), Choice(admission="reserved")
    assert best({a: Ran(100.0), b: Ran(120.0), c: Ran(90.0)}) == b
    assert best({a: Ran(100.0, 0.1), b: Ran(100.5, 0.1), c: Ran(90.0, 0.01)}) == a, "within a percent"
    assert best({a: Ran(100.0, 0.1), b: Ran(99.5, 0.09), c: Ran(98.0, 0.01)}) == b
    lines = table({a: Ran(100.0), b: Ran(120.0, num_preemptions=1234), c: Ran(90.0)})
    assert [line[0] for line in lines] == [" ", " ", "*", " "]
    assert "1.200" in lines[2] and "1,234" in lines[2] and "0.900" in lines[3]
