"""One operation of a model: its kind, the tensors it reads and writes, and its costs. Kernels are elsewhere.

An operation is bound by one *resource*: GEMMs by compute, decode attention by memory, collectives by the network. Costs
are functions of a `BatchShape`, so planning and simulation need neither torch nor a GPU.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from nanoflow.graph.attention import AttentionDims as AttentionDims
from nanoflow.graph.attention import KvType as KvType
from nanoflow.graph.experts import CombineDims, ExpertDims, OrderDims, RoutedDims, RouterDims, SharedGateDims

# Number of keys in a block, for kernels that divide decode attention into blocks of keys.
KEY_BLOCK = 64


class Resource(enum.StrEnum):
    """What bounds an operation. Power bounds all operations together and has no member here."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class Scope(enum.StrEnum):
    """Which tokens of the dense batch an operation works on. Decode tokens are first in a dense batch."""

    ALL = "all"
    DECODE = "decode"
    PREFILL = "prefill"
    SAMPLED = "sampled"


class OpKind(enum.StrEnum):
    """What an operation computes; `kernels/dispatch.py` has one kernel for each kind and device."""

    EMBED = "embed"
    GATHER_ROWS = "gather_rows"
    RMS_NORM = "rms_norm"
    RMS_NORM_ADD = "rms_norm_add"
    LINEAR = "linear"
    LINEAR_ADD = "linear_add"
    LINEAR_SWIGLU = "linear_swiglu"
    ROPE_APPEND = "rope_append"
    DECODE_ATTENTION = "decode_attention"
    PREFILL_ATTENTION = "prefill_attention"
    SWIGLU = "swiglu"
    GEGLU = "geglu"
    RMS_NORM_FP8 = "rms_norm_fp8"
    LINEAR_FP8 = "linear_fp8"
    LINEAR_ADD_FP8 = "linear_add_fp8"
    LINEAR_SWIGLU_FP8 = "linear_swiglu_fp8"
    SWIGLU_FP8 = "swiglu_fp8"
    GEGLU_FP8 = "geglu_fp8"
    QUANTISE_FP8 = "quantise_fp8"
    ROUTER = "router"
    EXPERT_ORDER = "expert_order"
    EXPERTS_IN = "experts_in"
    EXPERTS_OUT = "experts_out"
    EXPERTS_IN_FP8 = "experts_in_fp8"
    EXPERTS_OUT_FP8 = "experts_out_fp8"
    EXPERTS_IN_MXFP4 = "experts_in_mxfp4"
    EXPERTS_OUT_MXFP4 = "experts_out_mxfp4"
    COMBINE = "combine"
    SHARED_GATE = "shared_gate"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"


# Activation of the gate times the up projection; the output has half as many columns as the input.
GATED = (OpKind.SWIGLU, OpKind.GEGLU, OpKind.SWIGLU_FP8, OpKind.GEGLU_FP8)
# Products of rows and weights in FP8: those of all tokens, and those of experts too.
FP8_LINEARS = (OpKind.LINEAR_FP8, OpKind.LINEAR_ADD_FP8, OpKind.LINEAR_SWIGLU_FP8)
FP8_PRODUCTS = (*FP8_LINEARS, OpKind.EXPERTS_IN_FP8, OpKind.EXPERTS_OUT_FP8)
# Products of rows in 16 bits and weights in MXFP4.
MXFP4_PRODUCTS = (OpKind.EXPERTS_IN_MXFP4, OpKind.EXPERTS_OUT_MXFP4)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The sizes of a dense batch that costs depend on.

    Attributes:
        num_tokens: Tokens of the dense batch; the first `num_decode_tokens` are decodes, one per request.
        num_decode_tokens: Decode tokens.
        decode_context: Sum over decode tokens of the keys each attends to.
        prefill_context: Sum over prefill tokens of the keys each attends to (causal: fewer than the chunk's context).
        prefill_kv_tokens: Sum over prefill *requests* of their keys in the cache, each of which is read at least once.
        num_sampled: Rows of the batch that get logits.
    """

    num_tokens: int
    num_decode_tokens: int = 0
    decode_context: int = 0
    prefill_context: int = 0
    prefill_kv_tokens: int = 0
    num_sampled: int = 0

    def tokens_in(self, scope: Scope) -> int:
        """Number of tokens that an operation of this scope works on."""
        return {
            Scope.ALL: self.num_tokens,
            Scope.DECODE: self.num_decode_tokens,
            Scope.PREFILL: self.num_tokens - self.num_decode_tokens,
            Scope.SAMPLED: self.num_sampled,
        }[scope]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDims:
    """Width of the rows of a row-wise operation (embedding, gather, activation).

    Attributes:
        width: Elements of a row.
        scale: An embedding's factor.
        num_parts: Equal parts of a row that are quantised each by itself, as a token has a row for each of its experts.
    """

    width: int
    scale: float = 1.0
    num_parts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NormDims:
    """RMSNorm over `width` elements, with `eps` added under the root."""

    width: int
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearDims:
    """Product [tokens, in_features] x [out_features, in_features]^T. A fused SwiGLU halves the output features."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveDims:
    """A collective on rows of `width` elements over `num_gpus` GPUs."""

    width: int
    num_gpus: int


Dims = RowDims | NormDims | LinearDims | AttentionDims | CollectiveDims | RoutedDims


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A node of the graph.

    Attributes:
        name: Unique in its part of the graph, e.g. "qkv_proj".
        kind: What it computes.
        resource: What bounds it.
        scope: The tokens that it works on.
        reads: Names of tensors that it reads, in the order of the kernel's arguments.
        writes: Names of tensors that it writes, in the order of the kernel's results.
        weights: Names of parameters, in the order of the kernel's arguments.
        reads_before: Those of `reads` of which it also needs tokens before its range (the keys of its prefix).
        dims: Sizes.
        variant: Distinguishes it from an operation of the same name in layers of another kind; empty if there is none.
            A plan orders operations by name, so all variants alike; their costs are measured separately.
    """

    name: str
    kind: OpKind
    resource: Resource
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    dims: Dims
    scope: Scope = Scope.ALL
    weights: tuple[str, ...] = ()
    reads_before: tuple[str, ...] = ()
    variant: str = ""

    @property
    def key(self) -> str:
        """Its name in a profile."""
        return f"{self.name}.{self.variant}" if self.variant else self.name

    @property
    def is_product(self) -> bool:
        """Whether it multiplies rows by weights: a product, a router, or a product of experts."""
        return isinstance(self.dims, LinearDims | RouterDims | ExpertDims)

    def flops(self, shape: BatchShape) -> int:
        """Floating-point operations on a batch (a multiply-add is two; paper Table 2)."""
        return _FLOPS[type(self.dims)](self, shape)

    def memory_bytes(self, shape: BatchShape, dtype_bytes: int) -> int:
        """Least bytes moved to and from device memory: weights, inputs, outputs, keys and values, once each."""
        if self.kind in _OWN_BYTES:
            return _OWN_BYTES[self.kind](self, shape, dtype_bytes)
        moved = _ELEMENTS[type(self.dims)](self, shape) * dtype_bytes
        if isinstance(self.dims, AttentionDims):
            moved += _cached_tokens(self, shape) * self.dims.cached_bytes(dtype_bytes)
        return moved

    def network_bytes(self, shape: BatchShape, dtype_bytes: int) -> float:
        """Bytes that one GPU sends to others; 0 except for collectives."""
        return _collective_elements(self, shape) * dtype_bytes if isinstance(self.dims, CollectiveDims) else 0.0


def _linear_flops(op: Operation, shape: BatchShape) -> int:
    assert isinstance(op.dims, LinearDims)
    # Of the product alone: a fused addition or activation is less than a thousandth of it.
    return 2 * shape.tokens_in(op.scope) * op.dims.in_features * op.dims.out_features


def _linear_elements(op: Operation, shape: BatchShape) -> int:
    assert isinstance(op.dims, LinearDims)
    tokens, k, n = shape.tokens_in(op.scope), op.dims.in_features, op.dims.out_features
    # A fused addition also reads the residual; a fused SwiGLU writes half of the columns.
    moved = {OpKind.LINEAR: n, OpKind.LINEAR_ADD: 2 * n, OpKind.LINEAR_SWIGLU: n // 2}[op.kind]
    return k * n + tokens * (k + moved)


def _fp8_linear_bytes(op: Operation, shape: BatchShape, dtype_bytes: int) -> int:
    """Weights and rows have a byte an element, and 4 for the scale of a row; what is written has the model's type."""
    assert isinstance(op.dims, LinearDims)
    tokens, k, n = shape.tokens_in(op.scope), op.dims.in_features, op.dims.out_features
    moved = {OpKind.LINEAR_FP8: n, OpKind.LINEAR_ADD_FP8: 2 * n, OpKind.LINEAR_SWIGLU_FP8: n // 2}[op.kind]
    return n * (k + 4) + tokens * (k + 4 + moved * dtype_bytes)


def _fp8_expert_bytes(op: Operation, shape: BatchShape, dtype_bytes: int) -> int:
    assert isinstance(op.dims, ExpertDims)
    return op.dims.fp8_bytes(shape.tokens_in(op.scope), dtype_bytes)


def _mxfp4_bytes(op: Operation, shape: BatchShape, dtype_bytes: int) -> int:
    assert isinstance(op.dims, ExpertDims)
    return op.dims.mxfp4_bytes(shape.tokens_in(op.scope), dtype_bytes)


def _fp8_rows_bytes(op: Operation, shape: BatchShape, dtype_bytes: int) -> int:
    """Rows of the model's type become FP8; a norm may write them in both types."""
    assert isinstance(op.dims, NormDims | RowDims)
    width, kept = op.dims.width, len(op.writes) - 2
    written = width + 4 * (op.dims.num_parts if isinstance(op.dims, RowDims) else 1)
    read = 2 * width if op.kind in GATED else width
    weight = width if isinstance(op.dims, NormDims) else 0
    return weight * dtype_bytes + shape.tokens_in(op.scope) * ((read + kept * width) * dtype_bytes + written)


def _attention_flops(op: Operation, shape: BatchShape) -> int:
    """4 x context x width for each token: scores and weighted sum. RoPE counts 3 for each rotated element."""
    assert isinstance(op.dims, AttentionDims)
    if op.kind is OpKind.ROPE_APPEND:
        rotated = op.dims.head_dim if op.dims.rotary_dim is None else op.dims.rotary_dim
        return 3 * shape.tokens_in(op.scope) * (op.dims.num_heads + op.dims.num_kv_heads) * rotated
    context = shape.decode_context if op.scope is Scope.DECODE else shape.prefill_context
    return 4 * context * op.dims.q_width


def _attention_elements(op: Operation, shape: BatchShape) -> int:
    """Queries read and written, and keys and values that are not in the cache yet."""
    assert isinstance(op.dims, AttentionDims)
    new = 2 * op.dims.kv_width if op.kind is OpKind.ROPE_APPEND else 0
    return shape.tokens_in(op.scope) * (2 * op.dims.q_width + new)


def _cached_tokens(op: Operation, shape: BatchShape) -> int:
    """Tokens whose keys and values are written to the cache, or read from it."""
    if op.kind is OpKind.ROPE_APPEND:
        return shape.tokens_in(op.scope)
    return shape.decode_context if op.scope is Scope.DECODE else shape.prefill_kv_tokens


def _norm_flops(op: Operation, shape: BatchShape) -> int:
    assert isinstance(op.dims, NormDims)
    return 4 * shape.tokens_in(op.scope) * op.dims.width


def _norm_elements(op: Operation, shape: BatchShape) -> int:
    assert isinstance(op.dims, NormDims)
    rows_moved = 3 if op.kind is OpKind.RMS_NORM_ADD else 2
    return op.dims.width + rows_moved * shape.tokens_in(op.scope) * op.dims.width


def _row_flops(op: Operation, shape: BatchShape) -> int:
    assert isinstance(op.dims, RowDims)
    return 4 * shape.tokens_in(op.scope) * op.dims.width if op.kind in GATED else 0


def _row_elements(op: Operation, shape: BatchShape) -> int:
    assert isinstance(op.dims, RowDims)
    rows_moved = 3 if op.kind in GATED else 2
    return rows_moved * shape.tokens_in(op.scope) * op.dims.width


def _collective_elements(op: Operation, shape: BatchShape) -> float:
    """An all-gather sends a GPU's part to each other GPU; an all-reduce sends twice as much (paper eq. 3)."""
    assert isinstance(op.dims, CollectiveDims)
    times = 2 if op.kind is OpKind.ALL_REDUCE else 1
    return times * shape.tokens_in(op.scope) * op.dims.width * (op.dims.num_gpus - 1) / op.dims.num_gpus


def _collective_flops(op: Operation, shape: BatchShape) -> int:
    """One addition for each element received in the first half of an all-reduce."""
    return round(_collective_elements(op, shape) / 2) if op.kind is OpKind.ALL_REDUCE else 0


def _collective_memory(op: Operation, shape: BatchShape) -> int:
    return round(_collective_elements(op, shape))


def _routed_flops(op: Operation, shape: BatchShape) -> int:
    assert isinstance(op.dims, RoutedDims)
    return op.dims.flops(shape.tokens_in(op.scope))


def _routed_elements(op: Operation, shape: BatchShape) -> int:
    assert isinstance(op.dims, RoutedDims)
    return op.dims.elements(shape.tokens_in(op.scope))


_ROUTED = (RouterDims, OrderDims, ExpertDims, CombineDims, SharedGateDims)
_Cost = Callable[[Operation, BatchShape], int]
_FLOPS: dict[type, _Cost] = {
    LinearDims: _linear_flops,
    AttentionDims: _attention_flops,
    NormDims: _norm_flops,
    RowDims: _row_flops,
    CollectiveDims: _collective_flops,
    **dict.fromkeys(_ROUTED, _routed_flops),
}
_OWN_BYTES: dict[OpKind, Callable[[Operation, BatchShape, int], int]] = {
    **dict.fromkeys(MXFP4_PRODUCTS, _mxfp4_bytes),
    **dict.fromkeys(FP8_LINEARS, _fp8_linear_bytes),
    **dict.fromkeys((OpKind.EXPERTS_IN_FP8, OpKind.EXPERTS_OUT_FP8), _fp8_expert_bytes),
    **dict.fromkeys((OpKind.RMS_NORM_FP8, OpKind.SWIGLU_FP8, OpKind.GEGLU_FP8, OpKind.QUANTISE_FP8), _fp8_rows_bytes),
}
_ELEMENTS: dict[type, _Cost] = {
    LinearDims: _linear_elements,
    AttentionDims: _attention_elements,
    NormDims: _norm_elements,
    RowDims: _row_elements,
    CollectiveDims: _collective_memory,
    **dict.fromkeys(_ROUTED, _routed_elements),
}
