"""Several front ends on one engine: ids, parts of a step, and what is counted once."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow.config import ConfigError
from nanoflow.engine.front_ends import STATS_INTERVAL_S, FrontEnds, split
from nanoflow.engine.messages import EngineStats, Heartbeat, PlaceLogprobs, StepOutput
from nanoflow.outputs import Finished, FinishReason
from nanoflow.request import Request, SamplingParams
from nanoflow.server.listen import bind, choose_num_front_ends, deals_connections_out

STATS = EngineStats(num_running=5, iteration=9, iteration_tokens=70, prefill_tokens=60, plan_digest="aa")
LENGTH = Finished(reason=FinishReason.LENGTH)


def request(number: int) -> Request:
    return Request(request_id=number, prompt_token_ids=[1], params=SamplingParams(), seed=0, max_tokens=4)


def owned(front_ends: FrontEnds, count: int, num_requests: int) -> dict[tuple[int, int], int]:
    """Engine's ids by (front end, its id)."""
    ids = {}
    for front_end in range(count):
        front_ends.join(front_end)
        for number in range(num_requests):
            ids[front_end, number] = front_ends.own(front_end, request(number)).request_id
    return ids


def parts_slowly(step: StepOutput, ids: dict[tuple[int, int], int]) -> dict[int, dict[str, object]]:
    """What each front end must get, one entry after the other."""
    owners = {engine_id: owner for owner, engine_id in ids.items()}
    found: dict[int, dict[str, object]] = {}
    for front_end in sorted({front_end for front_end, _ in ids}):
        mine = {engine_id: number for engine_id, (owner, number) in owners.items() if owner == front_end}
        found[front_end] = {
            "request_ids": [mine[one] for one in step.request_ids if one in mine],
            "token_ids": [token for one, token in zip(step.request_ids, step.token_ids, strict=True) if one in mine],
            "finished": {mine[one]: end for one, end in step.finished.items() if one in mine},
            "logprobs": {mine[one]: row for one, row in step.logprobs.items() if one in mine},
            "prompt_logprobs": {mine[one]: row for one, row in step.prompt_logprobs.items() if one in mine},
            "scheduled": {mine[one]: count for one, count in step.scheduled.items() if one in mine},
            "preempted": [mine[one] for one in step.preempted if one in mine],
        }
    return {front_end: part for front_end, part in found.items() if any(part.values())}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("seed", range(8))
def test_a_step_is_split_by_owner(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = owned(FrontEnds(), count, 12)
    engine_ids = list(ids.values())

    def some(share: float) -> list[int]:
        return [one for one in engine_ids if rng.random() < share]

    row = PlaceLogprobs(first_position=0, token_ids=[[1]], logprobs=[[-0.5]], ranks=[1])
    with_tokens = [int(one) for one in rng.permutation(some(0.3))]
    step = StepOutput(
        request_ids=with_tokens,
        token_ids=[int(token) for token in rng.integers(0, 1000, len(with_tokens))],
        finished=dict.fromkeys(some(0.1), LENGTH),
        logprobs=dict.fromkeys(with_tokens[:3], row),
        prompt_logprobs=dict.fromkeys(some(0.05), row),
        scheduled=dict.fromkeys(some(0.1), 16),
        preempted=some(0.05),
        stats=STATS,
    )
    parts = split(step)
    expected = parts_slowly(step, ids)
    assert {
        front_end: {name: getattr(part, name) for name in expected[front_end]} for front_end, part in parts.items()
    } == expected
    # The numbers of the iteration come once, its state to all.
    assert sum(part.stats.iteration_tokens for part in parts.values()) == (STATS.iteration_tokens if parts else 0)
    assert sum(part.stats.plan_digest is not None for part in parts.values()) == bool(parts)
    assert all(part.stats.num_running == STATS.num_running for part in parts.values())


def test_one_front_end_gets_the_step_as_it_is() -> None:
    front_ends = FrontEnds()
    (engine_id,) = owned(front_ends, 1, 1).values()
    step = StepOutput(request_ids=[engine_id], token_ids=[7], stats=STATS)
    assert engine_id == 0
    assert front_ends.parts(step)[0] is step


def test_who_has_nothing_hears_of_the_state_now_and_then() -> None:
    now_s = 0.0
    front_ends = FrontEnds(lambda: now_s)
    ids = owned(front_ends, 3, 1)
    step = StepOutput(request_ids=[ids[1, 0]], token_ids=[7], stats=STATS)
    assert {front_end: type(part) for front_end, part in front_ends.parts(step).items()} == {
        0: Heartbeat,
        1: StepOutput,
        2: Heartbeat,
    }
    now_s = STATS_INTERVAL_S / 2
    assert list(front_ends.parts(step)) == [1]
    now_s = STATS_INTERVAL_S * 1.1
    beats = front_ends.parts(step)
    assert set(beats) == {0, 1, 2} and beats[2].stats.num_running == 5 and beats[2].stats.iteration_tokens == 0


def test_an_iteration_without_tokens_is_counted_too() -> None:
    front_ends = FrontEnds(lambda: 0.0)
    owned(front_ends, 3, 1)
    parts = front_ends.parts(StepOutput(stats=STATS))
    assert [part.stats.iteration_tokens for part in parts.values() if isinstance(part, StepOutput)] == [70]
    assert list(front_ends.parts(StepOutput(stats=STATS))) == [0]


def test_an_iteration_counts_though_the_first_front_end_in_it_has_left() -> None:
    front_ends = FrontEnds()
    ids = owned(front_ends, 3, 1)
    front_ends.leave(0)
    parts = front_ends.parts(StepOutput(request_ids=list(ids.values()), token_ids=[7, 8, 9], stats=STATS))
    assert sorted(parts) == [1, 2]
    assert sum(part.stats.iteration_tokens for part in parts.values()) == STATS.iteration_tokens


def test_a_front_end_that_leaves_gives_its_living_requests() -> None:
    front_ends = FrontEnds()
    ids = owned(front_ends, 2, 4)
    front_ends.parts(StepOutput(finished={ids[1, 0]: LENGTH}))
    assert front_ends.disown(1, [1]) == [ids[1, 1]]
    assert front_ends.leave(1) == [ids[1, 2], ids[1, 3]]
    assert (front_ends.has_left(1), front_ends.has_left(0), list(front_ends)) == (True, False, [0])
    # What is still on its way to it goes nowhere.
    late = front_ends.parts(StepOutput(request_ids=[ids[1, 2]], token_ids=[7]))
    assert 1 not in late


# The port, and how many share it


@pytest.mark.parametrize(
    ("num_cores", "counts"), [(1, (1, 1, 1)), (4, (1, 1, 1)), (8, (2, 2, 1)), (16, (5, 4, 2)), (128, (8, 8, 8))]
)
def test_how_many_front_ends_a_machine_gets(num_cores: int, counts: tuple[int, int, int]) -> None:
    goals = ("throughput", "balanced", "latency")
    assert tuple(choose_num_front_ends(num_cores, goal) for goal in goals) == counts  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("is_dealt", [True, False])
def test_all_listeners_have_one_port(count: int, is_dealt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.server.listen.deals_connections_out", lambda: is_dealt and deals_connections_out())
    listeners = bind("127.0.0.1", 0, count)
    try:
        assert len(listeners) == count
        (port,) = {listener.getsockname()[1] for listener in listeners}
        listeners[0].listen()
        # Another server that would share the port is refused as well.
        for others in (1, 2):
            with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"):
                bind("127.0.0.1", port, others)
    finally:
        for listener in listeners:
            listener.close()
