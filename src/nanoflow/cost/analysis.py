"""What bounds a workload: the largest dense batch, the time of an iteration by resource, and the best throughput.

In the order of section 3 of the NanoFlow paper: batch size, equations 1 to 4, the class, equation 5. `roofline.py` has
the cost of operations; docs/cost-model.md says where the paper's text and numbers disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanoflow.cost.model import CostedModel
from nanoflow.cost.roofline import OperationCost, ResourceTimes, energy_j, resource_times, total
from nanoflow.graph.operation import BatchShape
from nanoflow.hardware import GpuGroup, ResourceRates


class CostError(ValueError):
    """A model or workload does not fit on the GPUs; the message is one line with the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanLengths:
    """A workload: mean tokens of a prompt (the paper's p) and of a completion (d)."""

    prompt_tokens: float
    output_tokens: float

    @property
    def total_tokens(self) -> float:
        """Mean tokens of prompt and completion together."""
        return self.prompt_tokens + self.output_tokens

    @property
    def mean_context(self) -> float:
        """Mean keys of a request over its completion."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """A dense batch in steady state, not rounded: decodes, and prompt tokens of newly admitted requests."""

    num_decodes: float
    num_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialBound:
    """Operations alone, back to back: time of an iteration, tokens/s of one GPU, joules a token (None if unknown)."""

    iteration_s: float
    tokens_per_s_per_gpu: float
    energy_per_token_j: float | None


def largest_batch(model: CostedModel, gpus: GpuGroup, lengths: MeanLengths) -> BatchSize:
    """The dense batch whose keys and values fill the memory that the weights leave.

    A request keeps p + d / 2 tokens on average and needs p + d token slots for its d decodes.

    Raises:
        CostError: The weights do not fit, or leave no room for a single request.
    """
    free_bytes = gpus.memory_bytes - model.weight_bytes
    request_bytes = model.kv_bytes(lengths.mean_context)
    if free_bytes < request_bytes:
        needed_bytes = model.weight_bytes + request_bytes
        raise CostError(
            f"{model.graph.name}: weights ({model.weight_bytes / 1e9:.1f} GB) and one request "
            f"({request_bytes / 1e9:.2f} GB) do not fit into the {gpus.memory_bytes / 1e9:.0f} GB of {gpus.name}: "
            f"it takes {math.ceil(needed_bytes / gpus.spec.memory_bytes.value)} of these GPUs"
        )
    return _with_decodes(free_bytes / request_bytes, lengths)


def batch_within(model: CostedModel, gpus: GpuGroup, lengths: MeanLengths, max_batch_tokens: int | None) -> BatchSize:
    """The largest batch within the memory and, if given, within a token budget.

    Raises:
        CostError: As `largest_batch`, or the budget is not positive.
    """
    if max_batch_tokens is not None and max_batch_tokens <= 0:
        raise CostError(f"max_batch_tokens must be positive, got {max_batch_tokens}")
    batch = largest_batch(model, gpus, lengths)
    if max_batch_tokens is None or batch.num_tokens <= max_batch_tokens:
        return batch
    return _with_decodes(max_batch_tokens * lengths.output_tokens / lengths.total_tokens, lengths)


def _with_decodes(num_decodes: float, lengths: MeanLengths) -> BatchSize:
    return BatchSize(num_decodes=num_decodes, num_tokens=num_decodes * lengths.total_tokens / lengths.output_tokens)


def batch_shape(model: CostedModel, batch: BatchSize, lengths: MeanLengths) -> BatchShape:
    """The sizes that costs depend on: decodes are half through their completions, prompts are whole and causal.

    With sliding windows, the keys of a token are averaged over the layers.
    """
    num_tokens, num_decodes = round(batch.num_tokens), round(batch.num_decodes)
    num_prefill = num_tokens - num_decodes
    decode_context = _mean_visible(model, lengths.mean_context)
    prefill_context = _mean_visible(model, (lengths.prompt_tokens + 1) / 2)
    return BatchShape(
        num_tokens=num_tokens,
        num_decode_tokens=num_decodes,
        decode_context=round(num_decodes * decode_context),
        prefill_context=round(num_prefill * prefill_context),
        prefill_kv_tokens=num_prefill,
        num_sampled=num_decodes,
    )


def _mean_visible(model: CostedModel, context: float) -> float:
    windows = model.graph.windows
    return sum(context if window is None else min(context, window) for window in windows) / len(windows)


def iteration_views(
    model: CostedModel,
    gpus: GpuGroup,
    rates: ResourceRates,
    batch: BatchSize,
    lengths: MeanLengths,
    whole: OperationCost,
) -> ResourceTimes:
    """The time of one iteration by resource: the paper's equations 1 to 3, and power.

    Args:
        model, gpus, batch, lengths: The model, its GPUs, the batch and the workload.
        rates: Rates of all GPUs together.
        whole: Sum of the iteration's operations; its collectives give equation 3, its joules the time by power.
    """
    # 1. Weights, keys and values pass once; at the largest batch that is all of the memory.
    read_bytes = model.weight_bytes + batch.num_decodes * model.kv_bytes(lengths.mean_context)
    # 2. Each token passes each active parameter once.
    flops = 2 * batch.num_tokens
    from_operations = resource_times(whole, gpus, rates)
    return ResourceTimes(
        compute_s=rates.compute_s(flops * model.num_active_parameters, flops * model.num_active_fp8_parameters),
        memory_s=read_bytes / rates.memory_bytes_per_s,
        network_s=from_operations.network_s,
        power_s=from_operations.power_s,
    )


def memory_to_compute(views: ResourceTimes) -> float:
    """T_R (equation 4): above 1, memory takes longer than compute."""
    return views.memory_s / views.compute_s


def optimal_throughput(model: CostedModel, gpus: GpuGroup, rates: ResourceRates) -> float:
    """Tokens/s of one GPU if the products ran without pause (equation 5)."""
    return 1 / rates.compute_s(2 * model.num_active_parameters, 2 * model.num_active_fp8_parameters) / gpus.num_gpus


def serial_bound(
    costs: tuple[OperationCost, ...], gpus: GpuGroup, rates: ResourceRates, num_tokens: int
) -> SerialBound:
    """The throughput of a perfect engine without overlap: each operation takes as long as its slowest resource."""
    iteration_s = sum(resource_times(cost, gpus, rates).longest_s for cost in costs)
    joules = energy_j(total(costs), gpus, iteration_s)
    return SerialBound(
        iteration_s=iteration_s,
        tokens_per_s_per_gpu=num_tokens / iteration_s / gpus.num_gpus,
        energy_per_token_j=None if joules is None else joules / num_tokens,
    )
