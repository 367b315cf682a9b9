"""Rewriting a graph for kernels that compute two operations at once. Which device has such kernels is not known here.

A fused graph computes the same with the same parameters; plans are made for the graph that runs.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from nanoflow.graph.graph import LayerKind, OpGraph
from nanoflow.graph.operation import Operation, OpKind


def fuse_swiglu(graph: OpGraph) -> OpGraph:
    """The graph with each product and the SwiGLU right after it as one LINEAR_SWIGLU, named like the product.

    Left alone are products with a bias, and those whose output anything else reads or writes: fused, that tensor is
    gone. What has one name in layers of several kinds is fused in all of them or in none.
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
    """Products of a kind that can take in what follows them."""
    return {product.name for product, op in itertools.pairwise(kind.operations) if _can_join(graph, kind, product, op)}


def _fused(kind: LayerKind, names: set[str]) -> LayerKind:
    """The kind with what follows the products of these names joined to them."""
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
