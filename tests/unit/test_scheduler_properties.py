"""Whatever arrives, and however small the pool: every request gets the tokens that it would get alone."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nanoflow.batch import DenseBatch
from nanoflow.kvcache.keys import page_keys, root_key
from nanoflow.kvcache.sizes import PoolSize, most_pages
from nanoflow.priorities import BATCH
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import SchedulerLimits
from tests.all_cases import num_examples
from tests.unit.fake_executor import Answer, Drive, answer_alone

VOCAB_SIZE = 31


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Limits, what arrives and leaves at which step, and how late batches are committed."""

    limits: SchedulerLimits
    depth: int
    arrivals: list[tuple[int, Request]]
    aborts: list[tuple[int, int]]


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    page_size = draw(st.integers(1, 5))
    num_pages = draw(st.integers(2, 24))
    max_batch_tokens = draw(st.integers(1, 24))
    max_model_len = draw(st.integers(2, num_pages * page_size))
    # Windows: mostly one pool for all layers, else one or several with what the longest request needs and a bit more.
    pools = [
        PoolSize(
            num_pages=draw(st.integers(0, 8))
            + most_pages(window, max_model_len, page_size=page_size, max_batch_tokens=max_batch_tokens),
            window=window,
        )
        for window in draw(st.lists(st.one_of(st.none(), st.integers(1, 20)), max_size=3))
    ]
    limits = SchedulerLimits(
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=draw(st.integers(1, 8)),
        max_model_len=max_model_len,
        num_pages=num_pages,
        page_size=page_size,
        vocab_size=VOCAB_SIZE,
        group_pools=tuple(pools),
    )
    count = draw(st.integers(1, 12))
    steps = st.integers(0, 30)
    arrivals = [(draw(steps), draw_request(draw, number, limits)) for number in range(count)]
    aborts = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, count - 1)), max_size=3))
    return Scenario(limits=limits, depth=draw(st.integers(0, 2)), arrivals=arrivals, aborts=aborts)


def draw_prompt(draw: st.DrawFn, most: int) -> list[int]:
    """Some tokens that are often the same, then any."""
    num_common = draw(st.sampled_from([0, 0, 5, 17, 30]))
    common = [(place * place) % VOCAB_SIZE for place in range(min(num_common, most))]
    least = 0 if common else 1
    return common + draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=least, max_size=most - len(common)))


def draw_request(draw: st.DrawFn, request_id: int, limits: SchedulerLimits) -> Request:
    tokens = st.integers(0, VOCAB_SIZE - 1)
    max_tokens = draw(st.integers(1, 60))
    prompt = draw_prompt(draw, min(30, limits.max_model_len - 1))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(4, max_tokens))),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.lists(tokens, max_size=5)),
        prompt_logprobs=draw(st.sampled_from([None, None, 0, 2])),
    )
    root = root_key(draw(st.sampled_from([None, None, "salt"])))
    is_sharing = draw(st.integers(0, 3)) > 0
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        page_keys=b"".join([root, *page_keys(prompt, limits.page_size, root)]) if is_sharing else b"",
        params=params,
        seed=draw(st.integers(0, 5)),
        max_tokens=max_tokens,
        eos_token_ids=draw(st.sampled_from([(), (7,), (7, 8)])),
        priority=draw(st.sampled_from([0, 0, 0, -1, 2, BATCH, BATCH, BATCH])),
    )


def check_fills_budget(drive: Drive, batch: DenseBatch) -> None:
    """A batch below the budget leaves nobody waiting who runs and has something to compute."""
    if batch.num_tokens == drive.executor.limits.max_batch_tokens:
        return
    in_batch = set(batch.rows.tolist())
    for row, tenant in drive.executor.tenants.items():
        if row in in_batch:
            index = batch.rows.tolist().index(row)
            assert index in batch.sampled.tolist()
        elif drive.scheduler._rows.requests[row] is not None:
            assert tenant.num_computed == int(drive.scheduler._rows.max_total[row]) - 1


def play(scenario: Scenario, drive: Drive | None = None) -> tuple[Drive, set[int]]:
    """Run a scenario to its end, checking after every step; the aborted ids come back."""
    drive, aborted = drive or Drive(scenario.limits, depth=scenario.depth), set()
    total_tokens = sum(len(request.prompt_token_ids) + request.max_tokens for _, request in scenario.arrivals)
    last_event = max([step for step, _ in (*scenario.arrivals, *scenario.aborts)])
    for step in range(last_event + 1 + 10 * total_tokens):
        for arrival, request in scenario.arrivals:
            if arrival == step:
                drive.add(request)
        for abort, request_id in scenario.aborts:
            if abort == step and drive.scheduler.abort(request_id):
                aborted.add(request_id)
        is_all_committed = not drive.in_flight
        batch = drive.step()
        assert batch is not None or not is_all_committed or not drive.scheduler.has_unfinished
        if batch is not None:
            check_fills_budget(drive, batch)
        drive.scheduler.check_integrity()
        if step > last_event and not drive.scheduler.has_unfinished and not drive.in_flight:
            return drive, aborted
    raise AssertionError("no end in sight")


@settings(
    max_examples=num_examples(300),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(scenarios())
def test_every_request_gets_the_tokens_it_would_get_alone(scenario: Scenario) -> None:
    drive, aborted = play(scenario)
    event(f"windows: {[pool.window for pool in scenario.limits.pools] != [None]}")
    event(f"preempted: {drive.scheduler.num_preemptions > 0}")
    event(f"found in the cache: {drive.scheduler.reuse_counts.num_found > 0}")
    for _, request in scenario.arrivals:
        expected, answer = answer_alone(request, scenario.limits), drive.answers[request.request_id]
        if request.request_id in aborted:
            assert answer == Answer(token_ids=expected.token_ids[: len(answer.token_ids)])
            continue
        assert answer == expected
        is_scored = request.params.prompt_logprobs is not None
        positions = range(1, len(request.prompt_token_ids)) if is_scored else ()
        assert drive.scored.get(request.request_id, set()) == set(positions)
    assert drive.scheduler.fullest_pool.num_in_use == drive.scheduler.num_running == drive.scheduler.num_waiting == 0
