"""Whatever arrives, however small device, host and disk: every request reads what it would have computed alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nanoflow.kvcache.keys import KEY_BYTES, page_keys, root_key, split
from nanoflow.kvcache.sizes import PoolSize, most_pages
from nanoflow.outputs import FinishReason
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import SchedulerLimits, lower_tiers
from nanoflow.scheduler.drafts import Drafter
from nanoflow.scheduler.gain import Gain
from nanoflow.speculation import NgramSpeculation
from tests.all_cases import num_examples
from tests.unit.drafting_executor import repetitive_token
from tests.unit.fake_executor import Answer, answer_alone
from tests.unit.fake_tiers import FakeDisk, TierDrive
from tests.unit.test_scheduler_properties import VOCAB_SIZE, Scenario

_WINDOWS = ((), (), (None, 5), (3, None), (4, 9), (6,))
NGRAM = NgramSpeculation(num_draft_tokens=3, longest_match=2, shortest_match=1)


@pytest.fixture(autouse=True)
def always_pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drafts are taken, and prefixes loaded, wherever there are some."""
    monkeypatch.setattr(Gain, "allows", lambda *_: True)
    monkeypatch.setattr(lower_tiers, "_LEAST_PAGES", 2)
    yield


@dataclass(frozen=True, kw_only=True)
class TierScenario:
    """What happens, and what is below the device.

    Attributes:
        base: Limits, first requests and cancels.
        rounds: Step, earlier request, tokens of the next turn: its conversation goes on.
        resets, prefetches: Steps at which all is forgotten; steps and requests whose prefix is asked for.
        num_slots: Slots of host memory in each group.
        num_disk_pages: Pages of the disk; 0 for none.
        has_drafts: Whether tokens are guessed.
        poison: Chance that a row gets numbers that are not finite, in each batch.
        pace: Chance that a copy ends in a step.
        seed: For what happens by chance.
    """

    base: Scenario
    rounds: list[tuple[int, int, list[int]]]
    resets: list[int]
    prefetches: list[tuple[int, int]]
    num_slots: int
    num_disk_pages: int
    has_drafts: bool
    poison: float
    pace: float
    seed: int


@st.composite
def tight_limits(draw: st.DrawFn) -> SchedulerLimits:
    """Pools that hold two or three requests, with or without windows."""
    page_size, num_pages = draw(st.integers(1, 3)), draw(st.integers(8, 20))
    max_batch_tokens, max_model_len = draw(st.integers(2, 24)), page_size * draw(st.integers(7, num_pages))
    windows: tuple[int | None, ...] = draw(st.sampled_from(_WINDOWS))
    pools = [
        PoolSize(
            num_pages=draw(st.integers(0, 6))
            + most_pages(window, max_model_len, page_size=page_size, max_batch_tokens=max_batch_tokens),
            window=window,
        )
        for window in windows
    ]
    return SchedulerLimits(
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=draw(st.integers(1, 5)),
        max_model_len=max_model_len,
        num_pages=num_pages,
        page_size=page_size,
        vocab_size=VOCAB_SIZE,
        group_pools=tuple(pools),
    )


def draw_request(draw: st.DrawFn, request_id: int, limits: SchedulerLimits) -> Request:
    """Mostly a long beginning that others have too, then some tokens."""
    most = limits.max_model_len - 1
    family, num_common = draw(st.integers(0, 3)), draw(st.integers(0, most))
    prompt = [(place * place + family) % VOCAB_SIZE for place in range(num_common)]
    prompt += draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=0 if prompt else 1, max_size=most - num_common))
    max_tokens = draw(st.integers(1, 20))
    root = root_key(draw(st.sampled_from([None, None, None, "salt"])))
    is_sharing = draw(st.integers(0, 9)) > 0
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        page_keys=b"".join([root, *page_keys(prompt, limits.page_size, root)]) if is_sharing else b"",
        params=SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=draw(st.booleans()),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        ),
        seed=draw(st.integers(0, 2)),
        max_tokens=max_tokens,
        eos_token_ids=draw(st.sampled_from([(), (7,)])),
    )


@st.composite
def tier_scenarios(draw: st.DrawFn) -> TierScenario:
    limits = draw(tight_limits())
    count, steps = draw(st.integers(2, 10)), st.integers(0, 50)
    arrivals = [(draw(steps), draw_request(draw, number, limits)) for number in range(count)]
    aborts = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, count - 1)), max_size=2))
    earlier = st.integers(0, count + 3)
    turns = st.tuples(steps, earlier, st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6))
    return TierScenario(
        base=Scenario(limits=limits, depth=draw(st.integers(0, 2)), arrivals=arrivals, aborts=aborts),
        rounds=draw(st.lists(turns, min_size=2, max_size=10)),
        resets=draw(st.lists(steps, max_size=1)),
        prefetches=draw(st.lists(st.tuples(steps, earlier), max_size=6)),
        num_slots=draw(st.sampled_from([1, 6, 6, 10, 15, 60])),
        num_disk_pages=draw(st.sampled_from([0, 10, 100, 100])),
        has_drafts=draw(st.booleans()),
        poison=draw(st.sampled_from([0.0, 0.0, 0.02])),
        pace=draw(st.sampled_from([0.1, 0.4, 1.0])),
        seed=draw(st.integers(0, 2**32)),
    )


def drive_of(scenario: TierScenario) -> TierDrive:
    limits = scenario.base.limits
    rng = random.Random(scenario.seed)
    return TierDrive(
        limits,
        depth=scenario.base.depth,
        num_slots=scenario.num_slots,
        seed=scenario.seed,
        disk=FakeDisk(rng, scenario.num_disk_pages) if scenario.num_disk_pages else None,
        drafts=Drafter(NGRAM, max_num_seqs=limits.max_num_seqs) if scenario.has_drafts else None,
        model=repetitive_token,
        poison=scenario.poison,
        pace=scenario.pace,
    )


def next_turn(request: Request, limits: SchedulerLimits, more: list[int], request_id: int) -> Request | None:
    """The conversation of a request goes on with its answer and more tokens; None if it would be too long."""
    answer = answer_alone(request, limits, repetitive_token).token_ids
    prompt = [*request.prompt_token_ids, *answer, *more]
    if len(prompt) >= limits.max_model_len:
        prompt = prompt[: limits.max_model_len - 2] or prompt[:1]
    root = request.page_keys[:KEY_BYTES]
    keys = b"".join([root, *page_keys(prompt, limits.page_size, root)]) if root else b""
    return dataclasses.replace(request, request_id=request_id, prompt_token_ids=prompt, page_keys=keys)


def timetable(scenario: TierScenario) -> tuple[list[Request], dict[int, list[Request]]]:
    """All requests, and which of them come at which step."""
    limits = scenario.base.limits
    requests, arrivals = [], dict[int, list[Request]]()
    for step, request in scenario.base.arrivals:
        requests.append(request)
        arrivals.setdefault(step, []).append(request)
    for step, earlier, more in scenario.rounds:
        request_of_turn = next_turn(requests[earlier % len(requests)], limits, more, len(requests))
        if request_of_turn is not None:
            requests.append(request_of_turn)
            arrivals.setdefault(step, []).append(request_of_turn)
    return requests, arrivals


def play(scenario: TierScenario, drive: TierDrive) -> tuple[list[Request], set[int]]:
    """Run a scenario to its end, checking after every step; all requests and the aborted ids come back."""
    requests, arrivals = timetable(scenario)
    aborted: set[int] = set()
    total_tokens = sum(len(request.prompt_token_ids) + request.max_tokens for request in requests)
    last_event = max([60, *arrivals, *(step for step, _ in scenario.base.aborts)])
    for step in range(last_event + 1 + 20 * total_tokens):
        for request in arrivals.get(step, ()):
            drive.add(request)
        for abort, request_id in scenario.base.aborts:
            if abort == step and drive.scheduler.abort(request_id):
                aborted.add(request_id)
                # If its load was just refused, that of the next one may be too.
                drive.num_fruitless = 0
        if step in scenario.resets:
            drive.scheduler.reset_prefix_cache()
        for when, index in scenario.prefetches:
            if when == step:
                keys = split(requests[index % len(requests)].page_keys)[1:]
                answer = drive.scheduler.prefetch(keys)
                assert 0 <= answer.num_cached_pages + answer.num_prefetched_pages <= len(keys)
        drive.step()
        # A load may be refused once; then the request is computed.
        assert drive.num_fruitless <= 1, "nothing moves"
        drive.scheduler.check_integrity()
        if step > last_event and not drive.is_busy:
            return requests, aborted
    raise AssertionError("no end in sight")


def check_answers(drive: TierDrive, requests: list[Request], aborted: set[int], *, has_poison: bool) -> None:
    limits = drive.executor.limits
    for request in requests:
        expected, answer = answer_alone(request, limits, repetitive_token), drive.answers[request.request_id]
        if request.request_id in aborted:
            assert answer == Answer(token_ids=expected.token_ids[: len(answer.token_ids)])
        elif has_poison and answer.finish is not None and answer.finish.reason is FinishReason.ERROR:
            assert answer.token_ids == expected.token_ids[: len(answer.token_ids)]
        else:
            assert answer == expected


@settings(max_examples=num_examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(tier_scenarios())
def test_every_request_reads_what_it_would_have_computed(scenario: TierScenario) -> None:
    drive = drive_of(scenario)
    requests, aborted = play(scenario, drive)
    check_answers(drive, requests, aborted, has_poison=scenario.poison > 0)
    drive.come_to_rest()
    event(f"loaded: {drive.num_loads > 0}")
    event(f"preempted: {drive.scheduler.num_preemptions > 0}")
    event(f"read from disk: {isinstance(drive.disk, FakeDisk) and drive.disk.num_read > 0}")
    event(f"failed: {bool(drive.tier_executor.settled)}")
    drive.close()


def test_what_a_failed_request_computed_is_in_no_tier() -> None:
    limits = SchedulerLimits(
        max_batch_tokens=64, max_num_seqs=2, max_model_len=40, num_pages=20, page_size=2, vocab_size=VOCAB_SIZE
    )
    drive = TierDrive(limits, depth=1, num_slots=40, model=repetitive_token, pace=1.0)
    prompt, root = list(range(20)), root_key()
    keys = page_keys(prompt, limits.page_size, root)
    request = Request(
        request_id=0,
        prompt_token_ids=prompt,
        page_keys=b"".join([root, *keys]),
        params=SamplingParams(max_tokens=9, ignore_eos=True),
        seed=0,
        max_tokens=9,
    )
    drive.add(request)
    for _ in range(4):
        drive.step()
    assert all(key in drive.hosts[0] for key in keys)
    drive.tier_executor._poison = 1.0
    while drive.is_busy:
        drive.step()
    assert drive.tier_executor.settled
    assert not any(key in drive.hosts[0] or drive.scheduler.pools[0].has(key) for key in keys)
    drive.come_to_rest()
