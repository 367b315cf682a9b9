"""Rewrites a graph for devices whose kernels compute two operations at once.

A fused graph has the same parameters and results. Plans are made for the graph that runs.

In FP8 a product and SwiGLU are one kernel, but not what quantises the rows: a row's scale is known only when the whole
row is, and a tile of the product has a part of it. So rows are written in the model's type, and an operation of its own
quantises them. That still saves reading and writing the product itself, which is twice as wide and has 16 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from nanoflow.graph.fp8 import is_in_blocks, quantise_name, unquantised
from nanoflow.graph.graph import Element, LayerKind, OpGraph, TensorSpec
from nanoflow.graph.operation import Operation, OpKind, Resource

# Of a product and the activation after it.
_FUSED = {
    (OpKind.LINEAR, OpKind.SWIGLU): OpKind.LINEAR_SWIGLU,
    (OpKind.LINEAR_FP8, OpKind.SWIGLU_FP8): OpKind.LINEAR_SWIGLU_FP8,
    # Rows that are quantised later, or read by a product of 16 bits.
    (OpKind.LINEAR_FP8, OpKind.SWIGLU): OpKind.LINEAR_SWIGLU_FP8,
}
_PRODUCTS = frozenset(product for product, _ in _FUSED)


def fuse_swiglu(graph: OpGraph) -> OpGraph:
    """Replace each product and the SwiGLU right after it by one operation of both, named like the product.

    A product is not fused if it has a bias or a scale for each block of its weight, or if another operation reads or
    writes its output, as fusing removes that tensor. Operations of one name are fused in all kinds of layers or in
    none. If the SwiGLU quantises its rows, an operation after it does, named like those of `with_fp8`.
    """
    alone = {name for kind in graph.kinds for name in _products(kind) - _joinable(graph, kind)}
    fused = graph.map_kinds(lambda kind: _fused(kind, _joinable(graph, kind) - alone))
    touched = {name for op in fused.operations() for name in (*op.reads, *op.writes)}
    was_touched = {name for op in graph.operations() for name in (*op.reads, *op.writes)}
    kept = tuple(spec for spec in graph.tensors if spec.name in touched or spec.name not in was_touched)
    fused = replace(fused, tensors=(*kept, *_new_rows(graph, touched - was_touched)))
    fused.validate()
    return fused


def _products(kind: LayerKind) -> set[str]:
    return {op.name for op in kind.operations if op.kind in _PRODUCTS}


def _joinable(graph: OpGraph, kind: LayerKind) -> set[str]:
    """Names of the products of a kind that can be fused with the operation after them."""
    return {product.name for product, op in itertools.pairwise(kind.operations) if _can_join(graph, kind, product, op)}


def _fused(kind: LayerKind, names: set[str]) -> LayerKind:
    """The kind with the products of these names fused with the operation after them."""
    operations: list[Operation] = []
    for op in kind.operations:
        if operations and operations[-1].name in names and (operations[-1].kind, op.kind) in _FUSED:
            operations[-1:] = _both(kind, operations[-1], op)
        else:
            operations.append(op)
    return replace(kind, operations=tuple(operations))


def _both(kind: LayerKind, product: Operation, swiglu: Operation) -> Iterator[Operation]:
    """The operation that is both, and the one that quantises its rows if the SwiGLU does."""
    fused = replace(product, kind=_FUSED[product.kind, swiglu.kind], writes=swiglu.writes)
    if swiglu.kind is OpKind.SWIGLU:
        yield fused
        return
    numbers, scales, *kept = swiglu.writes
    rows = kept[0] if kept else unquantised(numbers)
    reader = next(op for op in kind.operations if numbers in op.reads)
    yield replace(fused, writes=(rows,))
    yield replace(
        swiglu,
        name=quantise_name(reader),
        kind=OpKind.QUANTISE_FP8,
        resource=Resource.MEMORY,
        reads=(rows,),
        writes=(numbers, scales),
    )


def _new_rows(graph: OpGraph, names: set[str]) -> Iterator[TensorSpec]:
    """The tensors of these names, which the graph has in FP8 alone."""
    for spec in graph.tensors:
        if spec.element is Element.FP8 and unquantised(spec.name) in names:
            yield replace(spec, name=unquantised(spec.name), element=Element.MODEL)


def _can_join(graph: OpGraph, kind: LayerKind, product: Operation, swiglu: Operation) -> bool:
    if (product.kind, swiglu.kind) not in _FUSED or is_in_blocks(kind, product):
        return False
    # A weight, and its scales in FP8.
    has_bias = len(product.weights) > (1 if product.kind is OpKind.LINEAR else 2)
    operations = (*graph.prologue, *kind.operations, *graph.epilogue)
    touching = [op for op in operations if {*op.reads, *op.writes} & {*product.writes}]
    return not has_bias and touching == [product, swiglu] and product.writes == swiglu.reads
