"""Rewrites a graph for devices whose kernels compute two operations at once.

A fused graph has the same parameters and results. Plans are made for the graph that runs.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from nanoflow.graph.graph import LayerKind, OpGraph
from nanoflow.graph.operation import Operation, OpKind


def fuse_swiglu(graph: OpGraph) -> OpGraph:
    """Replace each product and the SwiGLU right after it by one LINEAR_SWIGLU, named like the product.

    A product is not fused if it has a bias, or if another operation reads or writes its output, as fusing removes that
    tensor. Operations of one name are fused in all kinds of layers or in none.
    """
    alone = {name for kind in graph.kinds for name in _products(kind) - _joinable(graph, kind)}
    fused = graph.map_kinds(lambda kind: _fused(kind, _joinable(graph, kind) - alone))
    touched = {name for op in fused.operations() for name in (*op.reads, *op.writes)}
    was_touched = {name for op in graph.operations() for name in (*op.reads, *op.writes)}
    tensors = tuple(spec for spec in graph.tensors if spec.name in touched or spec.name not in was_touched)
    fused = replace(fused, tensors=tensors)
    fused.validate()
    return fused


def _products(kind: LayerKind) -> set[str]:
    return {op.name for op in kind.operations if op.kind is OpKind.LINEAR}


def _joinable(graph: OpGraph, kind: LayerKind) -> set[str]:
    """Names of the products of a kind that can be fused with the operation after them."""
    return {product.name for product, op in itertools.pairwise(kind.operations) if _can_join(graph, kind, product, op)}


def _fused(kind: LayerKind, names: set[str]) -> LayerKind:
    """The kind with the products of these names fused with the operation after them."""
    operations: list[Operation] = []
    for op in kind.operations:
        if operations and operations[-1].name in names and op.kind is OpKind.SWIGLU:
            operations[-1] = replace(operations[-1], kind=OpKind.LINEAR_SWIGLU, writes=op.writes)
        else:
            operations.append(op)
    return replace(kind, operations=tuple(operations))


def _can_join(graph: OpGraph, kind: LayerKind, product: Operation, swiglu: Operation) -> bool:
    if product.kind is not OpKind.LINEAR or swiglu.kind is not OpKind.SWIGLU or len(product.weights) > 1:
        return False
    operations = (*graph.prologue, *kind.operations, *graph.epilogue)
    touching = [op for op in operations if {*op.reads, *op.writes} & {*product.writes}]
    return touching == [product, swiglu] and product.writes == swiglu.reads
