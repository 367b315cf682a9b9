"""FLOPs, bytes and joules of every operation of an iteration, and the time that each resource would need for it.

Costs are sums over all GPUs; `OperationCost.per_gpu` is one GPU's even share. Tensor parallelism appears as collectives
(`exchange`), which the executed graph does not have. `analysis.py` applies this to workloads.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from nanoflow.cost.model import CostedModel
from nanoflow.graph.operation import FP8_PRODUCTS, BatchShape, LinearDims, Operation
from nanoflow.graph.shard import Exchange, ends_block, reads_attention, width_of
from nanoflow.hardware import GpuGroup, ResourceRates


class Bound(enum.StrEnum):
    """What takes longest: one of the resources, or the power limit."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"
    POWER = "power"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationCost:
    """The cost of an operation or a collective in one iteration: sum over all layers and GPUs.

    `fp8_flops` are those of `flops` that are in FP8.
    """

    name: str
    flops: float
    memory_bytes: float
    network_bytes: float = 0.0
    fp8_flops: float = 0.0

    def per_gpu(self, num_gpus: int) -> OperationCost:
        """One GPU's even share. Inputs that every GPU reads are counted once, as in the paper."""
        return OperationCost(
            name=self.name,
            flops=self.flops / num_gpus,
            memory_bytes=self.memory_bytes / num_gpus,
            network_bytes=self.network_bytes / num_gpus,
            fp8_flops=self.fp8_flops / num_gpus,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceTimes:
    """The time that each resource alone would need for some work; `power_s` is None if the energy is unknown."""

    compute_s: float
    memory_s: float
    network_s: float
    power_s: float | None

    @property
    def by_bound(self) -> dict[Bound, float]:
        """The known times; on a tie the first entry names the bound."""
        times_s = {Bound.COMPUTE: self.compute_s, Bound.MEMORY: self.memory_s, Bound.NETWORK: self.network_s}
        return times_s if self.power_s is None else {**times_s, Bound.POWER: self.power_s}

    @property
    def bound(self) -> Bound:
        """The resource that takes longest."""
        times_s = self.by_bound
        return max(times_s, key=times_s.__getitem__)

    @property
    def longest_s(self) -> float:
        """The time of the slowest resource, a lower bound."""
        return max(self.by_bound.values())


def iteration_costs(
    model: CostedModel, shape: BatchShape, num_gpus: int = 1, exchange: Exchange = Exchange.ALL_REDUCE
) -> tuple[OperationCost, ...]:
    """The cost of every operation of one iteration in the graph's order; with several GPUs also of the collectives."""
    costs = [_cost(model, op, shape, 1) for op in model.graph.prologue]
    for op in model.graph.layer:
        before, after = _collectives(model, op, shape, num_gpus, exchange)
        costs += [*before, _in_layers(model, op.name, shape), *after]
    return (*costs, *(_cost(model, op, shape, 1) for op in model.graph.epilogue))


def _in_layers(model: CostedModel, name: str, shape: BatchShape) -> OperationCost:
    """The cost of the operations of one name, summed over all layers."""
    of_kinds = (
        _cost(model, op, shape, count)
        for kind, count in model.graph.kind_counts
        for op in kind.operations
        if op.name == name
    )
    return total(of_kinds, name)


def total(costs: Iterable[OperationCost], name: str = "total") -> OperationCost:
    """The sum of some costs."""
    costs = tuple(costs)
    return OperationCost(
        name=name,
        flops=sum(cost.flops for cost in costs),
        memory_bytes=sum(cost.memory_bytes for cost in costs),
        network_bytes=sum(cost.network_bytes for cost in costs),
        fp8_flops=sum(cost.fp8_flops for cost in costs),
    )


def resource_times(cost: OperationCost, gpus: GpuGroup, rates: ResourceRates) -> ResourceTimes:
    """The time that each resource would need.

    Args:
        cost: Sum over all GPUs.
        gpus: The GPUs, for their energy and power limit.
        rates: Rates of all GPUs together, peak or sustained.
    """
    energy_j = dynamic_energy_j(cost, gpus)
    return ResourceTimes(
        compute_s=rates.compute_s(cost.flops, cost.fp8_flops),
        memory_s=cost.memory_bytes / rates.memory_bytes_per_s,
        network_s=cost.network_bytes / rates.network_bytes_per_s,
        power_s=None if energy_j is None else energy_j / _dynamic_power_w(gpus),
    )


def dynamic_energy_j(cost: OperationCost, gpus: GpuGroup) -> float | None:
    """Energy beyond static power; None if unknown for this GPU, or with products in FP8.

    The energy of links is unknown and left out.
    """
    if gpus.spec.flop_j is None or gpus.spec.byte_j is None or cost.fp8_flops:
        return None
    return cost.flops * gpus.spec.flop_j.value + cost.memory_bytes * gpus.spec.byte_j.value


def energy_j(cost: OperationCost, gpus: GpuGroup, time_s: float) -> float | None:
    """Energy of work that occupies all GPUs for `time_s`: dynamic energy and static power."""
    dynamic_j = dynamic_energy_j(cost, gpus)
    return None if dynamic_j is None else dynamic_j + time_s * _static_power_w(gpus)


def _dynamic_power_w(gpus: GpuGroup) -> float:
    """Power limit minus static power of all GPUs."""
    return gpus.spec.power_limit_w.value * gpus.num_gpus - _static_power_w(gpus)


def _static_power_w(gpus: GpuGroup) -> float:
    return 0.0 if gpus.spec.static_power_w is None else gpus.spec.static_power_w.value * gpus.num_gpus


def _cost(model: CostedModel, op: Operation, shape: BatchShape, count: int) -> OperationCost:
    flops = count * op.flops(shape)
    return OperationCost(
        name=op.name,
        flops=flops,
        memory_bytes=count * op.memory_bytes(shape, model.dtype_bytes),
        fp8_flops=flops if op.kind in FP8_PRODUCTS else 0.0,
    )


def _collectives(
    model: CostedModel, op: Operation, shape: BatchShape, num_gpus: int, exchange: Exchange
) -> tuple[list[OperationCost], list[OperationCost]]:
    """The collectives right before and right after an operation; only the last product of a block has any."""
    owners = [(kind, count) for kind, count in model.graph.kind_counts if op.name in kind.operation_names]
    kind, layers = owners[0][0], sum(count for _, count in owners)
    if num_gpus == 1 or not ends_block(kind, op):
        return [], []
    width = width_of(op)

    def collective(name: str, width: int, *, is_sum: bool) -> OperationCost:
        return _collective(model, name, layers * (num_gpus - 1) * shape.num_tokens * width, is_sum=is_sum)

    if exchange is Exchange.ALL_REDUCE or not reads_attention(kind, op):
        return [], [collective(f"{op.name}_all_reduce", width, is_sum=True)]
    assert isinstance(op.dims, LinearDims)
    return (
        [collective(f"{op.name}_input_all_gather", op.dims.in_features, is_sum=False)],
        [collective(f"{op.name}_all_gather", width, is_sum=False)],
    )


def _collective(model: CostedModel, name: str, elements: int, *, is_sum: bool) -> OperationCost:
    """An all-gather sends each activation to the N - 1 others; an all-reduce sends it twice and adds.

    Each byte sent is read from or written to device memory once.
    """
    moved = (2 if is_sum else 1) * elements * model.dtype_bytes
    return OperationCost(name=name, flops=elements if is_sum else 0, memory_bytes=moved, network_bytes=moved)
