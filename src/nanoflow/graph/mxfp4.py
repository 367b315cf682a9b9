"""Rewrites a graph for experts whose weights stay in MXFP4 (4 bits), which products unpack as they read them.

Activations, biases and all other weights keep the model's type. Which parameters are kept so is decided elsewhere;
`models/mxfp4.py` lays them out, `kernels/` multiplies them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace

from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.graph import GraphError, LayerKind, OpGraph, PackedMxfp4
from nanoflow.graph.layers import MXFP4_GROUP
from nanoflow.graph.operation import Operation, OpKind

# Rows of a matrix must be a multiple of this, so that rows of scales are aligned and gate and up can alternate.
_ROWS_MULTIPLE = 16
_PRODUCTS = {OpKind.EXPERTS_IN: OpKind.EXPERTS_IN_MXFP4, OpKind.EXPERTS_OUT: OpKind.EXPERTS_OUT_MXFP4}


def mxfp4_candidates(graph: OpGraph) -> tuple[str, ...]:
    """Names of the parameters that can be kept in MXFP4: the matrices of experts, of sizes that suit it."""
    return tuple(dict.fromkeys(op.weights[0] for op in graph.layer_operations if _suits(op)))


def with_mxfp4(graph: OpGraph, names: Container[str]) -> OpGraph:
    """The graph with the weights of these names, of `mxfp4_candidates`, in MXFP4; operations keep their names."""
    changed = graph.map_kinds(lambda kind: _with_mxfp4(kind, names))
    if changed == graph:
        return graph
    changed = replace(changed, name=f"{graph.name} MXFP4")
    changed.validate()
    return changed


def in_mxfp4(graph: OpGraph) -> OpGraph:
    """The graph with all experts in MXFP4.

    Raises:
        GraphError: It has none of sizes that suit it.
    """
    names = mxfp4_candidates(graph)
    if not names:
        raise GraphError(f"quantization mxfp4: {graph.name} has no experts of sizes that suit it")
    return with_mxfp4(graph, names)


def _suits(op: Operation) -> bool:
    if op.kind not in _PRODUCTS or not isinstance(op.dims, ExpertDims):
        return False
    return not op.dims.in_features % MXFP4_GROUP and not op.dims.out_features % _ROWS_MULTIPLE


def _with_mxfp4(kind: LayerKind, names: Container[str]) -> LayerKind:
    forms = dict(_forms(kind, names))
    operations = tuple(
        replace(op, kind=_PRODUCTS[op.kind], weights=(op.weights[0], f"{op.weights[0]}_scales", *op.weights[1:]))
        if _suits(op) and op.weights[0] in forms
        else op
        for op in kind.operations
    )
    parameters = tuple(replace(each, packed=forms.get(each.name, each.packed)) for each in kind.parameters)
    return replace(kind, operations=operations, parameters=parameters)


def _forms(kind: LayerKind, names: Container[str]) -> Iterator[tuple[str, PackedMxfp4]]:
    """How each parameter that is changed is kept, by its name."""
    for op in kind.operations:
        if _suits(op) and op.weights[0] in names:
            assert isinstance(op.dims, ExpertDims)
            yield op.weights[0], PackedMxfp4(is_gated=op.dims.is_gated)
