"""A graph as one of N GPUs sees it under tensor parallelism: narrower products, fewer heads, and collectives.

It is for planning and simulation only. Attention heads and the columns of gate and up are split over GPUs. o_proj and
down_proj are split by rows, and a collective combines their partial sums. Experts are split like gate, up and down, so
every GPU has a part of each; routing is computed on every GPU. One collective ends a block with a shared expert too.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import replace

from nanoflow.graph.experts import CombineDims, ExpertDims, SharedGateDims
from nanoflow.graph.graph import GraphError, LayerKind, OpGraph
from nanoflow.graph.operation import (
    GATED,
    AttentionDims,
    CollectiveDims,
    LinearDims,
    Operation,
    OpKind,
    Resource,
    RowDims,
)

# Operations whose output columns are split over GPUs.
_ACTIVATIONS = (
    *GATED,
    OpKind.LINEAR_SWIGLU,
    OpKind.LINEAR_SWIGLU_FP8,
    OpKind.EXPERTS_IN,
    OpKind.EXPERTS_IN_FP8,
    OpKind.EXPERTS_IN_MXFP4,
)


class Exchange(enum.StrEnum):
    """How GPUs combine the attention block (paper, figure 6); both move the same number of bytes.

    ALL_REDUCE: W_O is split by rows, and its partial sums are reduced. ALL_GATHER: the attention output is gathered,
    W_O is split by columns, and its output is gathered. The feed-forward block ends in an all-reduce in both cases.
    """

    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"


def shard(graph: OpGraph, num_gpus: int, exchange: Exchange = Exchange.ALL_REDUCE) -> OpGraph:
    """One GPU's part of a graph, with collectives in its layers; for one GPU the graph itself.

    Parameters and tensors keep the shapes of the whole model. Norms and the embedding are computed on every GPU.

    Raises:
        GraphError: The heads, or the features of a product, cannot be divided evenly.
    """
    if num_gpus == 1:
        return graph
    for dims in (kind.attention for kind in graph.kinds):
        if dims.num_heads % num_gpus or (dims.num_kv_heads % num_gpus and num_gpus % dims.num_kv_heads):
            raise GraphError(f"{graph.name}: {dims.num_heads} heads, {dims.num_kv_heads} of keys, on {num_gpus} GPUs")
    epilogue = tuple(_cut_columns(op, num_gpus) if isinstance(op.dims, LinearDims) else op for op in graph.epilogue)
    cut = graph.map_kinds(lambda kind: _part_of(kind, num_gpus, exchange))
    return replace(cut, name=f"{graph.name} on {num_gpus} GPUs", epilogue=epilogue)


def _part_of(kind: LayerKind, num_gpus: int, exchange: Exchange) -> LayerKind:
    return replace(
        kind, operations=tuple(part for op in kind.operations for part in _parts(kind, op, num_gpus, exchange))
    )


def reads_attention(kind: LayerKind, op: Operation) -> bool:
    """True for the product at the end of the attention block, and for what quantises its input."""
    written = {
        name
        for other in kind.operations
        if isinstance(other.dims, AttentionDims) and other.kind is not OpKind.ROPE_APPEND
        for name in other.writes
    }
    quantised = {
        name
        for other in kind.operations
        if other.kind is OpKind.QUANTISE_FP8 and not written.isdisjoint(other.reads)
        for name in other.writes
    }
    return not (written | quantised).isdisjoint(op.reads)


def ends_block(kind: LayerKind, op: Operation) -> bool:
    """True for the last operation of a block, after which the partial sums of GPUs are combined."""
    closing = [other.name for other in kind.operations if other.kind is OpKind.COMBINE or _reads_columns(kind, other)]
    ends_attention = reads_attention(kind, op) and op.kind is not OpKind.QUANTISE_FP8
    return ends_attention or op.name in closing[-1:]


def width_of(op: Operation) -> int:
    """Width of what the last operation of a block writes."""
    if isinstance(op.dims, CombineDims):
        return op.dims.width
    assert isinstance(op.dims, LinearDims)
    return op.dims.out_features


def _reads_columns(kind: LayerKind, op: Operation) -> bool:
    """True for a product whose inputs are columns that are split over GPUs."""
    return isinstance(op.dims, LinearDims) and not _split_columns(kind).isdisjoint(op.reads)


def _reads_columns_or_heads(kind: LayerKind, op: Operation) -> bool:
    return reads_attention(kind, op) or not _split_columns(kind).isdisjoint(op.reads)


def _split_columns(kind: LayerKind) -> set[str]:
    """Tensors of activations, whose columns are split over GPUs, also after they have been quantised."""
    written = {name for other in kind.operations if other.kind in _ACTIVATIONS for name in other.writes}
    quantising = [other for other in kind.operations if other.kind is OpKind.QUANTISE_FP8]
    return written | {name for other in quantising if not written.isdisjoint(other.reads) for name in other.writes}


def _parts(kind: LayerKind, op: Operation, num_gpus: int, exchange: Exchange) -> Iterator[Operation]:
    """One GPU's operations for an operation of the whole layer, in order."""
    if not ends_block(kind, op):
        yield _part(kind, op, num_gpus)
    elif exchange is Exchange.ALL_GATHER and reads_attention(kind, op):
        assert isinstance(op.dims, LinearDims)
        yield _collective(OpKind.ALL_GATHER, f"{op.name}_input_all_gather", op.reads[0], op.dims.in_features, num_gpus)
        yield _cut_columns(op, num_gpus)
        yield _collective(OpKind.ALL_GATHER, f"{op.name}_all_gather", op.writes[0], op.dims.out_features, num_gpus)
    else:
        yield _part(kind, op, num_gpus)
        yield _collective(OpKind.ALL_REDUCE, f"{op.name}_all_reduce", op.writes[0], width_of(op), num_gpus)


def _part(kind: LayerKind, op: Operation, num_gpus: int) -> Operation:
    """One GPU's part of an operation: fewer rows of weights, fewer columns or heads, or all of it."""
    dims = op.dims
    if isinstance(dims, LinearDims):
        if reads_attention(kind, op) or _reads_columns(kind, op):
            return replace(op, dims=replace(dims, in_features=_share(op, dims.in_features, num_gpus)))
        is_qkv = dims.out_features == kind.attention.q_width + 2 * kind.attention.kv_width
        return _cut_heads(op, kind.attention, num_gpus) if is_qkv else _cut_columns(op, num_gpus)
    if isinstance(dims, ExpertDims):
        if dims.is_gated:
            return replace(op, dims=replace(dims, out_features=_share(op, dims.out_features, num_gpus)))
        return replace(op, dims=replace(dims, in_features=_share(op, dims.in_features, num_gpus)))
    if isinstance(dims, AttentionDims):
        return replace(op, dims=_fewer_heads(dims, num_gpus))
    is_narrow = op.kind in GATED or (op.kind is OpKind.QUANTISE_FP8 and _reads_columns_or_heads(kind, op))
    if isinstance(dims, SharedGateDims) or (isinstance(dims, RowDims) and is_narrow):
        return replace(op, dims=replace(dims, width=_share(op, dims.width, num_gpus)))
    return op


def _collective(kind: OpKind, name: str, tensor: str, width: int, num_gpus: int) -> Operation:
    dims = CollectiveDims(width=width, num_gpus=num_gpus)
    return Operation(name=name, kind=kind, resource=Resource.NETWORK, reads=(tensor,), writes=(tensor,), dims=dims)


def _cut_columns(op: Operation, num_gpus: int) -> Operation:
    assert isinstance(op.dims, LinearDims)
    return replace(op, dims=replace(op.dims, out_features=_share(op, op.dims.out_features, num_gpus)))


def _cut_heads(op: Operation, attention: AttentionDims, num_gpus: int) -> Operation:
    assert isinstance(op.dims, LinearDims)
    fewer = _fewer_heads(attention, num_gpus)
    return replace(op, dims=replace(op.dims, out_features=fewer.q_width + 2 * fewer.kv_width))


def _fewer_heads(dims: AttentionDims, num_gpus: int) -> AttentionDims:
    """Heads of keys and values are replicated if there are fewer of them than GPUs."""
    return replace(dims, num_heads=dims.num_heads // num_gpus, num_kv_heads=max(dims.num_kv_heads // num_gpus, 1))


def _share(op: Operation, features: int, num_gpus: int) -> int:
    if features % num_gpus:
        raise GraphError(f"operation {op.name!r}: {features} features cannot be dealt out to {num_gpus} GPUs")
    return features // num_gpus
