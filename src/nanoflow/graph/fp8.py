"""Rewrites a graph for products in FP8 (e4m3): weights with scales of their own, rows quantised by who writes them.

A product of a layer (qkv, o, gate and up, down, experts) becomes one that reads rows in FP8 and a float32 scale for
each row. Who writes these rows, a norm or an activation, quantises them in the same operation. Two are quantised by an
operation of their own: the output of attention, which several operations write together, and the activation of experts,
whose rows are finished by no single program of the product that ends with it. Embedding, output projection, norms,
routers and experts with biases stay in the model's type, and so do keys and values.

Which parameters are kept in FP8 is decided elsewhere; `models/fp8.py` makes their numbers, `kernels/` multiplies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.graph import Element, Fp8, LayerKind, OpGraph
from nanoflow.graph.operation import FP8_PRODUCTS, LinearDims, Operation, OpKind, Resource, RowDims

# Features in and out of a product must be multiples of this: rows of 16 bytes suit every kernel.
MULTIPLE = 16

# Of tensors with the rows of others in FP8.
_SUFFIX = "_fp8"
_PRODUCTS = {
    OpKind.LINEAR: OpKind.LINEAR_FP8,
    OpKind.LINEAR_ADD: OpKind.LINEAR_ADD_FP8,
    OpKind.EXPERTS_IN: OpKind.EXPERTS_IN_FP8,
    OpKind.EXPERTS_OUT: OpKind.EXPERTS_OUT_FP8,
}
# Operations that can quantise what they write.
_WRITERS = {
    OpKind.RMS_NORM: OpKind.RMS_NORM_FP8,
    OpKind.SWIGLU: OpKind.SWIGLU_FP8,
    OpKind.GEGLU: OpKind.GEGLU_FP8,
}


def fp8_candidates(graph: OpGraph) -> tuple[str, ...]:
    """Names of the parameters that can be kept in FP8: the weights of the products in layers, of sizes that suit it."""
    return tuple(dict.fromkeys(op.weights[0] for op in graph.layer_operations if op.kind in _PRODUCTS and _suits(op)))


def _suits(op: Operation) -> bool:
    """Whether kernels in FP8 know a product: its sizes, and of experts neither biases nor another activation."""
    if isinstance(op.dims, ExpertDims) and not op.dims.is_plain:
        return False
    assert isinstance(op.dims, LinearDims | ExpertDims)
    return not op.dims.in_features % MULTIPLE and not op.dims.out_features % MULTIPLE


def with_fp8(graph: OpGraph, weights: Mapping[str, Fp8]) -> OpGraph:
    """The graph with products in FP8.

    Args:
        graph: The model, before products are fused with activations.
        weights: How each parameter is kept, by its name: some of `fp8_candidates`.

    Returns:
        A graph of operations with the same names, and one more for each tensor that is quantised apart.
    """
    if not weights:
        return graph
    # Operations of one name are alike in all kinds of layers: what one kind needs of them, all have.
    quantising = {name for kind in graph.kinds for name in _quantising(kind, weights).values() if name is not None}
    keeping = {name for kind in graph.kinds for name in _read_otherwise(graph, kind, weights)}
    changed = graph.map_kinds(lambda kind: _with_fp8(graph, kind, weights, quantising, keeping))
    touched = {name for op in changed.operations() for name in (*op.reads, *op.writes)}
    were_touched = {name for op in graph.operations() for name in (*op.reads, *op.writes)}
    tensors = [spec for spec in graph.tensors if spec.name in touched or spec.name not in were_touched]
    parts = {op.reads[0]: _num_parts(op) for op in graph.layer_operations if _is_changed(op, weights)}
    for spec in graph.tensors:
        if _rows(spec.name) in touched:
            rows = replace(spec, name=_rows(spec.name), element=Element.FP8)
            scales = replace(spec, name=_scales(spec.name), width=parts[spec.name], element=Element.FLOAT32)
            tensors += [rows, scales]
    changed = replace(changed, name=f"{graph.name} FP8", tensors=tuple(tensors))
    changed.validate()
    return changed


def in_fp8(graph: OpGraph) -> OpGraph:
    """The graph with all products of layers in FP8 that can be, each weight with a scale for each row."""
    return with_fp8(graph, dict.fromkeys(fp8_candidates(graph), Fp8()))


def products_in_blocks(graph: OpGraph) -> tuple[str, ...]:
    """Names of the products in FP8 whose weights have a scale for each block of rows and columns."""
    found = (
        op.name
        for kind in graph.kinds
        for op in kind.operations
        if op.kind in FP8_PRODUCTS and isinstance(op.dims, LinearDims) and is_in_blocks(kind, op)
    )
    return tuple(dict.fromkeys(found))


def is_in_blocks(kind: LayerKind, product: Operation) -> bool:
    """Whether the weight of a product has a scale for each block of rows and columns."""
    return any(
        each.name == product.weights[0] and each.fp8 is not None and each.fp8.block is not None
        for each in kind.parameters
    )


def quantise_name(product: Operation) -> str:
    """The name of the operation that quantises the rows of a product, where no other operation does."""
    return f"{product.name}_quantise"


def unquantised(name: str) -> str:
    """The tensor of which another has the rows in FP8."""
    return name.removesuffix(_SUFFIX)


def _rows(name: str) -> str:
    """The tensor with the rows of another in FP8."""
    return f"{name}{_SUFFIX}"


def _scales(name: str) -> str:
    """The tensor with a scale for each row of `_rows`."""
    return f"{name}_scale"


def _num_parts(op: Operation) -> int:
    """Rows that a product has of a token in one row of the tensor that it reads."""
    return op.dims.routing.num_per_token if isinstance(op.dims, ExpertDims) and not op.dims.is_gated else 1


def _is_changed(op: Operation, weights: Mapping[str, Fp8]) -> bool:
    return op.kind in _PRODUCTS and op.weights[0] in weights


def _writer(kind: LayerKind, place: int, name: str) -> Operation | None:
    """The operation before `place` that wrote a tensor last; None if no operation of the layer did."""
    return next((op for op in reversed(kind.operations[:place]) if name in op.writes), None)


def _quantising(kind: LayerKind, weights: Mapping[str, Fp8]) -> dict[str, str | None]:
    """For each product to be changed, the name of the operation that can quantise its rows; None if there is none."""
    found: dict[str, str | None] = {}
    for place, op in enumerate(kind.operations):
        if _is_changed(op, weights):
            writer = _writer(kind, place, op.reads[0])
            found[op.name] = writer.name if writer is not None and writer.kind in _WRITERS else None
    return found


def _read_otherwise(graph: OpGraph, kind: LayerKind, weights: Mapping[str, Fp8]) -> Iterator[str]:
    """Names of operations whose rows are also read by one that takes the model's type."""
    outside = {name for op in (*graph.prologue, *graph.epilogue) for name in op.reads}
    for place, op in enumerate(kind.operations):
        for name in op.reads[1:] if _is_changed(op, weights) else op.reads:
            writer = _writer(kind, place, name)
            if writer is not None:
                yield writer.name
        if not outside.isdisjoint(op.writes):
            yield op.name


def _with_fp8(
    graph: OpGraph, kind: LayerKind, weights: Mapping[str, Fp8], quantising: AbstractSet[str], keeping: AbstractSet[str]
) -> LayerKind:
    """A kind of layer with products in FP8 of these weights; both sets have names of operations."""
    operations: list[Operation] = []
    sources, quantised = _quantising(kind, weights), set[str]()
    for op in kind.operations:
        if op.name in sources:
            (read, *others), (weight, *biases) = op.reads, op.weights
            if sources[op.name] is None and read not in quantised:
                operations.append(_quantise(graph, read, op))
                quantised.add(read)
            reads = (_rows(read), _scales(read), *others)
            parameters = (weight, f"{weight}_scales", *biases)
            operations.append(replace(op, kind=_PRODUCTS[op.kind], reads=reads, weights=parameters))
        elif op.name in quantising:
            (written,) = op.writes
            kept = (written,) if op.name in keeping else ()
            writes = (_rows(written), _scales(written), *kept)
            operations.append(replace(op, kind=_WRITERS[op.kind], writes=writes))
        else:
            operations.append(op)
            quantised.difference_update(op.writes)
    return replace(
        kind,
        operations=tuple(operations),
        parameters=tuple(replace(each, fp8=weights.get(each.name, each.fp8)) for each in kind.parameters),
    )


def _quantise(graph: OpGraph, name: str, product: Operation) -> Operation:
    """The operation that quantises the rows of a tensor for a product."""
    return Operation(
        name=quantise_name(product),
        kind=OpKind.QUANTISE_FP8,
        resource=Resource.MEMORY,
        scope=product.scope,
        reads=(name,),
        writes=(_rows(name), _scales(name)),
        dims=RowDims(width=graph.tensor(name).width, num_parts=_num_parts(product)),
    )
