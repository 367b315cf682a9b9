"""Compile kernels, capture CUDA graphs and time batches before the first request, so that no request waits for it.

All kernels are compiled in parallel. Then CUDA graphs are captured for common sizes of batches, as many as fit into a
few seconds; the others are captured when the engine is idle. Last, a few batches are timed, from which the engine
estimates iteration times. Nothing here writes to the KV cache.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from nanoflow.batch import DenseBatch, NewPages
from nanoflow.executor.buckets import Buckets
from nanoflow.executor.forward import GraphKey
from nanoflow.executor.inputs import BatchSize
from nanoflow.executor.worker import Worker
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanBook, PlanEntry
from nanoflow.plan.plan import PipelinePlan
from nanoflow.scheduler.limits import SchedulerLimits

# Seconds for capturing graphs before the engine is ready: of the fallback, and of the plans of a book.
_RECORD_S = 3.0
# Number of prompts in the batches for which graphs of a searched plan are captured.
_NUM_PROMPTS = 4
# How many times in a row a batch is run to be timed.
_TIMED = 4


def compile_and_record(worker: Worker, book: PlanBook, limits: SchedulerLimits, *, with_plans: bool = True) -> None:
    """Compile all kernels and capture graphs.

    Args:
        worker: The worker whose kernels and graphs these are.
        book: The plans.
        limits: Bounds of the batches.
        with_plans: Capture graphs of the plans of the book too, not only of the fallback.
    """
    wanted = [graphs_of_fallback(book, limits), graphs_of_plans(book, limits) if with_plans else []]
    worker.prepare(wanted, probe_batch(Probe(num_decodes=1), limits), _RECORD_S)


def graphs_of_fallback(book: PlanBook, limits: SchedulerLimits) -> list[GraphKey]:
    """Graphs of the fallback for common batches, the most common first."""
    return [(book.fallback, size) for size in _buckets(limits).common(book.fallback)]


def graphs_of_plans(book: PlanBook, limits: SchedulerLimits) -> list[GraphKey]:
    """One graph of each plan of the book, for the largest batch of its first entry."""
    first = {entry.plan.digest: entry for entry in reversed(book.entries)}
    return [_largest(entry, limits) for entry in book.entries if first[entry.plan.digest] is entry]


def _largest(entry: PlanEntry, limits: SchedulerLimits) -> GraphKey:
    count = min(entry.max_tokens, limits.max_batch_tokens)
    size = BatchSize(num_tokens=count, num_decodes=count, num_prefills=min(_NUM_PROMPTS, count))
    return entry.plan, _buckets(limits).size_for(size, entry.plan)


def _buckets(limits: SchedulerLimits) -> Buckets:
    return Buckets(max_tokens=limits.max_batch_tokens, max_requests=limits.max_num_seqs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A batch to time: its decodes and chunks of prompts, and the number of keys that each attends to."""

    num_decodes: int = 0
    decode_keys: int = 1
    chunks: tuple[int, ...] = ()
    chunk_keys: int = 0


def probes(limits: SchedulerLimits) -> list[Probe]:
    """Batches within the limits from which the costs of tokens, keys and prompts can be told apart."""
    most, longest = min(limits.max_batch_tokens, limits.max_num_seqs), limits.max_model_len
    keys = max(min(1024, longest // 2), 1)
    chunk = max(min(512, limits.max_batch_tokens // 2, longest // 4), 1)
    many, some = min(512, most), min(128, most)
    beside = min(some, limits.max_batch_tokens - chunk, limits.max_num_seqs - 1)
    return [
        Probe(num_decodes=1),
        Probe(num_decodes=some),
        Probe(num_decodes=some, decode_keys=keys),
        Probe(num_decodes=many),
        Probe(num_decodes=many, decode_keys=keys),
        Probe(chunks=(chunk,), chunk_keys=chunk),
        Probe(chunks=(chunk,), chunk_keys=max(longest // 2, chunk)),
        Probe(chunks=(min(limits.max_batch_tokens, longest, 2048),)),
        Probe(num_decodes=beside, decode_keys=keys, chunks=(chunk,)),
    ]


def time_iterations(
    worker: Worker, plan: PipelinePlan, limits: SchedulerLimits, vocab_size: int
) -> list[tuple[BatchShape, float]]:
    """Shape and seconds of a few batches, each run several times in a row as in serving.

    The first run takes longer, since the device is idle before it. So the time of one is the difference between several
    runs and one run, for each run beyond the first.
    """
    samples = []
    for probe in probes(limits):
        batch = probe_batch(probe, limits, vocab_size)
        _, once_s, several_s = (_seconds(worker, batch, plan, count) for count in (1, 1, _TIMED))
        if several_s > once_s:
            samples.append((batch.shape, (several_s - once_s) / (_TIMED - 1)))
    return samples


def _seconds(worker: Worker, batch: DenseBatch, plan: PipelinePlan, count: int) -> float:
    """Seconds that `count` runs of a batch take, queued at once."""
    start_s = time.monotonic()
    for pending in [worker.launch(batch, plan) for _ in range(count)]:
        pending.result()
    return time.monotonic() - start_s


def probe_batch(probe: Probe, limits: SchedulerLimits, vocab_size: int = 1) -> DenseBatch:
    """The batch of a probe. Its keys are on pages all over the cache; nothing is written to them.

    Tokens are random ones of the vocabulary, since equal tokens would all choose the same experts.
    """
    lengths = np.array([1] * probe.num_decodes + list(probe.chunks), np.int32)
    context = np.maximum(lengths, [probe.decode_keys] * probe.num_decodes + [probe.chunk_keys] * len(probe.chunks))
    num_requests, num_tokens = len(lengths), int(lengths.sum())
    width = -(-int(context.max()) // limits.page_size)
    rng = np.random.default_rng(0)
    tables = [rng.integers(0, pool.num_pages, (num_requests, width), dtype=np.int32) for pool in limits.pools]
    return DenseBatch(
        iteration=0,
        rows=np.arange(num_requests, dtype=np.int32),
        epochs=np.zeros(num_requests, np.int64),
        num_decodes=probe.num_decodes,
        query_start=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        context_len=context.astype(np.int32),
        token_ids=rng.integers(0, vocab_size, num_tokens, dtype=np.int32),
        is_fed_back=np.zeros(num_tokens, np.bool_),
        positions=np.concatenate([np.arange(c - n, c) for n, c in zip(lengths, context, strict=True)]).astype(np.int32),
        slots=np.full(len(tables) * num_tokens, -1, np.int64),
        new_pages=NewPages.of_groups(list(map(NewPages.of_tables, tables)), num_rows=limits.max_num_seqs),
        table_width=width,
        sampled=np.arange(num_requests, dtype=np.int32),
    )
