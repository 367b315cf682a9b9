"""A profile without a measurement: what a model's operations should take on GPUs of the data sheets.

For questions asked on a laptop (which GPUs, how many, would overlap pay?); a measured profile replaces it where the GPU
is at hand. An operation takes as long as its slowest resource at the sustained rates of `hardware.py`, products in
whole waves of tiles. Interference is the paper's table 3, whatever the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.mxfp4 import in_mxfp4
from nanoflow.graph.operation import (
    FP8_PRODUCTS,
    AttentionDims,
    BatchShape,
    CollectiveDims,
    KvType,
    LinearDims,
    Operation,
    OpKind,
    Resource,
    Scope,
)
from nanoflow.graph.shard import Exchange, shard
from nanoflow.hardware import GpuGroup
from nanoflow.models.config_json import parse
from nanoflow.models.moe import with_skew
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.table import SAMPLING, PairPoint, Point, Profile, Setup

_DTYPE_BYTES = 2
# Tokens and features of a GEMM tile, and tokens of those that experts with few rows get.
_TILE = (128, 128)
_LOW_TILES = (16, 32, 64)
# What a kernel costs besides its work, and what lies between two iterations: sustained figures of one H200.
_LAUNCH_GAP_S = 1e-6
_ITERATION_GAP_S = 100e-6
_CONTEXTS = (256, 1024, 4096)
# Share to performance of operations bound by memory and by the network (paper, table 3 and section 4.1.4).
PAPER_MEMORY_CURVE: Mapping[float, float] = {0.1: 0.2, 0.2: 0.3, 0.4: 0.8, 0.8: 0.85, 0.9: 0.95}
PAPER_NETWORK_CURVE: Mapping[float, float] = {0.1: 0.3, 0.2: 0.5, 0.8: 0.9, 0.9: 1.0}


def estimated_profile(
    model: str,
    config: Mapping[str, Any],
    gpus: GpuGroup,
    max_tokens: int = 8192,
    *,
    kv_type: KvType = KvType.MODEL,
    expert_skew: float = 0.0,
    is_fp8: bool = False,
    is_mxfp4: bool = False,
) -> Profile:
    """The profile of a model on GPUs that share it by tensor parallelism.

    Args:
        model: What the user called it.
        config: Its config.json.
        gpus: How many of which.
        max_tokens: Largest dense batch to estimate; beyond, costs grow in proportion.
        kv_type: Type of keys and values in the cache.
        expert_skew: How unevenly tokens choose experts.
        is_fp8, is_mxfp4: Whether products of layers multiply FP8, and whether weights of experts are in MXFP4.

    Raises:
        ModelError, GraphError: The architecture is not known, or its heads cannot be dealt out to so many GPUs.
        HardwareError: The GPUs do not multiply FP8.
    """
    if is_fp8:
        gpus.require_fp8()
    graph = with_skew(build_graph(parse(config, origin=model), None).with_kv_type(kv_type), expert_skew)
    graph = in_fp8(graph) if is_fp8 else graph
    graph = in_mxfp4(graph) if is_mxfp4 else graph
    graphs = {shard(graph, gpus.num_gpus, exchange): None for exchange in Exchange}
    points: dict[tuple[Any, ...], Point] = {}
    for each in graphs:
        for op in each.operations():
            points |= {point.key: point for point in _points(op, gpus, max_tokens)}
    points |= {point.key: point for point in _sampling(graph, gpus, max_tokens)}
    spec = gpus.spec
    return Profile(
        model=model,
        config=dict(config),
        kv_cache_dtype=kv_type,
        is_fp8=is_fp8,
        is_mxfp4=is_mxfp4,
        expert_skew=expert_skew,
        setup=Setup(
            gpu=spec.title,
            num_gpus=gpus.num_gpus,
            memory_bytes=spec.memory_bytes.value,
            num_sms=int(spec.num_sms.value),
            power_limit_w=spec.power_limit_w.value,
            static_power_w=None if spec.static_power_w is None else spec.static_power_w.value,
            is_measured=False,
        ),
        launch_gap_s=_LAUNCH_GAP_S,
        iteration_gap_s=_ITERATION_GAP_S,
        host_link_bytes_per_s=spec.host_link_bytes_per_s.value,
        points=tuple(points.values()),
        pairs=tuple(pair for each in graphs for pair in paper_pairs(each)),
    )


def paper_pairs(graph: OpGraph) -> Iterator[PairPoint]:
    """The paper's interference: a product keeps its share of its speed, others more than theirs."""
    by_resource: dict[Resource, Operation] = {}
    for op in graph.layer:
        if isinstance(op.dims, LinearDims | CollectiveDims) or op.kind is OpKind.DECODE_ATTENTION:
            by_resource[op.resource] = op
    curves = {Resource.MEMORY: PAPER_MEMORY_CURVE, Resource.NETWORK: PAPER_NETWORK_CURVE}
    for resource, curve in curves.items():
        if resource in by_resource:
            for share, performance in curve.items():
                yield PairPoint(
                    first=by_resource[Resource.COMPUTE].key,
                    second=by_resource[resource].key,
                    first_tokens=0,
                    second_tokens=0,
                    mechanism=Mechanism.PARTITION,
                    share=round(1.0 - share, 4),
                    first_performance=round(1.0 - share, 4),
                    second_performance=performance,
                )


def _points(op: Operation, gpus: GpuGroup, max_tokens: int) -> Iterator[Point]:
    """At multiples of 128 up to 2,048 tokens, then coarser."""
    sizes = [1, 16, 64, *range(128, min(max_tokens, 2048) + 1, 128), *range(2560, max_tokens + 1, 512)]
    is_attention = op.kind in (OpKind.DECODE_ATTENTION, OpKind.PREFILL_ATTENTION)
    for num_tokens in sizes:
        for context in _CONTEXTS if is_attention else (0,):
            window = op.dims.window if isinstance(op.dims, AttentionDims) else None
            shape = _shape(op, num_tokens, context if window is None else min(context, window))
            time_s = _time_s(op, shape, gpus)
            energy_j = _energy_j(op, shape, gpus, time_s)
            yield Point(
                operation=op.key, num_tokens=num_tokens, context=float(context), time_s=time_s, energy_j=energy_j
            )


def _shape(op: Operation, num_tokens: int, context: int) -> BatchShape:
    """A batch in which an operation has so many tokens, each with so many keys."""
    is_decode = op.scope is Scope.DECODE
    return BatchShape(
        num_tokens=num_tokens,
        num_decode_tokens=num_tokens if is_decode else 0,
        decode_context=num_tokens * context if is_decode else 0,
        prefill_context=0 if is_decode else num_tokens * context,
        # Keys of a chunk are read once for all of its tokens.
        prefill_kv_tokens=0 if is_decode else num_tokens + 2 * context,
        num_sampled=num_tokens,
    )


def _time_s(op: Operation, shape: BatchShape, gpus: GpuGroup) -> float:
    rates, num_gpus = gpus.sustained_rates(), gpus.num_gpus
    flops = op.flops(shape)
    in_fp8 = flops if op.kind in FP8_PRODUCTS else 0
    compute_s = rates.compute_s(flops, in_fp8) * num_gpus * _wave_loss(op, shape, gpus)
    memory_s = op.memory_bytes(shape, _DTYPE_BYTES) / rates.memory_bytes_per_s * num_gpus
    network_s = op.network_bytes(shape, _DTYPE_BYTES) / rates.network_bytes_per_s * num_gpus
    return max(compute_s, memory_s, network_s)


def _wave_loss(op: Operation, shape: BatchShape, gpus: GpuGroup) -> float:
    """Time of whole waves of tiles, over that of the tiles alone: multiprocessors idle in the last wave."""
    if not isinstance(op.dims, LinearDims | ExpertDims):
        return 1.0
    # Each expert that is touched has tiles of its own; any other product is one.
    num_rows, num_parts, height = float(shape.tokens_in(op.scope)), 1.0, _TILE[0]
    if isinstance(op.dims, ExpertDims):
        num_parts = op.dims.routing.num_touched(shape.num_tokens)
        num_rows *= op.dims.routing.num_per_token
        height = next((low for low in _LOW_TILES if num_rows / num_parts <= low), height)
    tiles = num_parts * math.ceil(num_rows / num_parts / height) * math.ceil(op.dims.out_features / _TILE[1])
    exact = num_rows / height * op.dims.out_features / _TILE[1]
    num_sms = int(gpus.spec.num_sms.value)
    # From four waves on tiles of several sizes and split products even it out.
    waves = math.ceil(tiles / num_sms) if tiles < 4 * num_sms else tiles / num_sms
    return waves * num_sms / exact if waves > 1 or tiles < num_sms else 1.0


def _energy_j(op: Operation, shape: BatchShape, gpus: GpuGroup, time_s: float) -> float | None:
    spec = gpus.spec
    if spec.flop_j is None or spec.byte_j is None or op.kind in FP8_PRODUCTS:
        return None
    static_j = 0.0 if spec.static_power_w is None else spec.static_power_w.value * time_s
    moved = op.memory_bytes(shape, _DTYPE_BYTES)
    return op.flops(shape) * spec.flop_j.value + moved * spec.byte_j.value + static_j


def _sampling(graph: OpGraph, gpus: GpuGroup, max_tokens: int) -> Iterator[Point]:
    """The largest logit of each row: they are read once in 32 bits."""
    spec = gpus.spec
    for rows in (1, 128, max_tokens):
        moved = rows * graph.vocab_size * 4
        yield Point(
            operation=SAMPLING,
            num_tokens=rows,
            time_s=moved / spec.memory_bytes_per_s.value + 10e-6,
            energy_j=None if spec.byte_j is None else moved * spec.byte_j.value,
        )
