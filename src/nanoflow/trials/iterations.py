"""Whole iterations under plans, measured on this device: what decides between plans that are predicted to win.

A worker without a scheduler runs one batch again and again, as an engine would queue it, until power and clocks have
settled. Weights and keys are random, for zeros draw less power; layers take turns on the keys of a few, which is more
than any cache holds. Which plans are worth a try is `search/books.py`'s.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch

from nanoflow.batch import DenseBatch, Int64, Joined, NewPages, SampledTokens
from nanoflow.device.energy import energy_of
from nanoflow.executor.buffers import DeviceModel, allocate_caches, draw_keys
from nanoflow.executor.worker import Worker
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape
from nanoflow.kernels.dispatch import are_capturable, kernels_for
from nanoflow.kernels.launch import LayerCache
from nanoflow.models.weights import random_weights
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.table import Profile
from nanoflow.profiler.sustained import SPANS, Span
from nanoflow.request import SamplingParams
from nanoflow.simulate.iteration import graphs_of

# Layers with keys of their own.
_NUM_CACHES = 4
# Batches queued at once: enough that the device never waits.
_IN_FLIGHT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One iteration among many back to back: seconds, and the device's joules (None if it has no counter)."""

    time_s: float
    energy_j: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A plan on a batch, and the sequential plan on the same batch in the same minute."""

    shape: BatchShape
    plan: PipelinePlan
    planned: Timing
    sequential: Timing

    @property
    def gain(self) -> float:
        """Time sequentially / under the plan."""
        return self.sequential.time_s / self.planned.time_s


def measure_trials(
    profile: Profile,
    wanted: Sequence[tuple[BatchShape, PipelinePlan]],
    *,
    device: torch.device,
    span: Span | None = None,
    num_layers: int | None = None,
) -> Iterator[Trial]:
    """Every plan on its batch, as soon as it is known; trials of one batch follow each other.

    Args:
        profile: Names the model.
        wanted: Batches, and a plan for at least as many tokens for each.
        device: Where.
        span: How long to look at each.
        num_layers: Fewer than the model has.

    Raises:
        PlanError, LaneError: A plan does not fit the model, or the device cannot be divided as it asks for.
    """
    graph = graphs_of(profile)[0]
    graph = graph if num_layers is None else graph.with_layers(graph.layers[:num_layers])
    by_shape: dict[BatchShape, list[PipelinePlan]] = {}
    for shape, plan in wanted:
        by_shape.setdefault(shape, []).append(plan)
    if not by_shape:
        return
    batches = {shape: dense_batch(shape, profile.page_size, graph.vocab_size) for shape in by_shape}
    sequential = {shape: sequential_plan(graph, shape.num_tokens) for shape in by_shape}
    plans = {plan.digest: plan for plan in (*sequential.values(), *(plan for _, plan in wanted))}
    worker = _worker(profile, graph, tuple(plans.values()), list(batches.values()), device)
    try:
        for shape, candidates in by_shape.items():
            base = _sustained(worker, batches[shape], sequential[shape], device, span or SPANS[device.type])
            for plan in candidates:
                planned = _sustained(worker, batches[shape], plan, device, span or SPANS[device.type])
                yield Trial(shape=shape, plan=plan, planned=planned, sequential=base)
    finally:
        worker.close()


def dense_batch(shape: BatchShape, page_size: int, vocab_size: int) -> DenseBatch:
    """A batch of a shape, random tokens on pages at random places: decodes, then equal chunks of prompts.

    Equal tokens would make equal rows, whose products take less power.

    What a shape leaves open: decodes see from few keys to twice the mean, each as many as any, for those of a server
    are anything but equal, and kernels that share keys evenly show it; chunks are as many as its sums ask for, each
    with as many keys before it.
    """
    now = np.array([1] * shape.num_decode_tokens + _chunks(shape), np.int64)
    num_decodes = shape.num_decode_tokens
    before = np.zeros_like(now)
    if num_decodes:
        before[:num_decodes] = _contexts(shape.decode_context, num_decodes) - 1
    if len(now) > num_decodes:
        before[num_decodes:] = max((shape.prefill_kv_tokens - now[num_decodes:].sum()) // (len(now) - num_decodes), 0)
    pages = -(-(before + now) // page_size)
    tables = np.zeros((len(now), int(pages.max())), np.int32)
    tables[np.arange(tables.shape[1]) < pages[:, None]] = np.random.default_rng(0).permutation(int(pages.sum()))
    request = np.repeat(np.arange(len(now)), now)
    start = np.concatenate(([0], np.cumsum(now)))
    positions = before[request] + np.arange(len(request)) - start[request]
    return DenseBatch(
        iteration=0,
        rows=np.arange(len(now), dtype=np.int32),
        epochs=np.zeros(len(now), np.int64),
        num_decodes=num_decodes,
        query_start=start.astype(np.int32),
        context_len=(before + now).astype(np.int32),
        token_ids=np.random.default_rng(1).integers(0, vocab_size, len(request), dtype=np.int32),
        is_fed_back=np.zeros(len(request), np.bool_),
        positions=positions.astype(np.int32),
        slots=(tables[request, positions // page_size] * page_size + positions % page_size).astype(np.int64),
        new_pages=NewPages.of_tables(tables),
        table_width=tables.shape[1],
        sampled=np.arange(min(shape.num_sampled, len(now)), dtype=np.int32),
        joined=tuple(_joined(row) for row in range(len(now))),
    )


def _contexts(num_keys: int, count: int) -> Int64:
    """Of decodes that see so many keys in all, one each at least: evenly from few to twice the mean, in any order."""
    mean = max(num_keys / count, 1.0)
    ends = np.round(np.cumsum(1.0 + (2.0 * (mean - 1.0) / count) * (np.arange(count) + 0.5))).astype(np.int64)
    return np.random.default_rng(2).permutation(np.diff(ends, prepend=0))


def _chunks(shape: BatchShape) -> list[int]:
    """Tokens of each chunk of a prompt: R of P / R tokens after b keys have R (b + P / R) keys to be read, and each
    token sees b + (P / R + 1) / 2 on average, hence R = (keys - P / 2) / (mean - 1 / 2)."""
    num_tokens = shape.num_tokens - shape.num_decode_tokens
    if not num_tokens:
        return []
    mean = shape.prefill_context / num_tokens
    count = (shape.prefill_kv_tokens - num_tokens / 2) / max(mean - 0.5, 0.5)
    count = min(max(round(count), 1), num_tokens)
    each, more = divmod(num_tokens, count)
    return [each + 1] * more + [each] * (count - more)


def _worker(
    profile: Profile,
    graph: OpGraph,
    plans: tuple[PipelinePlan, ...],
    batches: Sequence[DenseBatch],
    device: torch.device,
) -> Worker:
    """A worker with room for every batch; its weights and keys are random."""
    dtype: torch.dtype = getattr(torch, profile.dtype)
    kernels = kernels_for(device, dtype, graph.layer_operations)
    num_pages = max(int(batch.new_pages.pages.max()) + 1 for batch in batches)
    # A few caches of each layout, which layers take in turn.
    layouts = [(kind.attention.num_kv_heads, kind.attention.head_dim) for kind in graph.layers]
    caches: dict[tuple[int, int], tuple[LayerCache, ...]] = {}
    for layout in dict.fromkeys(layouts):
        alike = [kind for kind, other in zip(graph.layers, layouts, strict=True) if other == layout]
        few = graph.with_layers(alike[:_NUM_CACHES])
        caches[layout] = allocate_caches(
            few, num_pages=num_pages, page_size=profile.page_size, dtype=dtype, device=device
        )
        draw_keys(caches[layout], seed=0)
    model = DeviceModel(
        graph=graph,
        dtype=dtype,
        weights=random_weights(graph, dtype, device, seed=0),
        caches=tuple(caches[layout][layer % len(caches[layout])] for layer, layout in enumerate(layouts)),
        kernels=kernels,
    )
    is_captured = device.type == "cuda" and are_capturable(kernels, graph.layer_operations)
    return Worker(
        model,
        plans,
        max_batch_tokens=max(batch.num_tokens for batch in batches),
        num_rows=max(batch.num_requests for batch in batches),
        captured_pages=max(batch.table_width for batch in batches) if is_captured else None,
    )


def _sustained(worker: Worker, batch: DenseBatch, plan: PipelinePlan, device: torch.device, span: Span) -> Timing:
    # The first compiles, the second captures, and requests stay joined.
    for _ in range(3):
        worker.launch(batch, plan).result()
    batch = replace(batch, joined=())
    once_s = _run(worker, batch, plan, 2)
    if span.settle_s:
        once_s = _run(worker, batch, plan, math.ceil(span.settle_s / once_s))
    count = math.ceil(span.measure_s / once_s)
    with energy_of(device) as energy:
        time_s = _run(worker, batch, plan, count)
        used_j = energy.used_so_far_j()
    return Timing(time_s=time_s, energy_j=None if used_j is None else used_j / count)


def _run(worker: Worker, batch: DenseBatch, plan: PipelinePlan, count: int) -> float:
    """Seconds an iteration; the clock is the host's, and tokens that were read tell that the device is done."""
    start_s = time.perf_counter()
    queued: deque[Future[SampledTokens]] = deque()
    for _ in range(count):
        queued.append(worker.launch(batch, plan))
        if len(queued) > _IN_FLIGHT:
            queued.popleft().result()
    while queued:
        queued.popleft().result()
    return (time.perf_counter() - start_s) / count


def _joined(row: int) -> Joined:
    return Joined(
        row=row,
        params=SamplingParams(temperature=0.0, ignore_eos=True),
        seed=0,
        token_ids=np.zeros(1, np.int32),
        num_prompt_tokens=1,
        stop_token_ids=(),
    )
