"""Batches that nobody asked for, before the first request comes: they compile kernels and capture CUDA graphs.

Every size of a batch of decodes is run twice, since a size is captured when it is met again; so is one prompt as long
as the token budget. Mixed batches are too many kinds, and are captured as they come. The cache is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from nanoflow.batch import DenseBatch
from nanoflow.executor.captured import Buckets
from nanoflow.executor.inputs import BatchSize
from nanoflow.executor.worker import Worker
from nanoflow.plan.book import PlanBook
from nanoflow.scheduler.limits import SchedulerLimits


def warm_up(worker: Worker, book: PlanBook, limits: SchedulerLimits, *, show_progress: bool) -> None:
    """Run every batch of `warm_up_batches` under the plan that the book has for it."""
    batches = list(warm_up_batches(limits))
    for batch in tqdm(batches, desc="Preparing kernels", unit="batch", disable=not show_progress):
        worker.launch(batch, book.choose(batch.shape)).result()


def warm_up_batches(limits: SchedulerLimits) -> Iterator[DenseBatch]:
    """Large ones first, so that the smaller ones find memory that is already taken; each twice."""
    buckets = Buckets.of(limits.max_batch_tokens, limits.max_num_seqs)
    most = min(limits.max_batch_tokens, limits.max_num_seqs)
    sizes = {
        buckets.size_for(BatchSize(num_tokens=count, num_decodes=count, num_prefills=0), limits.max_batch_tokens)
        for count in range(1, most + 1)
    }
    longest = min(limits.max_batch_tokens, limits.max_model_len)
    shapes = [(1, longest)] if longest > 1 else []
    shapes += [(min(size.num_tokens, most), 1) for size in sorted(sizes, key=lambda size: -size.num_tokens)]
    for num_requests, length in shapes:
        for _ in range(2):
            yield _batch(num_requests, length, limits)


def _batch(num_requests: int, length: int, limits: SchedulerLimits) -> DenseBatch:
    """Requests of so many tokens, all of them on the first page, to which nothing is written."""
    num_tokens = num_requests * length
    return DenseBatch(
        iteration=0,
        rows=np.arange(num_requests, dtype=np.int32),
        epochs=np.zeros(num_requests, np.int64),
        num_decodes=num_requests if length == 1 else 0,
        query_start=np.arange(0, num_tokens + 1, length, dtype=np.int32),
        context_len=np.full(num_requests, length, np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        is_fed_back=np.zeros(num_tokens, np.bool_),
        positions=np.tile(np.arange(length, dtype=np.int32), num_requests),
        slots=np.full(num_tokens, -1, np.int64),
        page_tables=np.zeros((num_requests, -(-length // limits.page_size)), np.int32),
        sampled=np.arange(num_requests, dtype=np.int32),
    )
