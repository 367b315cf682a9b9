"""Products of a layer that carry decode attention: the part of their speed alone that both keep.

They are measured as an iteration runs them: one attention, and all products of a layer, which carry it. The attention
is as long as fits between the k-steps of the products, so that neither side is left alone at the end; the carrier says
how much fits. Products with nothing to carry are measured in the same kernel as well. That is what a plan pays for
products that carry little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from nanoflow.batch import DenseBatch
from nanoflow.device.detect import count_sms
from nanoflow.executor.buffers import Workspace
from nanoflow.executor.carry import Carrier, shares_by_rounds
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.fp8 import products_in_blocks
from nanoflow.graph.operation import KEY_BLOCK, Operation, OpKind
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.kernels.hopper import can_carry, share_of
from nanoflow.kernels.launch import BatchInputs, Kernel, Launch
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.carry import PRODUCTS
from nanoflow.profile.table import PairPoint
from nanoflow.profiler.alone import Prepared, per_call, prepare_attention, rows_workspace
from nanoflow.profiler.pairs import largest_half
from nanoflow.profiler.site import Site, equal_requests, gemms, over_layers
from nanoflow.profiler.sustained import SPANS, Span, Sustained, Work, sustained
from nanoflow.profiler.work import Sizes, Task, cache_bytes, decode_task

_TOKENS = (256, 384, 512, 768, 1024, 2048, 4096)
# K-steps to a block of keys.
_STEPS = (2, 3, 4)
_CONTEXT = 1280
_WARPGROUPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryTask:
    """Products on so many tokens, with attention that fills them, or with none.

    Attributes:
        mechanism: Of the pair that it becomes.
        num_tokens: Of the products.
        steps: Of theirs to a block of keys.
        attention: What they carry.
        products: One of them, or all of a layer.
        is_empty: They carry nothing of it, though they could.
    """

    mechanism: Mechanism = Mechanism.INSIDE
    num_tokens: int
    steps: int
    attention: Task
    products: str = PRODUCTS
    is_empty: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """`PairPoint.key` of its pair."""
        return (
            *(self.products, self.attention.operation, self.num_tokens, self.attention.num_tokens, self.context),
            *(self.mechanism, share_of(self.steps)),
        )

    @property
    def context(self) -> float:
        """Keys of each token of the attention; 0 if the products carry nothing."""
        return 0.0 if self.is_empty else self.attention.context


def carry_tasks(site: Site, sizes: Sizes, num_sms: int) -> list[CarryTask]:
    """Nothing where products do not carry; no product that is filled by more keys than `sizes` has memory for."""
    attention = next(op for op in site.graph.layer if op.kind is OpKind.DECODE_ATTENTION)
    has_products = OpKind.LINEAR_SWIGLU in kernels_for(site.device, site.dtype, site.graph.layer_operations)
    has_products &= not products_in_blocks(site.graph)
    attentions = [kind.attention for kind in site.graph.kinds]
    if not has_products or not all(can_carry(site.device, site.dtype, dims) for dims in attentions):
        return []
    from nanoflow.kernels.hopper.carry import HopperCarrier

    blocks_each = attentions[0].num_kv_heads * -(-_CONTEXT // KEY_BLOCK)
    products = gemms(site.graph.layer)

    def task(name: str, num_tokens: int, steps: int, *, is_empty: bool) -> CarryTask:
        carrier = HopperCarrier(num_sms=num_sms, steps=steps)
        ops = [op for op in products if name in (PRODUCTS, op.name)]
        rounds = sum(carrier.rounds(op, num_tokens) for op in ops)
        num_requests = max(rounds * _WARPGROUPS * num_sms // blocks_each, 1)
        keys = decode_task(attention, num_requests, _CONTEXT)
        return CarryTask(num_tokens=num_tokens, steps=steps, attention=keys, products=name, is_empty=is_empty)

    found = []
    for num_tokens in sorted({min(count, largest_half(sizes.max_tokens)) for count in _TOKENS}):
        full = [task(PRODUCTS, num_tokens, steps, is_empty=False) for steps in _STEPS]
        found += [each for each in full if cache_bytes(site, each.attention) <= sizes.max_cache_bytes]
        # With nothing to carry the rate makes no difference.
        names = (PRODUCTS, *(op.name for op in products))
        found += [task(name, num_tokens, _STEPS[-1], is_empty=True) for name in names]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryCosts:
    """Products, an attention, and both in one; of one layer. No attention if the products carry nothing."""

    products: Sustained
    attention: Sustained | None
    together: Sustained


@torch.inference_mode()
def measure_carry(site: Site, wanted: Collection[CarryTask], span: Span | None = None) -> Iterator[PairPoint]:
    """The pair of each task, as soon as it is known."""
    for task in wanted:
        yield _pair(task, measure_costs(site, task, span or SPANS[site.device.type]))


@torch.inference_mode()
def measure_costs(site: Site, task: CarryTask, span: Span) -> CarryCosts:
    """Both sides alone, one after the other, and together."""
    carrier = _carrier(site.device, task.steps)
    products, attention = rows_workspace(site, task.num_tokens), prepare_attention(site, task.attention)
    batch = equal_requests(1, 0, task.num_tokens, site.page_size)
    ops = tuple(op for op in gemms(site.graph.layer) if task.products in (PRODUCTS, op.name))
    num_layers = products.model.graph.num_layers
    multiply = sustained(over_layers(products, ops.__contains__, batch), site.device, span)
    attend = None if task.is_empty else sustained(attention.work(), site.device, span)
    # As often as it takes to go through the layers of both.
    num_turns = num_layers if task.is_empty else max(num_layers, attention.num_calls)
    work = _carrying(ops, products, batch, attention, carrier, num_turns=num_turns, is_empty=task.is_empty)
    together = sustained(work, site.device, span)
    return CarryCosts(
        products=per_call(multiply, num_layers),
        attention=None if attend is None else per_call(attend, attention.num_calls),
        together=per_call(together, num_turns),
    )


def _carrier(device: torch.device, steps: int) -> Carrier:
    from nanoflow.kernels.hopper.carry import HopperCarrier

    return HopperCarrier(num_sms=count_sms(device), steps=steps)


def _pair(task: CarryTask, costs: CarryCosts) -> PairPoint:
    together = costs.together
    alone = [cost for cost in (costs.products, costs.attention) if cost is not None]
    alone_j = [cost.energy_j for cost in alone if cost.energy_j is not None]
    is_known = together.energy_j is not None and len(alone_j) == len(alone)
    return PairPoint(
        first=task.products,
        second=task.attention.operation,
        first_tokens=task.num_tokens,
        second_tokens=task.attention.num_tokens,
        second_context=task.context,
        mechanism=task.mechanism,
        share=share_of(task.steps),
        first_performance=costs.products.time_s / together.time_s,
        second_performance=0.0 if costs.attention is None else costs.attention.time_s / together.time_s,
        energy_ratio=together.energy_j / sum(alone_j) if is_known and together.energy_j is not None else None,
        power_w=None if together.energy_j is None else together.energy_j / together.time_s,
    )


def _carrying(
    ops: Sequence[Operation],
    products: Workspace,
    batch: DenseBatch,
    attention: Prepared,
    carrier: Carrier,
    *,
    num_turns: int,
    is_empty: bool,
) -> Work:
    """Attention, carried by some products of a layer, so many times; layers of both in turn."""
    rounds = [carrier.rounds(op, batch.num_tokens) for op in ops]
    shares = [0] * len(ops) if is_empty else shares_by_rounds(rounds)
    taken: list[Any] = []

    def take(launch: Launch) -> None:
        taken.append(carrier.take(launch, len(ops) + 1))

    def carry(until: int, launch: Launch) -> None:
        carrier.run(launch, taken[-1], until)

    def ready(workspace: Workspace, kernel: Kernel, batch: DenseBatch) -> tuple[Workspace, BatchInputs]:
        model = workspace.model
        inputs = InputBuilder(model.graph.ropes, num_rows=batch.num_requests, device=model.device).build(batch)
        kernels = dict.fromkeys(model.kernels, kernel)
        return replace(workspace, model=replace(model, kernels=kernels)), inputs

    keys, key_inputs = ready(attention.workspace, take, attention.batch)
    carrying = [ready(products, partial(carry, until), batch) for until in shares]

    def work() -> None:
        for turn in range(num_turns):
            keys.run_whole((attention.op,), key_inputs, turn % keys.model.graph.num_layers)
            for op, (workspace, inputs) in zip(ops, carrying, strict=True):
                workspace.run_whole((op,), inputs, turn % workspace.model.graph.num_layers)
            note = taken.pop()
            if not is_empty:
                carrier.finish(note)

    return work
