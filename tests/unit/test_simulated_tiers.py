"""Host memory and disk in simulated runs: when copies end, what batches wait for, and what conversations find again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.batch import NewPages
from nanoflow.conversations import Conversation, Turn
from nanoflow.graph.operation import BatchShape
from nanoflow.kvcache.copies import PageCopies
from nanoflow.profile.host_link import LinkRates
from nanoflow.profile.table import Cost
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.policies import Policies
from nanoflow.scheduler.tiers import NoTiers
from nanoflow.simulate.arrivals import Independent
from nanoflow.simulate.compare import choices
from nanoflow.simulate.disk import DiskRates, SimulatedDisk
from nanoflow.simulate.link import BelowDevice, SimulatedCopies
from nanoflow.simulate.replica import SimulatedEngine, Times
from nanoflow.simulate.serving import Cluster, simulate, simulate_arrivals
from nanoflow.simulate.talking import SimulatedTalk, Talking, simulate_conversations
from nanoflow.workload import Lengths

STEP_S = 0.01
PAGE_BYTES = 1000
RATES = LinkRates(link_bytes_per_s=1e6, memory_bytes_per_s=1e7)
FAST = LinkRates(link_bytes_per_s=1e9, memory_bytes_per_s=1e12)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Asking(NoTiers):
    """Wants what it was told to want."""

    is_loading = True

    def __init__(self) -> None:
        self.wanted: list[PageCopies] = []
        self.done: list[tuple[int, float]] = []

    def take_copies(self) -> Sequence[PageCopies]:
        taken, self.wanted = self.wanted, []
        return taken

    def note_copied(self, number: int, time_s: float) -> None:
        self.done.append((number, time_s))


class Constant:
    def cost(self, shape: BatchShape) -> Cost:
        return Cost(time_s=STEP_S, energy_j=2.0)


def copies(number: int, pages: Sequence[int], *, is_load: bool = False) -> PageCopies:
    found = np.array(pages, dtype=np.int32)
    return PageCopies(number=number, is_load=is_load, pages=(found,), slots=(found,))


def link(rates: LinkRates = RATES) -> tuple[SimulatedCopies, Asking, Clock]:
    clock = Clock()
    below = BelowDevice(host_bytes=100 * PAGE_BYTES, page_bytes=(PAGE_BYTES,), rates=rates)
    made, tiers = SimulatedCopies(below, 4, clock), Asking()
    made._tiers = tiers
    return made, tiers, clock


def new_pages(*pages: int) -> NewPages:
    found = np.array(pages, dtype=np.int32)
    return NewPages(rows=np.zeros_like(found), columns=np.arange(len(found), dtype=np.int32), pages=found)


def below(*, host: int = 0, disk: int = 0, rates: LinkRates = FAST, disk_bytes_per_s: float = 1e9) -> BelowDevice:
    """So many pages in host memory and on disk."""
    return BelowDevice(
        host_bytes=host * PAGE_BYTES,
        page_bytes=(PAGE_BYTES,),
        page_size=4,
        rates=rates,
        disk=DiskRates(capacity_bytes=disk * PAGE_BYTES, bytes_per_s=disk_bytes_per_s) if disk else None,
    )


def limits(**changes: Any) -> SchedulerLimits:
    sizes = {"max_batch_tokens": 64, "max_num_seqs": 8, "max_model_len": 128, "num_pages": 40, "page_size": 4}
    return SchedulerLimits(**{**sizes, "vocab_size": 100, **changes})


def cluster(memory: BelowDevice, policies: Policies | None = None, **changes: Any) -> Cluster:
    asked = {name: changes.pop(name) for name in ("max_tokens", "num_replicas") if name in changes}
    return Cluster(
        limits=limits(**changes),
        iterations=Constant(),
        below=memory,
        policies=policies,
        **{"num_replicas": 1, **asked},
    )


def talk(number: int, *turns: tuple[int, int, float], start_s: float = 0.0) -> Conversation:
    """Rounds of so many new tokens, so many of the completion, after so long; its tokens are its own."""
    return Conversation(
        start_s=start_s,
        is_agent=False,
        system_token_ids=[],
        turns=tuple(
            Turn(new_token_ids=[2 + number] * new, num_output_tokens=output, think_s=think_s)
            for new, output, think_s in turns
        ),
    )


def hold(conversations: Sequence[Conversation], asked: Cluster, most: int | None = None) -> SimulatedTalk:
    return simulate_conversations(asked, conversations, max_concurrency=most)


def test_copies_begin_behind_the_batches_and_follow_each_other_in_each_direction() -> None:
    made, tiers, clock = link()
    clock.now_s = 1.0
    tiers.wanted = [copies(0, [1, 2, 3])]
    made.issue(behind_s=1.5)
    tiers.wanted = [copies(1, [4]), copies(2, [5, 6], is_load=True)]
    made.issue(behind_s=1.0)
    # 1.503: the first save. 1.504: the second. 1.506: the load, which waits for both.
    for now_s, expected in ((1.5029, []), (1.5031, [0]), (1.5041, [0, 1]), (1.5059, [0, 1]), (1.5061, [0, 1, 2])):
        clock.now_s = now_s
        made.collect()
        assert [number for number, _ in tiers.done] == expected
    assert [time_s for _, time_s in tiers.done] == pytest.approx([0.003, 0.001, 0.002]), "without what they waited for"
    assert made.num_loads == 1
    assert made.slowdown_s() == pytest.approx(6 * PAGE_BYTES / 1e7) and made.slowdown_s() == 0.0


def test_saves_do_not_wait_for_loads() -> None:
    made, tiers, clock = link()
    tiers.wanted = [copies(0, [1] * 50, is_load=True), copies(1, [2])]
    made.issue(behind_s=0.0)
    clock.now_s = 0.002
    made.collect()
    assert [number for number, _ in tiers.done] == [1]


def test_a_batch_waits_for_saves_of_the_pages_that_it_writes_and_for_no_others() -> None:
    made, tiers, clock = link()
    tiers.wanted = [copies(0, [1, 2, 3]), copies(1, [4])]
    made.issue(behind_s=0.0)
    assert made.writable_s(new_pages(9)) == 0.0
    assert made.writable_s(new_pages(9, 2)) == pytest.approx(0.003)
    assert made.writable_s(new_pages(4, 2)) == pytest.approx(0.004)
    clock.now_s = 0.0035
    assert made.writable_s(new_pages(2)) == 0.0 and made.writable_s(new_pages(4)) == pytest.approx(0.004)


def test_a_step_waits_for_what_ends_first_but_not_for_long() -> None:
    made, tiers, _ = link()
    with pytest.raises(RuntimeError, match="nothing is being"):
        made.wait_s()
    tiers.wanted = [copies(0, [1] * 20, is_load=True)]
    made.issue(behind_s=0.0)
    assert made.wait_s() == pytest.approx(0.02)
    tiers.wanted = [copies(1, [1] * 900, is_load=True)]
    made._pending.clear()
    made.issue(behind_s=0.0)
    assert made.wait_s() == pytest.approx(0.05)


def test_a_disk_reads_beside_writes_and_forgets_what_was_used_longest_ago() -> None:
    clock = Clock()
    disk = SimulatedDisk(DiskRates(capacity_bytes=2 * PAGE_BYTES, bytes_per_s=1e6), [PAGE_BYTES], clock)
    data = np.empty(0, dtype=np.uint8)
    a, b, c = (bytes([place]) * 32 for place in range(3))
    writes = [disk.write(0, key, data) for key in (a, b)]
    assert not disk.contains(0, a), "not before it is written"
    assert disk.next_end_s == pytest.approx(0.001)
    clock.now_s = 0.0015
    disk.advance()
    assert [write.done() for write in writes] == [True, False] and disk.contains(0, a)
    read, none = disk.read(0, a, data), disk.read(0, c, data)
    clock.now_s = 0.0026
    disk.advance()
    assert read.result() and not none.done(), "reads do not wait for writes, but for each other"
    disk.write(0, c, data)
    clock.now_s = 0.01
    disk.advance()
    assert not none.result() and disk.next_end_s is None
    # a was read after b was written.
    assert [disk.contains(0, key) for key in (a, b, c)] == [True, False, True]
    counts = disk.counts
    assert (counts.num_written, counts.num_hits, counts.num_misses, counts.num_evicted) == (3, 1, 1, 1)
    assert counts.bytes_read == PAGE_BYTES and counts.stored_bytes == 2 * PAGE_BYTES
    assert (counts.write_s, counts.read_s) == pytest.approx((0.003, 0.002))
    disk.forget([a])
    assert not disk.contains(0, a) and disk.counts.stored_bytes == PAGE_BYTES
    disk.forget_all()
    assert disk.counts.num_pages == disk.counts.stored_bytes == 0


def test_a_page_larger_than_the_disk_is_refused() -> None:
    clock = Clock()
    disk = SimulatedDisk(DiskRates(capacity_bytes=PAGE_BYTES - 1, bytes_per_s=1e6), [PAGE_BYTES], clock)
    write = disk.write(0, b"k" * 32, np.empty(0, dtype=np.uint8))
    clock.now_s = 1.0
    disk.advance()
    assert write.result() is False and disk.counts.num_written == 0


def test_a_round_finds_the_pages_of_the_one_before() -> None:
    """16 tokens and 9 of the completion, the last of which is not computed: 24 tokens are six pages."""
    found = hold([talk(0, (16, 9, 0.0), (5, 2, 1.0))], cluster(below())).metrics
    first, second = found.by_round
    assert (first.prompt.num_asked, first.prompt.num_computed) == (16, 16)
    assert (second.prompt.num_asked, second.prompt.num_repeated, second.prompt.num_cached) == (30, 25, 24)
    assert found.prompt.num_asked == 46 and found.num_output_tokens == 11
    assert found.duration_s == pytest.approx(9 * STEP_S + 1.0 + 2 * STEP_S)


def flood(start_s: float) -> list[Conversation]:
    """Others that need all pages of the device."""
    return [talk(1 + place, (64, 2, 0.0), start_s=start_s) for place in range(6)]


def test_what_the_device_had_to_forget_is_loaded_from_host_memory() -> None:
    rounds = [talk(0, (64, 2, 0.0), (8, 2, 2.0)), *flood(0.5)]
    without, small, ample = (hold(rounds, cluster(below(host=host))) for host in (0, 8, 400))
    later = [each.metrics.by_round[1].prompt.num_cached for each in (without, small, ample)]
    assert later == [0, 0, 64]
    assert [each.run.num_loads for each in (without, small, ample)] == [0, 0, 1]
    host = ample.run.tiers["host"]
    assert (host.queries, host.hits, host.loaded_bytes) == (64, 64, 16 * PAGE_BYTES)
    # All pages of the first rounds, once; the run ends before those of the last batch are saved.
    assert host.stored_bytes == 7 * 16 * PAGE_BYTES
    assert set(without.run.tiers) == {"device"} and small.run.tiers["host"].evictions > 0


def test_a_load_that_finds_no_room_waits_until_a_running_request_leaves_it() -> None:
    """To compute the prefix again would need the same pages.

    Seven requests have all pages that they will ever need, 21 of 40. The second round's 19 fit beside them, but a load
    leaves a page free for each that runs.
    """
    others = [talk(10 + place, (9, 3, 0.0), start_s=1.0) for place in range(7)]
    found = hold([talk(0, (64, 2, 0.0), (8, 2, 0.985)), *flood(0.5), *others], cluster(below(host=400)))
    assert found.metrics.by_round[1].prompt.num_cached == 64 and found.run.num_loads == 1


def test_a_load_takes_its_time_on_the_link_and_slows_down_no_first_round() -> None:
    rounds = [talk(0, (64, 2, 0.0), (8, 2, 2.0)), *flood(0.5)]
    slow = LinkRates(link_bytes_per_s=1e6, memory_bytes_per_s=1e12)
    fast_s, slow_s = (
        hold(rounds, cluster(below(host=400, rates=rates))).metrics.by_round[1].ttft_s for rates in (FAST, slow)
    )
    assert fast_s is not None and slow_s is not None
    assert slow_s.mean - fast_s.mean == pytest.approx(16 * PAGE_BYTES / 1e6, rel=0.01)


def test_copies_lengthen_the_batches_beside_them() -> None:
    """5 pages are saved while the second of two batches runs, and take 1 ms of memory's time each."""
    rates = LinkRates(link_bytes_per_s=1e9, memory_bytes_per_s=1e6)
    lengths = [Lengths(num_prompt_tokens=20, num_output_tokens=3)]
    alone, beside = (
        simulate(cluster(memory), lengths, [0.0]).metrics for memory in (below(), below(host=50, rates=rates))
    )
    assert alone.duration_s == pytest.approx(3 * STEP_S)
    assert beside.duration_s - alone.duration_s == pytest.approx(5 * PAGE_BYTES / 1e6)


def test_what_host_memory_had_to_forget_is_read_from_the_disk() -> None:
    rounds = [talk(0, (64, 2, 0.0), (8, 2, 2.0)), *flood(0.5)]
    found = hold(rounds, cluster(below(host=40, disk=400))).run
    disk = found.tiers["disk"]
    assert found.num_loads == 1 and disk.hits > 0 and disk.loaded_bytes == disk.hits // 4 * PAGE_BYTES
    assert found.tiers["host"].hits == 64
    slow = hold(rounds, cluster(below(host=40, disk=400, disk_bytes_per_s=1e5))).metrics.by_round[1].ttft_s
    fast = hold(rounds, cluster(below(host=40, disk=400))).metrics.by_round[1].ttft_s
    assert slow is not None and fast is not None
    assert slow.mean - fast.mean == pytest.approx(disk.loaded_bytes / 1e5, rel=0.1)


def test_an_idle_engine_writes_to_disk_what_it_has() -> None:
    """One short request, then nothing for a second: its 4 pages are on disk though host memory is nearly empty."""
    rounds = [talk(0, (16, 1, 0.0), (1, 1, 1.0))]
    assert hold(rounds, cluster(below(host=400, disk=400))).run.tiers["disk"].stored_bytes == 4 * PAGE_BYTES
    soon = [talk(0, (16, 1, 0.0), (1, 1, 0.0))]
    assert hold(soon, cluster(below(host=400, disk=400))).run.tiers["disk"].stored_bytes == 0


def test_rounds_are_asked_after_thinking_and_conversations_when_there_is_room() -> None:
    talking = Talking([talk(0, (3, 2, 0.0), (4, 1, 5.0)), talk(1, (2, 1, 0.0), start_s=1.0), talk(2, (2, 1, 0.0))], 1)
    assert talking.num_requests == 4 and talking.next_s == 0.0
    first = talking.take()
    assert (first.request_id, first.prompt_token_ids, first.num_output_tokens) == (0, [2, 2, 2], 2)
    assert talking.next_s is None
    talking.finish(0, 10.0)
    assert talking.next_s == 15.0
    second = talking.take()
    assert (second.request_id, second.prompt_token_ids) == (1, [2, 2, 2, 0, 1, 2, 2, 2, 2])
    assert (second.arrival_s, second.thread, second.root == first.root) == (15.0, 0, True)
    talking.finish(1, 16.0)
    assert talking.next_s == 16.0 and talking.take().request_id == 2
    talking.finish(2, 16.5)
    assert talking.take().request_id == 3 and talking.next_s is None


def test_a_conversation_stays_with_its_replica() -> None:
    rounds = [talk(place, (16, 2, 0.0), (4, 2, 1.0), (4, 2, 1.0)) for place in range(6)]
    found = hold(rounds, cluster(below(), num_replicas=3)).metrics
    assert [each.prompt.num_cached for each in found.by_round] == [0, 6 * 16, 6 * 20]
    assert found.num_conversations == 6 and found.num_completed == 18


def test_a_conversation_stays_with_a_replica_that_has_more_to_do() -> None:
    """When the second round comes, the replica of the first one has just got a long request."""
    rounds = [talk(0, (16, 2, 0.0), (4, 2, 1.0)), talk(1, (64, 60, 0.0), start_s=0.9)]
    assert hold(rounds, cluster(below(), num_replicas=2)).metrics.by_round[1].prompt.num_cached == 16


def test_a_batch_starts_late_where_its_pages_are_still_being_saved() -> None:
    """Two requests one after the other, each needs all pages of the device; a save of 15 pages takes 0.15 s."""
    lengths = [Lengths(num_prompt_tokens=60, num_output_tokens=4)] * 2
    slow = LinkRates(link_bytes_per_s=1e5, memory_bytes_per_s=1e12)
    fast_s, slow_s = (
        simulate(
            cluster(below(host=200, rates=rates), num_pages=16, max_model_len=64), lengths, [0.0, 0.0]
        ).metrics.duration_s
        for rates in (FAST, slow)
    )
    assert 0.1 < slow_s - fast_s < 0.16


@pytest.mark.parametrize("start_s", [2.02, 2.03], ids=["with it", "after it"])
def test_others_overtake_a_round_that_is_being_loaded_unless_all_go_in_order(start_s: float) -> None:
    rates = LinkRates(link_bytes_per_s=2e5, memory_bytes_per_s=math.inf)
    rounds = [talk(0, (64, 2, 0.0), (8, 2, 2.0)), *flood(0.5), talk(9, (8, 1, 0.0), start_s=start_s)]
    first_s = {}
    for queue in ("overtake", "in order"):
        policies = next(each for each in choices() if each.queue == queue).policies
        found = simulate_arrivals(cluster(below(host=400, rates=rates), policies), Talking(rounds))
        *_, second, other = sorted(found.records, key=lambda each: (each.arrival_s, -each.num_prompt_tokens))
        assert second.arrival_s == 2.02 and found.run.num_loads == 1 and other.first_token_s is not None
        first_s[queue] = other.first_token_s - other.arrival_s
    # The load of 16 pages takes 80 ms.
    assert first_s["overtake"] < 0.065 and first_s["in order"] > 0.075


def test_the_scheduler_does_not_know_when_requests_end_and_all_get_their_tokens() -> None:
    """20 requests that allow 60 tokens and get 10: with all that they allow reserved, few run at once."""
    lengths, at_once = [Lengths(num_prompt_tokens=8, num_output_tokens=10)] * 20, [0.0] * 20
    runs = {
        choice.admission: simulate(cluster(below(), choice.policies, max_tokens=60), lengths, at_once)
        for choice in choices()
        if choice.queue == "overtake" and choice.returns == "swap"
    }
    for run in runs.values():
        assert run.metrics.num_output_tokens == 200 and run.metrics.num_short == 0
    assert runs["reserved"].peak_requests == 2 < runs["predicted"].peak_requests < runs["now"].peak_requests == 8
    known = simulate(cluster(below()), lengths, at_once)
    assert known.peak_requests == 8, "18 tokens are 5 pages, and there are 40"


def test_a_request_that_was_sent_back_gets_its_pages_by_a_load_or_computes_again() -> None:
    lengths, at_once = [Lengths(num_prompt_tokens=24, num_output_tokens=60)] * 8, [0.0] * 8
    wanted = [each for each in choices() if each.admission == "now" and each.queue == "overtake"]
    for choice in wanted:
        run = simulate(cluster(below(host=400), choice.policies, max_tokens=60), lengths, at_once)
        assert run.num_preemptions > 0 and run.metrics.num_output_tokens == 8 * 60
        assert (run.num_loads > 0) == (choice.returns == "swap")


def test_nobody_joins_an_empty_engine_whose_pages_are_reserved_for_a_load() -> None:
    """A round of 72 tokens is being loaded into 16 of 20 pages when a request comes that needs 18 of them at once."""
    rates = LinkRates(link_bytes_per_s=2e5, memory_bytes_per_s=math.inf)
    rounds = [
        talk(0, (64, 2, 0.0), (4, 2, 2.0)),
        talk(1, (70, 2, 0.0), start_s=1.0),
        talk(2, (70, 2, 0.0), start_s=2.03),
    ]
    asked = cluster(below(host=400, rates=rates), num_pages=20, max_model_len=80, max_batch_tokens=128)
    found = hold(rounds, asked)
    assert found.run.num_loads == 1 and found.metrics.num_completed == 4


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[int, int, float]], BelowDevice, Policies, int | None, dict[str, int]]:
    """Requests, memory below, policies, whether lengths are known, and sizes."""
    requests = draw(
        st.lists(
            st.tuples(st.integers(1, 60), st.integers(1, 40), st.floats(0.0, 0.5, allow_nan=False)),
            min_size=1,
            max_size=10,
        )
    )
    memory = below(
        host=draw(st.sampled_from([0, 3, 20, 200])),
        disk=draw(st.sampled_from([0, 10, 200])),
        rates=draw(st.sampled_from([FAST, RATES])),
        disk_bytes_per_s=draw(st.sampled_from([1e5, 1e9])),
    )
    policies = draw(st.sampled_from(list(choices()))).policies
    sizes = {"max_num_seqs": draw(st.integers(1, 8)), "max_batch_tokens": draw(st.sampled_from([8, 64]))}
    return requests, memory, policies, draw(st.sampled_from([None, 60])), sizes


@settings(max_examples=30, deadline=None)
@given(cases())
def test_every_request_gets_its_tokens_whatever_is_below_and_whoever_is_sent_back(case: Any) -> None:
    requests, memory, policies, max_tokens, sizes = case
    lengths = [Lengths(num_prompt_tokens=prompt, num_output_tokens=output) for prompt, output, _ in requests]
    arrivals_s = sorted(arrival_s for *_, arrival_s in requests)
    asked = cluster(memory, policies, max_tokens=max_tokens, num_pages=32, **sizes)
    has_keys = memory.num_slots > 0
    found = simulate_arrivals(asked, Independent(lengths, arrivals_s, has_keys=has_keys))
    assert [each.num_output_tokens for each in found.records] == [each.num_output_tokens for each in lengths]
    assert all(each.arrival_s < each.first_token_s <= each.finished_s for each in found.records)  # type: ignore[operator]
    stored = found.run.tiers["host"] if memory.num_slots else None
    assert stored is None or stored.hits <= stored.queries


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=8), st.sampled_from([0, 6, 300])
)
def test_invariants_hold_after_every_step(sizes: list[tuple[int, int]], host: int) -> None:
    times = Times.of(len(sizes))
    engine = SimulatedEngine(
        limits(num_pages=32),
        Pace(),
        Constant(),
        times,
        below=below(host=host, disk=20 if host else 0),
        policies=None,
    )
    source = Independent(
        [Lengths(num_prompt_tokens=prompt, num_output_tokens=output) for prompt, output in sizes],
        [0.0] * len(sizes),
        has_keys=True,
    )
    while source.next_s is not None:
        engine.add(source.take())
    before_s = 0.0
    while engine.is_busy:
        engine.step()
        engine.scheduler.check_integrity()
        assert engine.now_s >= before_s
        before_s = engine.now_s
    assert engine.num_outstanding_tokens == 0 and not np.isnan(times.finished_s).any()


def test_counts_of_replicas_are_added_up() -> None:
    lengths = [Lengths(num_prompt_tokens=20, num_output_tokens=3)] * 4
    run = simulate(cluster(below(host=50), num_replicas=2), lengths, [0.0] * 4)
    assert run.tiers["host"].capacity_bytes == 2 * 50 * PAGE_BYTES
    assert run.tiers["host"].stored_bytes == 4 * 5 * PAGE_BYTES
    assert dataclasses.asdict(run)["tiers"]["device"]["capacity_bytes"] == 2 * 40 * PAGE_BYTES
