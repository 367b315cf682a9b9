"""What one operation of a batch costs alone, looked up in a profile's table.

The table (`table.py`) knows numbers of tokens and lengths of contexts; here these are worked out for an operation on a
token range of a batch. What operations cost beside each other: `interference.py`.
"""

from __future__ import annotations

from nanoflow.graph.nanobatch import TokenRange, decodes_before
from nanoflow.graph.operation import AttentionDims, BatchShape, Operation, OpKind, Scope
from nanoflow.profile.table import Cost, CostTable

_ATTENTIONS = frozenset({OpKind.DECODE_ATTENTION, OpKind.PREFILL_ATTENTION})


def operation_cost(op: Operation, tokens: TokenRange, shape: BatchShape, table: CostTable) -> Cost:
    """What an operation costs alone on a token range at whose ends the batch is cut."""
    first, last = (
        decodes_before(place, shape.num_decode_tokens, shape.num_tokens) for place in (tokens.start, tokens.stop)
    )
    num_decodes = last - first
    count = {
        Scope.ALL: tokens.num_tokens,
        Scope.DECODE: num_decodes,
        Scope.PREFILL: tokens.num_tokens - num_decodes,
        Scope.SAMPLED: shape.num_sampled,
    }[op.scope]
    return table.cost(op.key, count, mean_context(op, shape))


def mean_context(op: Operation, shape: BatchShape) -> float:
    """Keys that each token of an attention sees on average; 0 for other operations.

    Under a sliding window it sees no more than that.
    """
    if op.kind not in _ATTENTIONS or not isinstance(op.dims, AttentionDims):
        return 0.0
    context = {Scope.DECODE: shape.decode_context, Scope.PREFILL: shape.prefill_context}[op.scope]
    mean = context / max(shape.tokens_in(op.scope), 1)
    return mean if op.dims.window is None else min(mean, op.dims.window)
