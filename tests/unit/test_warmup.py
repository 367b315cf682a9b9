"""The batches before the first request: every size of decodes, twice, within the limits."""

from __future__ import annotations

from collections import Counter

from nanoflow.engine.warmup import plan_batches, warm_up_batches
from nanoflow.executor.captured import Buckets
from nanoflow.executor.inputs import BatchSize
from nanoflow.executor.layout import lay_out
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook, PlanEntry
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.scheduler.limits import SchedulerLimits


def _limits(max_batch_tokens: int, max_num_seqs: int, max_model_len: int) -> SchedulerLimits:
    return SchedulerLimits(
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        num_pages=999,
        page_size=16,
        vocab_size=50,
    )


def test_every_bucket_of_decodes_is_met_twice() -> None:
    limits = _limits(700, 300, 4096)
    buckets = Buckets.of(700, 300)
    batches = list(warm_up_batches(limits))
    met = Counter(buckets.size_for(BatchSize.of(lay_out(batch)), 700) for batch in batches)
    for count in range(1, 301):
        size = BatchSize(num_tokens=count, num_decodes=count, num_prefills=0)
        assert met[buckets.size_for(size, 700)] == 2
    assert max(batch.num_tokens for batch in batches) == 700


def test_nothing_is_written_and_nothing_exceeds_the_limits() -> None:
    for limits in (_limits(64, 300, 40), _limits(1, 1, 2), _limits(8, 2, 4096)):
        for batch in warm_up_batches(limits):
            assert (batch.slots == -1).all() and len(batch.new_pages) == 0
            assert batch.num_tokens <= limits.max_batch_tokens and batch.num_requests <= limits.max_num_seqs
            assert batch.context_len.max() <= limits.max_model_len
            assert batch.table_width <= -(-limits.max_model_len // limits.page_size)


def test_every_plan_is_met_twice_by_batches_that_it_is_for() -> None:
    graph = build_graph(preset_config("llama-3-8b"), None)
    whole, half = nanobatch_plan(graph, 512, [256]), nanobatch_plan(graph, 256, [128])
    book = PlanBook(
        fallback=sequential_plan(graph, 1024),
        entries=(
            PlanEntry(plan=whole, min_tokens=400, max_tokens=512, min_decode_share=0.2, max_decode_share=0.5),
            PlanEntry(plan=half, min_tokens=200, max_tokens=250, min_decode_share=1.0),
            PlanEntry(plan=whole, min_tokens=400, max_tokens=448, min_decode_share=0.0, max_decode_share=0.0),
        ),
    )
    met = Counter(
        (plan.digest, batch.num_tokens, batch.num_decodes, batch.num_requests)
        for batch, plan in plan_batches(book, _limits(1024, 300, 4096))
    )
    assert met == {
        (whole.digest, 512, 256, 257): 2,
        (whole.digest, 512, 256, 259): 2,
        (half.digest, 250, 250, 250): 2,
    }
    for batch, _ in plan_batches(book, _limits(1024, 300, 4096)):
        assert batch.positions[-1] == batch.context_len[-1] - 1 and (batch.slots == -1).all()
        assert batch.query_start[-1] == batch.num_tokens == len(batch.positions)


def test_plans_that_the_limits_leave_no_batch_for_are_not_met() -> None:
    graph = build_graph(preset_config("llama-3-8b"), None)
    entry = PlanEntry(plan=nanobatch_plan(graph, 512, [256]), min_tokens=400, max_tokens=512)
    book = PlanBook(fallback=sequential_plan(graph, 256), entries=(entry,))
    assert not list(plan_batches(book, _limits(256, 300, 4096)))
