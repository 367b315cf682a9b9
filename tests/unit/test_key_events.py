"""The events of the prefix cache: applied from the start, they give exactly the keys that it can find."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nanoflow.batch import SampledTokens
from nanoflow.kvcache.events import DEVICE, KeyEvent, PagesRemoved, PagesStored
from nanoflow.kvcache.keys import page_keys, root_key, split
from nanoflow.kvcache.sizes import PoolSize
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import Scheduler, SchedulerLimits
from tests.unit.fake_executor import Drive
from tests.unit.test_scheduler_properties import Scenario, scenarios

PAGE = 4
LIMITS = SchedulerLimits(
    max_batch_tokens=64, max_num_seqs=8, max_model_len=64, num_pages=16, page_size=PAGE, vocab_size=200, max_sessions=2
)
SALTS = (root_key("salt"), root_key("other"))


@dataclass(kw_only=True)
class Router:
    """What a router knows of the cache that has heard every event, each of which must make sense by itself."""

    page_size: int = PAGE
    parents: dict[bytes, bytes | None] = field(default_factory=dict)
    events: list[KeyEvent] = field(default_factory=list)

    def take(self, event: KeyEvent) -> None:
        self.events.append(event)
        if isinstance(event, PagesStored):
            assert len(event.token_ids) == len(event.keys) * self.page_size and event.medium == DEVICE
            before = root_key() if event.before is None else event.before
            assert page_keys(event.token_ids, self.page_size, before) == list(event.keys)
            for key, parent in zip(event.keys, (event.before, *event.keys), strict=False):
                assert key not in self.parents, "stored twice"
                self.parents[key] = parent
        elif isinstance(event, PagesRemoved):
            for key in event.keys:
                del self.parents[key]

    def check(self, scheduler: Scheduler) -> None:
        assert set(self.parents) == set(scheduler.pools[0].cached_keys)


def request(number: int, prompt: list[int], *, salt: str | None = None, session: str | None = None) -> Request:
    root = root_key(salt)
    return Request(
        request_id=number,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=6, ignore_eos=True),
        seed=0,
        max_tokens=6,
        page_keys=b"".join((root, *page_keys(prompt, PAGE, root))),
        session=session,
    )


def run(scheduler: Scheduler, *requests: Request) -> None:
    for one in requests:
        scheduler.add(one)
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.commit(batch, SampledTokens(token_ids=np.full(len(batch.sampled), 7, np.int32)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(scenarios(), st.lists(st.integers(0, 60), max_size=3), st.lists(st.integers(0, 60), max_size=3))
def test_all_events_give_the_keys_that_the_cache_has(scenario: Scenario, resets: list[int], failing: list[int]) -> None:
    router = Router(page_size=scenario.limits.page_size)
    drive = Drive(scenario.limits, depth=scenario.depth, put_key_event=router.take)
    for step in range(90):
        for arrival, request in scenario.arrivals:
            if arrival == step:
                drive.add(request)
        for abort, request_id in scenario.aborts:
            if abort == step:
                drive.scheduler.abort(request_id)
        if step in resets:
            drive.scheduler.reset_prefix_cache()
        if step in failing and drive.in_flight:
            batch, result = drive.in_flight.popleft()
            drive.in_flight.appendleft((batch, replace(result, errors={0: "not finite"} if len(batch.sampled) else {})))
        is_idle = drive.step() is None and not drive.in_flight
        router.check(drive.scheduler)
        if is_idle and step > 60:
            break
    event(f"evicted: {drive.scheduler.pools[0].num_evicted > 0}")
    event(f"removed: {any(isinstance(one, PagesRemoved) for one in router.events)}")
    event(f"groups: {len(scenario.limits.pools)}")


def test_a_prefix_that_all_events_name_is_found() -> None:
    """With one group the router's knowledge is enough: a chain of keys from the start is what a request finds."""
    router = Router()
    scheduler = Scheduler(limits=LIMITS, put_key_event=router.take)
    run(scheduler, request(0, list(range(30))), request(1, [*range(20), *range(50, 60)]))
    router.check(scheduler)
    keys = page_keys([*range(20), *range(50, 60)], PAGE, root_key())
    assert len(keys) == 7 and scheduler.prefetch(keys).num_cached_pages == 7
    assert router.parents[keys[0]] is None
    assert all(router.parents[key] == parent for parent, key in itertools.pairwise(keys))


def test_pages_that_another_request_stored_are_not_told_again() -> None:
    router = Router()
    scheduler = Scheduler(limits=LIMITS, put_key_event=router.take)
    run(scheduler, request(0, list(range(16))))
    router.events.clear()
    run(scheduler, request(1, [*range(16), *range(40, 48)]))
    told = [one for one in router.events if isinstance(one, PagesStored)]
    assert [len(one.keys) for one in told] == [2, 1], "two new pages of the prompt, then one of the completion"
    assert told[0].token_ids.tolist() == list(range(40, 48))
    assert told[0].before == page_keys(list(range(16)), PAGE, root_key())[-1]
    assert told[1].token_ids.tolist() == [7] * PAGE and told[1].before == told[0].keys[-1]


def test_the_first_page_of_a_salted_request_follows_its_salt() -> None:
    router = Router()
    run(Scheduler(limits=LIMITS, put_key_event=router.take), request(0, list(range(8)), salt="salt"))
    (stored, *_) = (one for one in router.events if isinstance(one, PagesStored))
    assert stored.before == SALTS[0] and not {*SALTS, root_key()} & set(router.parents)


def test_the_first_group_decides() -> None:
    """Its pages behind the window go, and so do their keys when their memory is taken."""
    pools = (PoolSize(num_pages=10, window=8), PoolSize(num_pages=24))
    limits = replace(LIMITS, group_pools=pools, num_pages=24, max_batch_tokens=8)
    router = Router()
    scheduler = Scheduler(limits=limits, put_key_event=router.take)
    for number in range(4):
        run(scheduler, request(number, [number, *range(30)]))
        router.check(scheduler)
    assert len(router.parents) <= 10 < len(scheduler.pools[1].cached_keys)
    assert scheduler.pools[0].num_evicted > 0


def test_nothing_is_noted_when_nobody_listens() -> None:
    scheduler = Scheduler(limits=LIMITS)
    run(scheduler, request(0, list(range(30))))
    assert len(scheduler.pools[0].cached_keys) == 8


def test_advice_saves_the_pages_of_a_prefix_from_being_taken_first() -> None:
    for is_advised in (False, True):
        scheduler = Scheduler(limits=LIMITS)
        run(scheduler, request(0, list(range(23))))
        run(scheduler, request(1, list(range(100, 123))))
        counts = scheduler.reuse_counts
        keys = page_keys(list(range(23)), PAGE, root_key())
        if is_advised:
            assert scheduler.prefetch(keys).num_cached_pages == len(keys) == 5
            assert scheduler.prefetch(keys).num_prefetched_pages == 0
        assert scheduler.reuse_counts == counts and scheduler.fullest_pool.num_in_use == 0
        run(scheduler, request(2, list(range(60, 83))))
        assert scheduler.prefetch(keys).num_cached_pages == (5 if is_advised else 2)
        scheduler.check_integrity()


def test_of_a_prefix_that_was_named_the_last_pages_go_first() -> None:
    scheduler = Scheduler(limits=LIMITS)
    run(scheduler, request(0, list(range(23))))
    keys = page_keys(list(range(23)), PAGE, root_key())
    assert scheduler.prefetch(keys).num_cached_pages == 5
    run(scheduler, request(1, list(range(100, 146))))
    assert len(keys) > scheduler.prefetch(keys).num_cached_pages > 0


def test_advice_for_pages_that_a_request_holds_leaves_them_held() -> None:
    scheduler = Scheduler(limits=LIMITS)
    scheduler.add(request(0, list(range(23))))
    assert scheduler.schedule() is not None
    in_use = scheduler.fullest_pool.num_in_use
    assert scheduler.prefetch(page_keys(list(range(40)), PAGE, root_key())).num_cached_pages == 5
    assert scheduler.fullest_pool.num_in_use == in_use
    scheduler.check_integrity()


def test_a_session_is_its_last_request() -> None:
    scheduler = Scheduler(limits=LIMITS)
    run(scheduler, request(0, list(range(8)), session="a"))
    run(scheduler, request(1, [*range(8), 7, 7, 7, 7, 9], session="a"), request(2, list(range(9)), salt="salt"))
    session = scheduler.session("a")
    assert session is not None and session.num_tokens == 19
    tokens = [*range(8), 7, 7, 7, 7, 9, 7, 7, 7, 7, 7]
    assert list(session.keys) == page_keys(tokens, PAGE, root_key()) and len(session.keys) == 4
    assert session.page_keys == b"".join(split(session.page_keys))


def test_the_session_used_longest_ago_is_forgotten() -> None:
    scheduler = Scheduler(limits=LIMITS)
    run(scheduler, request(0, list(range(8)), session="a"))
    run(scheduler, request(1, list(range(9)), session="b"))
    assert scheduler.session("a") is not None, "and so it is used"
    run(scheduler, request(2, list(range(10)), session="c"))
    assert [scheduler.session(name) is not None for name in "abc"] == [True, False, True]
    none = Scheduler(limits=replace(LIMITS, max_sessions=0))
    run(none, request(0, list(range(8)), session="a"))
    assert none.session("a") is None


def test_a_failed_request_leaves_its_session_as_it_was() -> None:
    scheduler = Scheduler(limits=LIMITS)
    run(scheduler, request(0, list(range(8)), session="a"))
    before = scheduler.session("a")
    scheduler.add(request(1, list(range(12)), session="a"))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.commit(batch, SampledTokens(token_ids=np.zeros(1, np.int32), errors={0: "not finite"}))
    assert scheduler.session("a") == before
