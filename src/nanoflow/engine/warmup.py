"""Batches that nobody asked for, before the first request comes: they compile kernels and capture CUDA graphs.

Every size of a batch of decodes is run twice, since a size is captured when it is met again; so is one prompt as long
as the token budget. Every plan of the book is met twice too, by the batches that it is for: decodes with one prompt,
and with several. Other mixed batches are too many kinds, and are captured as they come. The cache is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from nanoflow.batch import DenseBatch, NewPages
from nanoflow.executor.captured import Buckets
from nanoflow.executor.inputs import BatchSize
from nanoflow.executor.worker import Worker
from nanoflow.plan.book import PlanBook
from nanoflow.plan.plan import PipelinePlan
from nanoflow.scheduler.limits import SchedulerLimits

# Prompts in a mixed batch, beside one; with the cuts of a plan they are more than four parts, which is another graph.
_NUM_PROMPTS = 3


def warm_up(worker: Worker, book: PlanBook, limits: SchedulerLimits, *, show_progress: bool) -> None:
    """Run every batch of `warm_up_batches` under the plan that the book has for it, and those of its plans."""
    work = [(batch, book.choose(batch.shape)) for batch in warm_up_batches(limits)]
    work += plan_batches(book, limits)
    for batch, plan in tqdm(work, desc="Preparing kernels", unit="batch", disable=not show_progress):
        worker.launch(batch, plan).result()


def plan_batches(book: PlanBook, limits: SchedulerLimits) -> Iterator[tuple[DenseBatch, PipelinePlan]]:
    """For each plan the largest batches of its first entry that the limits allow: decodes and chunks of prompts."""
    longest = min(limits.max_batch_tokens, limits.max_model_len)
    first = {entry.plan.digest: entry for entry in reversed(book.entries)}
    for entry in first.values():
        num_decodes = min(round(entry.max_decode_share * entry.max_tokens), limits.max_num_seqs - _NUM_PROMPTS)
        chunk = min(entry.max_tokens - num_decodes, longest)
        if num_decodes < 0 or num_decodes + chunk > limits.max_batch_tokens:
            continue
        for num_prompts in (1, _NUM_PROMPTS) if chunk >= _NUM_PROMPTS else (1,):
            chunks = [chunk // num_prompts] * (num_prompts - 1)
            for _ in range(2):
                yield _batch(num_decodes, [*chunks, chunk - sum(chunks)] if chunk else [], limits), entry.plan


def warm_up_batches(limits: SchedulerLimits) -> Iterator[DenseBatch]:
    """Large ones first, so that the smaller ones find memory that is already taken; each twice."""
    buckets = Buckets.of(limits.max_batch_tokens, limits.max_num_seqs)
    most = min(limits.max_batch_tokens, limits.max_num_seqs)
    sizes = {
        buckets.size_for(BatchSize(num_tokens=count, num_decodes=count, num_prefills=0), limits.max_batch_tokens)
        for count in range(1, most + 1)
    }
    longest = min(limits.max_batch_tokens, limits.max_model_len)
    shapes: list[tuple[int, list[int]]] = [(0, [longest])] if longest > 1 else []
    shapes += [(min(size.num_tokens, most), []) for size in sorted(sizes, key=lambda size: -size.num_tokens)]
    for num_decodes, chunks in shapes:
        for _ in range(2):
            yield _batch(num_decodes, chunks, limits)


def _batch(num_decodes: int, chunks: list[int], limits: SchedulerLimits) -> DenseBatch:
    """Decodes, and prompts of so many tokens, all of them on the first page, to which nothing is written."""
    lengths = np.array([1] * num_decodes + chunks, np.int32)
    num_requests, num_tokens = len(lengths), int(lengths.sum())
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
        new_pages=NewPages.none(),
        table_width=-(-int(lengths.max()) // limits.page_size),
        sampled=np.arange(num_requests, dtype=np.int32),
    )
