"""The batches before the first request: every size of decodes, twice, within the limits."""

from __future__ import annotations

from collections import Counter

from nanoflow.engine.warmup import warm_up_batches
from nanoflow.executor.captured import Buckets
from nanoflow.executor.inputs import BatchSize
from nanoflow.executor.layout import lay_out
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
            assert (batch.slots == -1).all() and not batch.page_tables.any()
            assert batch.num_tokens <= limits.max_batch_tokens and batch.num_requests <= limits.max_num_seqs
            assert batch.context_len.max() <= limits.max_model_len
            assert batch.page_tables.shape[1] <= -(-limits.max_model_len // limits.page_size)
