"""Batches that nobody asked for, before the first request comes: they compile kernels and capture CUDA graphs.

Every size of a batch of decodes is run twice, since a size is captured when it is met again; so is one prompt as long
as the token budget. Every plan of the book is run once, on a batch that it is for. Other mixed batches are too many
kinds, and are captured as they come. The cache is left as it is.
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
from nanoflow.plan.plan import PipelinePlan
from nanoflow.scheduler.limits import SchedulerLimits


def warm_up(worker: Worker, book: PlanBook, limits: SchedulerLimits, *, show_progress: bool) -> None:
    """Run every batch of `warm_up_batches` under the plan that the book has for it, and those of its plans."""
    work = [(batch, book.choose(batch.shape)) for batch in warm_up_batches(limits)]
    work += plan_batches(book, limits)
    for batch, plan in tqdm(work, desc="Preparing kernels", unit="batch", disable=not show_progress):
        worker.launch(batch, plan).result()


def plan_batches(book: PlanBook, limits: SchedulerLimits) -> Iterator[tuple[DenseBatch, PipelinePlan]]:
    """For each plan the largest batch of its first entry that the limits allow, decodes and one chunk of a prompt."""
    longest = min(limits.max_batch_tokens, limits.max_model_len)
    first = {entry.plan.digest: entry for entry in reversed(book.entries)}
    for entry in first.values():
        num_decodes = min(round(entry.max_decode_share * entry.max_tokens), limits.max_num_seqs - 1)
        chunk = min(entry.max_tokens - num_decodes, longest)
        if num_decodes + chunk <= limits.max_batch_tokens:
            yield _batch(num_decodes, chunk, limits), entry.plan


def warm_up_batches(limits: SchedulerLimits) -> Iterator[DenseBatch]:
    """Large ones first, so that the smaller ones find memory that is already taken; each twice."""
    buckets = Buckets.of(limits.max_batch_tokens, limits.max_num_seqs)
    most = min(limits.max_batch_tokens, limits.max_num_seqs)
    sizes = {
        buckets.size_for(BatchSize(num_tokens=count, num_decodes=count, num_prefills=0), limits.max_batch_tokens)
        for count in range(1, most + 1)
    }
    longest = min(limits.max_batch_tokens, limits.max_model_len)
    shapes = [(0, longest)] if longest > 1 else []
    shapes += [(min(size.num_tokens, most), 0) for size in sorted(sizes, key=lambda size: -size.num_tokens)]
    for num_decodes, chunk in shapes:
        for _ in range(2):
            yield _batch(num_decodes, chunk, limits)


def _batch(num_decodes: int, chunk: int, limits: SchedulerLimits) -> DenseBatch:
    """Decodes, and a prompt of so many tokens if any, all of them on the first page, to which nothing is written."""
    lengths = np.array([1] * num_decodes + [chunk] * (chunk > 0), np.int32)
    num_requests, num_tokens = len(lengths), num_decodes + chunk
    return DenseBatch(
        iteration=0,
        rows=np.arange(num_requests, dtype=np.int32),
        epochs=np.zeros(num_requests, np.int64),
        num_decodes=num_decodes,
        query_start=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        context_len=lengths,
        token_ids=np.zeros(num_tokens, np.int32),
        is_fed_back=np.zeros(num_tokens, np.bool_),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        slots=np.full(num_tokens, -1, np.int64),
        page_tables=np.zeros((num_requests, -(-int(lengths.max()) // limits.page_size)), np.int32),
        sampled=np.arange(num_requests, dtype=np.int32),
    )
