"""Sizes that batches are padded to: room for every batch, few of them, and those that serving meets are known."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from nanoflow.executor.buckets import Buckets
from nanoflow.executor.inputs import BatchSize
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan

GRAPH = build_graph(preset_config("llama-3-8b"), None)
BUDGET, REQUESTS = 2000, 1100
BUCKETS = Buckets(max_tokens=BUDGET, max_requests=REQUESTS)
SEQUENTIAL = sequential_plan(GRAPH, BUDGET)
CUT = nanobatch_plan(GRAPH, BUDGET, [700])
# Sizes of which no bucket's is a multiple: a plan smaller than the budget, and one that is larger.
SMALLER, LARGER = nanobatch_plan(GRAPH, 1000, [500]), sequential_plan(GRAPH, 4000)


@given(
    num_decodes=st.integers(0, 1000),
    num_prefills=st.integers(0, 300),
    more=st.integers(0, 1000),
    plan=st.sampled_from([SEQUENTIAL, CUT, SMALLER, LARGER]),
)
@example(num_decodes=1000, num_prefills=0, more=0, plan=SMALLER)
@example(num_decodes=0, num_prefills=1, more=990, plan=SMALLER)
@example(num_decodes=0, num_prefills=300, more=1000, plan=LARGER)
@example(num_decodes=1000, num_prefills=300, more=1000, plan=LARGER)
def test_a_bucket_has_room_and_stays_within_the_limits(
    num_decodes: int, num_prefills: int, more: int, plan: PipelinePlan
) -> None:
    most = min(BUDGET, plan.num_tokens)
    num_tokens = min(max(num_decodes + 2 * num_prefills + (more if num_prefills else 0), 1), most)
    exact = BatchSize(num_tokens=num_tokens, num_decodes=num_decodes, num_prefills=num_prefills)
    size = BUCKETS.size_for(exact, plan)
    assert num_tokens <= size.num_tokens <= min(most, max(16, 1.25 * num_tokens))
    assert num_decodes <= size.num_decodes <= min(BUCKETS.max_decodes(plan), size.num_tokens)
    assert num_prefills <= size.num_prefills <= BUCKETS.max_prefills(plan)
    assert BUCKETS.size_for(size, plan) == size


def test_where_a_plan_cuts_decodes_may_be_anywhere() -> None:
    assert BUCKETS.max_decodes(SEQUENTIAL) == REQUESTS and BUCKETS.max_decodes(CUT) == BUDGET
    assert BUCKETS.max_decodes(SMALLER) == SMALLER.num_tokens
    assert BUCKETS.max_prefills(SEQUENTIAL) == REQUESTS and BUCKETS.max_prefills(CUT) == REQUESTS + 2


def test_a_plan_that_cuts_has_one_class_of_decodes() -> None:
    """They are dealt over the whole batch, so that how many there are does not say where the last one is."""
    sizes = {
        BUCKETS.size_for(BatchSize(num_tokens=1024, num_decodes=count, num_prefills=2), CUT) for count in (1, 200, 900)
    }
    assert sizes == {BatchSize(num_tokens=1024, num_decodes=1024, num_prefills=16)}


def test_what_is_common_fits_a_plan_smaller_than_the_budget() -> None:
    plan = sequential_plan(GRAPH, 1000)
    common = list(BUCKETS.common(plan))
    assert len(set(common)) == len(common) and max(size.num_tokens for size in common) == 1000


def test_the_buckets_of_a_budget_are_few() -> None:
    common = list(BUCKETS.common(SEQUENTIAL))
    assert len(set(common)) == len(common) <= 130


@given(num_decodes=st.integers(0, 1100), num_prefills=st.integers(0, 16), more=st.integers(0, 2000))
def test_what_serving_meets_is_common(num_decodes: int, num_prefills: int, more: int) -> None:
    num_tokens = min(num_decodes + 2 * num_prefills + (more if num_prefills else 0), BUDGET)
    if num_tokens < 1 or num_tokens < num_decodes + num_prefills:
        return
    exact = BatchSize(num_tokens=num_tokens, num_decodes=num_decodes, num_prefills=num_prefills)
    assert BUCKETS.size_for(exact, SEQUENTIAL) in set(BUCKETS.common(SEQUENTIAL))


def test_limits_smaller_than_every_class() -> None:
    buckets = Buckets(max_tokens=8, max_requests=2)
    plan = sequential_plan(GRAPH, 8)
    for size in buckets.common(plan):
        assert size.num_tokens <= 8 and size.num_decodes <= 2 and size.num_prefills <= 2
    assert buckets.size_for(BatchSize(num_tokens=3, num_decodes=1, num_prefills=2), plan) == BatchSize(
        num_tokens=4, num_decodes=2, num_prefills=2
    )
