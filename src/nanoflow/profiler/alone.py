"""Each operation of a layer alone on the device, at every size that a plan may ask for.

Products and row-wise operations are measured at multiples of a step up to the token budget, so that the borders of
waves are visible; attentions also over contexts. A task that has been measured is not measured again, so a profile can
be resumed. Two operations side by side are another file's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from nanoflow.batch import DenseBatch
from nanoflow.executor.buffers import Workspace
from nanoflow.graph.operation import Operation, OpKind
from nanoflow.models.weights import Weights, random_weights
from nanoflow.profiler.site import Site, equal_requests, over_layers, random_workspace, shortened
from nanoflow.profiler.sustained import Sustained, sustained

_ATTENTIONS = (OpKind.DECODE_ATTENTION, OpKind.PREFILL_ATTENTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What to measure.

    Attributes:
        max_tokens: The token budget.
        step: Products and row-wise operations at each multiple of it.
        decode_requests, decode_contexts: Decode attention at each pair: requests, keys of each.
        prefill_tokens, prefill_before: Prefill attention at each pair: tokens of one chunk, keys before it.
        max_cache_bytes: Pairs whose keys and values of one layer take more are left out.
    """

    max_tokens: int
    step: int = 128
    decode_requests: tuple[int, ...] = (16, 64, 128, 256, 512, 768, 1024)
    decode_contexts: tuple[int, ...] = (256, 1024, 4096)
    prefill_tokens: tuple[int, ...] = (128, 512, 1024, 2048)
    prefill_before: tuple[int, ...] = (0, 1024, 4096)
    max_cache_bytes: int = 16 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One point of a profile.

    Attributes:
        operation: Name in the layer.
        num_tokens: Tokens it works on.
        context: Keys that an attention reads for each request, its own tokens among them; 0 for other operations.
    """

    operation: str
    num_tokens: int
    context: int = 0


def tasks(site: Site, sizes: Sizes) -> list[Task]:
    """Every point, those of one operation together, small sizes first."""
    found: list[Task] = []
    for op in site.graph.layer:
        if op.kind in _ATTENTIONS:
            found += [
                task for task in _attention_tasks(op, sizes) if _cache_bytes(site, op, task) <= sizes.max_cache_bytes
            ]
        else:
            counts = range(sizes.step, sizes.max_tokens + 1, sizes.step)
            found += [Task(operation=op.name, num_tokens=count) for count in counts]
    return found


def measure_alone(site: Site, wanted: Collection[Task]) -> Iterator[tuple[Task, Sustained]]:
    """The cost of each task in one layer, as soon as it is known."""
    operations = {op.name: op for op in site.graph.layer}
    rows = [task for task in wanted if operations[task.operation].kind not in _ATTENTIONS]
    if rows:
        workspace = _layers_with_weights(site, max(task.num_tokens for task in rows))
        for task in rows:
            batch = equal_requests(1, 0, task.num_tokens, site.page_size)
            yield task, _per_layer(site, workspace, operations[task.operation], batch)
        del workspace
    for task in wanted:
        op = operations[task.operation]
        if op.kind in _ATTENTIONS:
            yield task, _attention(site, op, task)


def _attention_tasks(op: Operation, sizes: Sizes) -> Iterator[Task]:
    if op.kind is OpKind.DECODE_ATTENTION:
        pairs = [(count, context) for count in sizes.decode_requests for context in sizes.decode_contexts]
    else:
        pairs = [(count, before + count) for count in sizes.prefill_tokens for before in sizes.prefill_before]
    for num_tokens, context in pairs:
        if num_tokens <= sizes.max_tokens:
            yield Task(operation=op.name, num_tokens=num_tokens, context=context)


def _cache_bytes(site: Site, op: Operation, task: Task) -> int:
    """Keys and values of one layer that a task reads."""
    num_requests = task.num_tokens if op.kind is OpKind.DECODE_ATTENTION else 1
    return 2 * num_requests * task.context * site.graph.attention.kv_width * site.dtype.itemsize


def _layers_with_weights(site: Site, num_tokens: int) -> Workspace:
    elements = sum(parameter.num_elements for parameter in site.graph.layer_parameters)
    graph = shortened(site.graph, elements * site.dtype.itemsize)
    weights = random_weights(graph, site.dtype, site.device, seed=0)
    num_pages = -(-num_tokens // site.page_size)
    return random_workspace(site, graph, weights, num_pages=num_pages, num_tokens=num_tokens, num_rows=1)


def _attention(site: Site, op: Operation, task: Task) -> Sustained:
    is_decode = op.kind is OpKind.DECODE_ATTENTION
    now = 1 if is_decode else task.num_tokens
    num_requests = task.num_tokens if is_decode else 1
    requests = equal_requests(num_requests, task.context - now, now, site.page_size, is_decode=is_decode)
    graph = shortened(site.graph, _cache_bytes(site, op, task))
    workspace = random_workspace(
        site,
        graph,
        Weights(shared={}, layers=({},) * graph.num_layers),
        num_pages=requests.page_tables.size,
        num_tokens=requests.num_tokens,
        num_rows=num_requests,
    )
    return _per_layer(site, workspace, op, requests)


@torch.inference_mode()
def _per_layer(site: Site, workspace: Workspace, op: Operation, batch: DenseBatch) -> Sustained:
    measured = sustained(over_layers(workspace, (op,), batch), site.device)
    num_layers = workspace.model.graph.num_layers
    return Sustained(
        time_s=measured.time_s / num_layers,
        energy_j=None if measured.energy_j is None else measured.energy_j / num_layers,
        spread=measured.spread,
        clock_mhz=measured.clock_mhz,
    )
