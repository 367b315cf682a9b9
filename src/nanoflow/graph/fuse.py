"""Rewriting a graph for kernels that compute two operations at once. Which device has such kernels is not known here.

A fused graph computes the same with the same parameters; plans are made for the graph that runs.
"""

from __future__ import annotations

from dataclasses import replace

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import Operation, OpKind


def fuse_swiglu(graph: OpGraph) -> OpGraph:
    """The graph with each product and the SwiGLU right after it as one LINEAR_SWIGLU, named like the product.

    Left alone are products with a bias, and those whose output anything else reads or writes: fused, that tensor is
    gone.
    """
    layer: list[Operation] = []
    dropped: set[str] = set()
    for op in graph.layer:
        if layer and _can_join(graph, layer[-1], op):
            dropped.update(op.reads)
            layer[-1] = replace(layer[-1], kind=OpKind.LINEAR_SWIGLU, writes=op.writes)
        else:
            layer.append(op)
    tensors = tuple(spec for spec in graph.tensors if spec.name not in dropped)
    fused = replace(graph, layer=tuple(layer), tensors=tensors)
    fused.validate()
    return fused


def _can_join(graph: OpGraph, product: Operation, swiglu: Operation) -> bool:
    if product.kind is not OpKind.LINEAR or swiglu.kind is not OpKind.SWIGLU or len(product.weights) > 1:
        return False
    touching = [op for _, ops in graph.sections() for op in ops if {*op.reads, *op.writes} & {*product.writes}]
    return touching == [product, swiglu] and product.writes == swiglu.reads
