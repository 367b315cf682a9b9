"""Each operation of a model alone on the whole device, as points of a profile.

What to measure is `work.py`'s, how long `sustained.py`'s. Two operations side by side are `pairs.py`'s business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

from nanoflow.batch import DenseBatch
from nanoflow.executor.buffers import Workspace
from nanoflow.executor.inputs import InputBuilder
from nanoflow.executor.sampler import Sampler
from nanoflow.graph.operation import LinearDims, Operation, OpKind, Scope
from nanoflow.kernels.dispatch import Kernels
from nanoflow.models.weights import random_weights
from nanoflow.profile.table import SAMPLING, Point
from nanoflow.profiler.site import (
    Site,
    attention_weights,
    equal_requests,
    holding,
    over_layers,
    random_workspace,
    shortened,
)
from nanoflow.profiler.sustained import Span, Sustained, Work, sustained
from nanoflow.profiler.work import Task, cache_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An operation with tensors to run on.

    Attributes:
        op: The operation.
        workspace: Its tensors.
        batch: What it is run on.
        num_calls: How often `work` calls it: in every layer that has it, or once.
        is_of_layers: It is in layers.
    """

    op: Operation
    workspace: Workspace
    batch: DenseBatch
    num_calls: int
    is_of_layers: bool = True

    def work(self, kernels: Kernels | None = None) -> Work:
        """The operation in every layer, or once outside of the layers; with other kernels if any are given."""
        workspace = self.workspace
        if kernels is not None:
            workspace = replace(workspace, model=replace(workspace.model, kernels=kernels))
        if self.is_of_layers:
            return over_layers(workspace, lambda op: op == self.op, self.batch)
        builder = InputBuilder(workspace.model.graph.ropes, num_rows=self.batch.num_requests, device=self.device)
        inputs = builder.build(self.batch)
        return lambda: workspace.run_whole((self.op,), inputs)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.workspace.model.device


@torch.inference_mode()
def measure_alone(site: Site, wanted: Collection[Task], span: Span | None = None) -> Iterator[Point]:
    """The point of each task, as soon as it is known; attentions last."""
    rows = [task for task in wanted if not task.num_requests]
    if rows:
        last = {SAMPLING, *(op.name for op in site.graph.epilogue)}
        num_rows = max((task.num_tokens for task in rows if task.operation in last), default=1)
        workspace = rows_workspace(site, max(task.num_tokens for task in rows), num_rows)
        for task in rows:
            yield _row_point(site, workspace, task, span)
        del workspace
    for task in wanted:
        if task.num_requests:
            yield _point(task, prepare_attention(site, task), span)


def rows_workspace(site: Site, num_tokens: int, num_rows: int = 1) -> Workspace:
    """Tensors for all operations but attentions, in so many layers that no product finds its weights in a cache."""
    products = [op.dims for op in site.graph.layer_operations if isinstance(op.dims, LinearDims)]
    smallest = min(dims.in_features * dims.out_features for dims in products)
    graph = shortened(site.graph, smallest * site.dtype.itemsize)
    weights = random_weights(graph, site.dtype, site.device, seed=0)
    num_pages = -(-num_tokens // site.page_size)
    return random_workspace(site, graph, weights, num_pages=num_pages, num_tokens=num_tokens, num_rows=num_rows)


def prepare_row(site: Site, workspace: Workspace, name: str, num_tokens: int) -> Prepared:
    """An operation of a row workspace on so many tokens, or rows after the last layer."""
    op = next(op for op in site.graph.operations() if op.key == name)
    is_of_layers = op in site.graph.layer_operations
    if op.scope is Scope.SAMPLED:
        batch = equal_requests(num_tokens, 0, 1, site.page_size, is_decode=True)
    else:
        batch = equal_requests(1, 0, num_tokens, site.page_size)
    num_calls = sum(op in kind.operations for kind in workspace.model.graph.layers) if is_of_layers else 1
    return Prepared(op=op, workspace=workspace, batch=batch, num_calls=num_calls, is_of_layers=is_of_layers)


def prepare_attention(site: Site, task: Task) -> Prepared:
    """An attention on keys and values of its own, in so many layers that they leave every cache."""
    op = next(op for op in site.graph.layer_operations if op.key == task.operation)
    now = task.num_tokens // task.num_requests
    is_decode = op.kind is OpKind.DECODE_ATTENTION
    batch = equal_requests(task.num_requests, task.before, now, site.page_size, is_decode=is_decode)
    graph = shortened(holding(site.graph, op.key), cache_bytes(site, task))
    workspace = random_workspace(
        site,
        graph,
        attention_weights(site, graph),
        num_pages=len(batch.new_pages),
        num_tokens=batch.num_tokens,
        num_rows=1,
    )
    return Prepared(op=op, workspace=workspace, batch=batch, num_calls=graph.num_layers)


def per_call(measured: Sustained, num_calls: int) -> Sustained:
    """The cost of one of several calls."""
    energy_j = None if measured.energy_j is None else measured.energy_j / num_calls
    return replace(measured, time_s=measured.time_s / num_calls, energy_j=energy_j)


def _row_point(site: Site, workspace: Workspace, task: Task, span: Span | None) -> Point:
    if task.operation != SAMPLING:
        return _point(task, prepare_row(site, workspace, task.operation, task.num_tokens), span)
    sampler = Sampler(num_rows=task.num_tokens, vocab_size=site.graph.vocab_size, device=site.device)
    batch = equal_requests(task.num_tokens, 0, 1, site.page_size, is_decode=True)
    logits = workspace.tensors["logits"][: task.num_tokens]

    def work() -> None:
        sampler.sample(batch, logits)

    return _as_point(task, sustained(work, site.device, span))


def _point(task: Task, prepared: Prepared, span: Span | None) -> Point:
    measured = sustained(prepared.work(), prepared.device, span)
    return _as_point(task, per_call(measured, prepared.num_calls))


def _as_point(task: Task, measured: Sustained) -> Point:
    return Point(
        operation=task.operation,
        num_tokens=task.num_tokens,
        context=task.context,
        time_s=measured.time_s,
        energy_j=measured.energy_j,
        spread=measured.spread,
        clock_mhz=measured.clock_mhz,
    )
