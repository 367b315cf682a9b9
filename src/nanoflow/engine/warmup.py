"""What is done before the first request comes, so that no request waits for it: compile, record, measure.

All kernels are compiled side by side. Then CUDA graphs are recorded for the sizes of batches that serving meets, as
many as fit into a few seconds; the others are recorded when there is nothing to do. Last, a few batches are timed: from
them the engine knows what an iteration of given content takes. The KV cache is left as it is: what is run here writes
to no page.
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

# Seconds for recording graphs before the engine is ready: of the fallback, and of the plans of a book.
_RECORD_S = 4.0
# Prompts of a batch for which the graphs of a searched plan are recorded.
_NUM_PROMPTS = 4
# Batches in a row that are timed.
_TIMED = 4


def compile_and_record(worker: Worker, book: PlanBook, limits: SchedulerLimits, *, with_plans: bool = True) -> None:
    """Compile all kernels and record graphs.

    Args:
        worker: Whose.
        book: Plans that batches may come with.
        limits: What batches there can be.
        with_plans: Record graphs of the plans of the book too, not only of the fallback.
    """
    wanted = [graphs_of_fallback(book, limits), graphs_of_plans(book, limits) if with_plans else []]
    worker.prepare(wanted, probe_batch(Probe(num_decodes=1), limits), _RECORD_S)


def graphs_of_fallback(book: PlanBook, limits: SchedulerLimits) -> list[GraphKey]:
    """Graphs of the fallback for the batches that serving meets, the most common first."""
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
    """A batch to time: decodes of so many keys each, and chunks of prompts that end so many keys into theirs."""

    num_decodes: int = 0
    decode_keys: int = 1
    chunks: tuple[int, ...] = ()
    chunk_keys: int = 0


def probes(limits: SchedulerLimits) -> list[Probe]:
    """Batches that tell apart what tokens, keys and prompts cost, within the limits."""
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


def time_iterations(worker: Worker, plan: PipelinePlan, limits: SchedulerLimits) -> list[tuple[BatchShape, float]]:
    """Content and seconds of a few batches, each run several times in a row as serving runs them.

    The first of a row takes longer, for it finds the device idle; so what several take more than one is looked at.
    """
    samples = []
    for probe in probes(limits):
        batch = probe_batch(probe, limits)
        _, once_s, several_s = (_seconds(worker, batch, plan, count) for count in (1, 1, _TIMED))
        if several_s > once_s:
            samples.append((batch.shape, (several_s - once_s) / (_TIMED - 1)))
    return samples


def _seconds(worker: Worker, batch: DenseBatch, plan: PipelinePlan, count: int) -> float:
    """What so many runs of a batch take, queued at once."""
    start_s = time.monotonic()
    for pending in [worker.launch(batch, plan) for _ in range(count)]:
        pending.result()
    return time.monotonic() - start_s


def probe_batch(probe: Probe, limits: SchedulerLimits) -> DenseBatch:
    """The batch of a probe, its keys on pages all over the cache; nothing is written to them."""
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
        token_ids=np.zeros(num_tokens, np.int32),
        is_fed_back=np.zeros(num_tokens, np.bool_),
        positions=np.concatenate([np.arange(c - n, c) for n, c in zip(lengths, context, strict=True)]).astype(np.int32),
        slots=np.full(len(tables) * num_tokens, -1, np.int64),
        new_pages=NewPages.of_groups(list(map(NewPages.of_tables, tables)), num_rows=limits.max_num_seqs),
        table_width=width,
        sampled=np.arange(num_requests, dtype=np.int32),
    )
