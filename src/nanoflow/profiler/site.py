"""Operations of a model on tensors of their own, at any size: what `alone.py` and the benchmarks' bounds measure.

Nothing of a running engine is touched. As many layers' weights and keys as it takes to leave every cache are gone
through in turn. How long the work is repeated is `sustained.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from nanoflow.batch import DenseBatch, NewPages
from nanoflow.executor.buffers import DeviceModel, Workspace, allocate_caches, draw_keys
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.graph import Element, LayerKind, OpGraph
from nanoflow.graph.operation import AttentionDims, LinearDims, Operation, OpKind
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.kernels.launch import BatchInputs
from nanoflow.models.fp8 import E4M3
from nanoflow.models.weights import Weights, random_weights
from nanoflow.profiler.sustained import Work

# Together several times larger than any cache.
_MIN_DATA_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where and with what to measure."""

    graph: OpGraph
    device: torch.device
    dtype: torch.dtype
    page_size: int


def gemms(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    """The products with weights of their own among operations; those of experts are others."""
    return tuple(op for op in operations if isinstance(op.dims, LinearDims))


def shortened(graph: OpGraph, layer_bytes: int) -> OpGraph:
    """The graph with only as many layers as it takes to leave every cache, some of every kind among them."""
    layers = graph.layers
    needed = max(layers.index(kind) for kind in graph.kinds) + 1
    return graph.with_layers(layers[: max(needed, -(-_MIN_DATA_BYTES // layer_bytes))])


def holding(graph: OpGraph, key: str) -> OpGraph:
    """The graph with the layers alone that have the operation of this key."""
    return graph.with_layers([kind for kind in graph.layers if any(op.key == key for op in kind.operations)])


def attention_weights(site: Site, graph: OpGraph) -> Weights:
    """Random parameters of the layers' attentions alone: most have none, some have sinks."""

    def bare(kind: LayerKind) -> LayerKind:
        needed = {name for op in kind.operations if isinstance(op.dims, AttentionDims) for name in op.weights}
        return replace(kind, parameters=tuple(each for each in kind.parameters if each.name in needed))

    return random_weights(replace(graph.map_kinds(bare), parameters=()), site.dtype, site.device, seed=0)


def random_workspace(
    site: Site, graph: OpGraph, weights: Weights, *, num_pages: int, num_tokens: int, num_rows: int
) -> Workspace:
    """Tensors of so many tokens, rows with logits and pages, all random: zeros would take less power.

    Tensors of indices hold zeros; `over_layers` has them written by the operations that do so.
    """
    caches = allocate_caches(graph, num_pages=num_pages, page_size=site.page_size, dtype=site.dtype, device=site.device)
    kernels = kernels_for(site.device, site.dtype, graph.layer_operations)
    model = DeviceModel(graph=graph, dtype=site.dtype, weights=weights, caches=caches, kernels=kernels)
    workspace = Workspace.allocate(model, num_tokens=num_tokens, num_logits=num_rows)
    for tensor in workspace.tensors.values():
        if tensor.dtype == E4M3:
            # torch draws no numbers of this type.
            tensor.copy_(torch.randn(tensor.shape, dtype=site.dtype, device=site.device))
        else:
            _ = tensor.normal_() if tensor.is_floating_point() else tensor.zero_()
    draw_keys(caches, seed=0)
    return workspace


def over_layers(workspace: Workspace, wanted: Callable[[Operation], bool], batch: DenseBatch) -> Work:
    """The operations that are wanted of every layer on a batch, as a function.

    Indices that they read are written before, once: random ones would be out of range.
    """
    model = workspace.model
    of_layers = [tuple(filter(wanted, kind.operations)) for kind in model.graph.layers]
    inputs = InputBuilder(model.graph.ropes, num_rows=batch.num_requests, device=model.device).build(batch)
    indices = _indices(model.graph)
    for layer, operations in enumerate(of_layers):
        if any(indices & {*op.reads} for op in operations):
            _write_indices(workspace, inputs, layer)
            break

    def work() -> None:
        for layer, operations in enumerate(of_layers):
            workspace.run_whole(operations, inputs, layer)

    return work


def writes_indices(graph: OpGraph, op: Operation) -> bool:
    """Whether an operation chooses rows for others: a router, and the order of rows by expert."""
    return bool(_indices(graph) & {*op.writes})


def _indices(graph: OpGraph) -> set[str]:
    return {spec.name for spec in graph.tensors if spec.element is Element.INT32}


def _write_indices(workspace: Workspace, inputs: BatchInputs, layer: int) -> None:
    """By the layer's own operations; a graph with a skew has experts drawn by their popularity instead."""
    graph = workspace.model.graph
    operations = graph.layers[layer].operations
    routing = next((op.dims.routing for op in operations if isinstance(op.dims, ExpertDims)), None)
    for op in operations:
        if writes_indices(graph, op):
            workspace.run_whole([op], inputs, layer)
        if op.kind is OpKind.ROUTER and routing is not None and routing.skew:
            ids = workspace.tensors[op.writes[1]]
            popularity = torch.tensor(routing.popularity, device=ids.device).expand(len(ids), -1)
            ids.copy_(torch.multinomial(popularity, routing.num_per_token))


def equal_requests(num_requests: int, before: int, now: int, page_size: int, *, is_decode: bool = False) -> DenseBatch:
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
        new_pages=NewPages.of_tables(tables.astype(np.int32)),
        table_width=tables.shape[1],
        sampled=np.arange(num_requests, dtype=np.int32),
    )
