"""A layer's products with decode attention inside them: what both keep of their speed alone.

As an iteration runs them: one attention, and all products of a layer, which carry it. There is as much attention as
fits in the rounds of the products, so that neither side is left alone at the end. What fits where, the carrier knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from nanoflow.batch import DenseBatch
from nanoflow.cost.table import PairPoint
from nanoflow.executor.buffers import Workspace
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.operation import LinearDims, OpKind
from nanoflow.kernels.carrier import GluonCarrier, can_carry, share_of
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.kernels.launch import KEY_BLOCK, SHARES, BatchInputs, Kernel, Launch
from nanoflow.plan.plan import Mechanism
from nanoflow.profiler.alone import Prepared, per_call, prepare_attention, rows_workspace
from nanoflow.profiler.site import Site, equal_requests, gemms, over_layers
from nanoflow.profiler.sustained import SPANS, Span, Sustained, Work, sustained
from nanoflow.profiler.work import Task, decode_task

# What a pair calls the products of a layer.
PRODUCTS = "products"
_TOKENS = (256, 512, 1024)
# K-steps to a block of keys.
_STEPS = (2, 4)
_CONTEXT = 1280
_WARPGROUPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class InsideTask:
    """All products of a layer on so many tokens, with attention that fills them."""

    num_tokens: int
    steps: int
    attention: Task


def inside_tasks(site: Site, max_tokens: int, num_sms: int) -> list[InsideTask]:
    """Nothing where products do not carry."""
    attention = next(op for op in site.graph.layer if op.kind is OpKind.DECODE_ATTENTION)
    has_products = OpKind.LINEAR_SWIGLU in kernels_for(site.device, site.dtype, site.graph.layer)
    if not has_products or not can_carry(site.device, site.dtype, site.graph.attention):
        return []
    blocks_each = site.graph.attention.num_kv_heads * -(-_CONTEXT // KEY_BLOCK)
    found = []
    for num_tokens in sorted({min(count, max_tokens) for count in _TOKENS}):
        for steps in _STEPS:
            carrier = GluonCarrier(num_sms=num_sms, steps=steps)
            rounds = sum(
                carrier.rounds(op.dims, num_tokens) for op in site.graph.layer if isinstance(op.dims, LinearDims)
            )
            num_requests = max(rounds * _WARPGROUPS * num_sms // blocks_each, 1)
            task = decode_task(attention, num_requests, _CONTEXT)
            found.append(InsideTask(num_tokens=num_tokens, steps=steps, attention=task))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class InsideCosts:
    """The products of a layer, an attention, and that attention inside those products; of one layer."""

    products: Sustained
    attention: Sustained
    together: Sustained


@torch.inference_mode()
def measure_inside(site: Site, wanted: Collection[InsideTask], span: Span | None = None) -> Iterator[PairPoint]:
    """The pair of each task, as soon as it is known."""
    for task in wanted:
        yield _pair(task, measure_costs(site, task, span or SPANS[site.device.type]))


@torch.inference_mode()
def measure_costs(site: Site, task: InsideTask, span: Span) -> InsideCosts:
    """Both sides alone, one after the other, and together."""
    num_sms = torch.cuda.get_device_properties(site.device).multi_processor_count
    carrier = GluonCarrier(num_sms=num_sms, steps=task.steps)
    products, attention = rows_workspace(site, task.num_tokens), prepare_attention(site, task.attention)
    batch = equal_requests(1, 0, task.num_tokens, site.page_size)
    num_layers = products.model.graph.num_layers
    multiply = sustained(over_layers(products, gemms(site.graph.layer), batch), site.device, span)
    attend = sustained(attention.work(), site.device, span)
    # As often as it takes to go through the layers of both.
    num_turns = max(num_layers, attention.num_calls)
    together = sustained(_inside(products, batch, attention, carrier, num_turns), site.device, span)
    return InsideCosts(
        products=per_call(multiply, num_layers),
        attention=per_call(attend, attention.num_calls),
        together=per_call(together, num_turns),
    )


def _pair(task: InsideTask, costs: InsideCosts) -> PairPoint:
    together = costs.together
    alone_j = [cost.energy_j for cost in (costs.products, costs.attention) if cost.energy_j is not None]
    is_known = together.energy_j is not None and len(alone_j) == 2
    return PairPoint(
        first=PRODUCTS,
        second=task.attention.operation,
        first_tokens=task.num_tokens,
        second_tokens=task.attention.num_tokens,
        second_context=task.attention.context,
        mechanism=Mechanism.INSIDE,
        share=share_of(task.steps),
        first_performance=costs.products.time_s / together.time_s,
        second_performance=costs.attention.time_s / together.time_s,
        energy_ratio=together.energy_j / sum(alone_j) if is_known and together.energy_j is not None else None,
        power_w=None if together.energy_j is None else together.energy_j / together.time_s,
    )


def _inside(products: Workspace, batch: DenseBatch, attention: Prepared, carrier: GluonCarrier, num_turns: int) -> Work:
    """Attention, carried by the products of a layer, so many times; layers of both in turn."""
    ops = gemms(products.model.graph.layer)
    rounds = [carrier.rounds(op.dims, batch.num_tokens) for op in ops if isinstance(op.dims, LinearDims)]
    shares = [round(SHARES * done / sum(rounds)) for done in accumulate(rounds)]
    taken: list[Any] = []

    def take(launch: Launch) -> None:
        taken.append(carrier.take(launch, len(ops) + 1))

    def carry(until: int, launch: Launch) -> None:
        carrier.run(launch, taken[-1], until)

    def ready(workspace: Workspace, kernel: Kernel, batch: DenseBatch) -> tuple[Workspace, BatchInputs]:
        model = workspace.model
        inputs = InputBuilder(model.graph.rope, num_rows=batch.num_requests, device=model.device).build(batch)
        kernels = dict.fromkeys(model.kernels, kernel)
        return replace(workspace, model=replace(model, kernels=kernels)), inputs

    keys, key_inputs = ready(attention.workspace, take, attention.batch)
    carrying = [ready(products, partial(carry, until), batch) for until in shares]

    def work() -> None:
        for turn in range(num_turns):
            keys.run_whole((attention.op,), key_inputs, turn % keys.model.graph.num_layers)
            for op, (workspace, inputs) in zip(ops, carrying, strict=True):
                workspace.run_whole((op,), inputs, turn % workspace.model.graph.num_layers)
            carrier.finish(taken.pop())

    return work
