"""Measure what each kind of operation takes alone on this device, at the sizes of a workload's typical batch.

It runs the engine's own kernels on tensors of its own, which are freed before the engine is built. On a GPU the work is
one CUDA graph, replayed for long enough that power and clocks have settled. What the costs add up to: `bound.py`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.batch import DenseBatch
from nanoflow.bench.bound import Bounds, Cost, Rates, TypicalBatch, bounds_of, typical_batch, visible_keys, work_of
from nanoflow.bench.workload import Lengths
from nanoflow.config import EngineConfig
from nanoflow.device.detect import resolve_device, resolve_dtype
from nanoflow.device.energy import gpu_energy_j
from nanoflow.engine.build import resolve_model
from nanoflow.executor.buffers import DeviceModel, Workspace, allocate_caches
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import LinearDims, Operation, OpKind
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import Weights, random_weights

# As many layers' weights and keys are gone through in turn, so that none is found in a cache.
_MIN_DATA_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """How long to run something, without and then with looking at the clock."""

    settle_s: float
    measure_s: float


# A GPU is limited by power: a burst flatters it, and its energy counter is coarse.
_SPANS = {"cuda": Span(settle_s=0.4, measure_s=1.0), "cpu": Span(settle_s=0.0, measure_s=0.05)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """Where and with what to measure."""

    graph: OpGraph
    device: torch.device
    dtype: torch.dtype
    page_size: int


@torch.inference_mode()
def measure_bounds(config: EngineConfig, lengths: Sequence[Lengths]) -> Bounds:
    """The bounds of requests of these lengths on the model and device of a config; takes some seconds on a GPU.

    Raises:
        ConfigError, ModelError: The device is not there, or the model cannot be served.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    model_config, _ = resolve_model(config)
    graph = build_graph(model_config, config.max_model_len)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    batch = typical_batch(lengths, max_batch_tokens=config.max_batch_tokens, max_num_seqs=config.max_num_seqs)
    rates = _measure_rates(_Site(graph=graph, device=device, dtype=dtype, page_size=config.page_size), batch)
    if device.type == "cuda":
        # The engine sizes its cache by what the driver says is free.
        torch.cuda.empty_cache()
    return bounds_of(graph, work_of(lengths, graph.attention.windows), batch, rates, dtype.itemsize)


def _measure_rates(site: _Site, batch: TypicalBatch) -> Rates:
    """Measure the GEMMs, the language-model head and both attentions, each alone."""
    token, logit_row = _measure_gemms(site, batch)
    decode_key = None
    if batch.num_decodes:
        requests = _batch(batch.num_decodes, batch.decode_context - 1, 1, site.page_size, is_decode=True)
        decode_key = _measure_attention(site, OpKind.DECODE_ATTENTION, requests)
    requests = _batch(batch.num_prefills, batch.prefill_before, batch.prefill_tokens, site.page_size)
    prefill_key = _measure_attention(site, OpKind.PREFILL_ATTENTION, requests)
    return Rates(token=token, logit_row=logit_row, decode_key=decode_key, prefill_key=prefill_key)


def _measure_gemms(site: _Site, batch: TypicalBatch) -> tuple[Cost, Cost]:
    """A token through the GEMMs of all layers, and a row through the language-model head."""
    layer_elements = sum(parameter.num_elements for parameter in site.graph.layer_parameters)
    graph = _shortened(site.graph, layer_elements * site.dtype.itemsize)
    weights = random_weights(graph, site.dtype, site.device, seed=0)
    workspace = _workspace(
        site, graph, weights, num_pages=1, num_tokens=batch.num_tokens, num_rows=batch.num_logit_rows
    )
    whole = _batch(1, 0, batch.num_tokens, site.page_size)
    passes = _sustained(_over_layers(workspace, _gemms(graph.layer), whole), site.device)
    rows = _batch(batch.num_logit_rows, 0, 1, site.page_size, is_decode=True)
    inputs = InputBuilder(graph.rope, num_rows=rows.num_requests, device=site.device).build(rows)
    head = _gemms(graph.epilogue)
    logits = _sustained(lambda: workspace.run_whole(head, inputs), site.device)
    share_of_model = graph.num_layers / site.graph.num_layers
    return passes.divided_by(batch.num_tokens * share_of_model), logits.divided_by(batch.num_logit_rows)


def _measure_attention(site: _Site, kind: OpKind, requests: DenseBatch) -> Cost:
    """One key of one layer in attention of this kind on these requests."""
    num_keys = int(requests.context_len.sum())
    graph = _shortened(site.graph, 2 * num_keys * site.graph.attention.kv_width * site.dtype.itemsize)
    weights = Weights(shared={}, layers=({},) * graph.num_layers)
    workspace = _workspace(
        site,
        graph,
        weights,
        num_pages=requests.page_tables.size,
        num_tokens=requests.num_tokens,
        num_rows=requests.num_requests,
    )
    operations = tuple(op for op in graph.layer if op.kind is kind)
    windows = graph.attention.windows[: graph.num_layers]
    visible = visible_keys(requests.positions.astype(np.int64) + 1, windows)
    return _sustained(_over_layers(workspace, operations, requests), site.device).divided_by(visible)


def _gemms(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    return tuple(op for op in operations if isinstance(op.dims, LinearDims))


def _shortened(graph: OpGraph, layer_bytes: int) -> OpGraph:
    """The graph with only as many layers as it takes to leave every cache."""
    return dataclasses.replace(graph, num_layers=min(graph.num_layers, -(-_MIN_DATA_BYTES // layer_bytes)))


def _workspace(
    site: _Site, graph: OpGraph, weights: Weights, *, num_pages: int, num_tokens: int, num_rows: int
) -> Workspace:
    """Tensors of so many tokens, rows with logits and pages, all random: zeros would take less power."""
    caches = allocate_caches(graph, num_pages=num_pages, page_size=site.page_size, dtype=site.dtype, device=site.device)
    kernels = kernels_for(site.device, site.dtype, graph.layer)
    model = DeviceModel(graph=graph, weights=weights, caches=caches, kernels=kernels)
    workspace = Workspace.allocate(model, num_tokens=num_tokens, num_logits=num_rows)
    for tensor in (*workspace.tensors.values(), *(part for cache in caches for part in (cache.keys, cache.values))):
        tensor.normal_()
    return workspace


def _over_layers(workspace: Workspace, operations: tuple[Operation, ...], batch: DenseBatch) -> Callable[[], None]:
    """The operations on a batch in every layer, as a function."""
    model = workspace.model
    inputs = InputBuilder(model.graph.rope, num_rows=batch.num_requests, device=model.device).build(batch)

    def work() -> None:
        for layer in range(model.graph.num_layers):
            workspace.run_whole(operations, inputs, layer)

    return work


def _batch(num_requests: int, before: int, now: int, page_size: int, *, is_decode: bool = False) -> DenseBatch:
    """Equal requests with so many tokens before and now, on pages at random places."""
    pages_each = -(-(before + now) // page_size)
    tables = np.random.default_rng(0).permutation(num_requests * pages_each).reshape(num_requests, pages_each)
    places = np.arange(before, before + now)
    slots = tables[:, places // page_size] * page_size + places % page_size
    return DenseBatch(
        iteration=1,
        rows=np.arange(num_requests, dtype=np.int32),
        epochs=np.zeros(num_requests, np.int64),
        num_decodes=num_requests if is_decode else 0,
        query_start=np.arange(0, num_requests * now + 1, now, dtype=np.int32),
        context_len=np.full(num_requests, before + now, np.int32),
        token_ids=np.zeros(num_requests * now, np.int32),
        is_fed_back=np.zeros(num_requests * now, np.bool_),
        positions=np.tile(places, num_requests).astype(np.int32),
        slots=slots.reshape(-1).astype(np.int64),
        page_tables=tables.astype(np.int32),
        sampled=np.arange(num_requests, dtype=np.int32),
    )


def _sustained(work: Callable[[], None], device: torch.device) -> Cost:
    """The cost of calling `work` once, among many calls back to back."""
    span = _SPANS[device.type]
    work()
    run = _captured(work, device) if device.type == "cuda" else work
    once_s = _elapsed_s(run, 1, device)
    if span.settle_s:
        num_calls = math.ceil(span.settle_s / once_s)
        once_s = _elapsed_s(run, num_calls, device) / num_calls
    num_calls = math.ceil(span.measure_s / once_s)
    start_j = _energy_j(device)
    total_s = _elapsed_s(run, num_calls, device)
    stop_j = _energy_j(device)
    energy_j = None if start_j is None or stop_j is None else stop_j - start_j
    return Cost(time_s=total_s, energy_j=energy_j).divided_by(num_calls)


def _captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same work as a CUDA graph, which the host launches at once."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        work()
    return graph.replay


def _elapsed_s(run: Callable[[], None], num_calls: int, device: torch.device) -> float:
    """Seconds until the device has done all of it; the clock is the host's, so both ends wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    for _ in range(num_calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def _energy_j(device: torch.device) -> float | None:
    return gpu_energy_j(device.index or 0) if device.type == "cuda" else None
