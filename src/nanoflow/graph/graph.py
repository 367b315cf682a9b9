"""The whole model as data: layers of one or several kinds, the tensors between operations, and the parameters.

A graph begins with a `prologue` (once) and ends with an `epilogue` (once, on the rows that get logits). Its layers are
in between: sections, each of which repeats a pattern of layer kinds (`layers.py`). Operations are listed in a valid
order. What may be reordered follows from the tensors they share (`nanobatch.py`), not from this order.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.layers import (
    Fp8,
    GraphError,
    KvGroup,
    LayerKind,
    PackedMxfp4,
    Parameter,
    ParameterPart,
    RopeSpec,
    Section,
    kv_groups_of,
    sections_of,
    union_of,
)
from nanoflow.graph.operation import FP8_PRODUCTS, AttentionDims, BatchShape, KvType, Operation, OpKind, Scope

__all__ = [
    "Element",
    "Fp8",
    "GraphError",
    "LayerKind",
    "OpGraph",
    "PackedMxfp4",
    "Parameter",
    "ParameterPart",
    "RopeSpec",
    "Section",
    "TensorSpec",
]


class Element(enum.StrEnum):
    """The type of a tensor's elements: the model's, one of 4 bytes, or FP8 (e4m3) of one byte."""

    MODEL = "model"
    FP8 = "fp8"
    FLOAT32 = "float32"
    INT32 = "int32"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor between operations.

    Attributes:
        name: Unique in the graph.
        width: Elements of a row; 0 for the paged KV cache, which has its own layout.
        scope: ALL: one row for each token of the dense batch. SAMPLED: one for each row that gets logits.
        is_per_layer: True for the KV cache, of which each layer has its own. Layers share all other tensors.
        element: Type of its elements.
        is_by_range: Its rows belong to a token range as a whole (rows sorted by expert), not each to a token. So every
            operation that touches it must be cut at the same places, which plans are checked for.
    """

    name: str
    width: int
    scope: Scope = Scope.ALL
    is_per_layer: bool = False
    element: Element = Element.MODEL
    is_by_range: bool = False

    def row_bytes(self, dtype_bytes: int) -> int:
        """Bytes of a row, if an element of the model's type has so many."""
        return self.width * {Element.MODEL: dtype_bytes, Element.FP8: 1}.get(self.element, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpGraph:
    """A model.

    Attributes:
        name: Architecture and size, for messages.
        vocab_size: Width of the logits.
        prologue, epilogue: Operations before and after the layers.
        sections: The layers: patterns of layer kinds, each repeated, one section after the other.
        tensors: Every tensor that an operation reads or writes.
        parameters: Parameters outside the layers.
        ignored_sources: Regular expressions of checkpoint tensors that may exist and are not needed.
        inputs: Tensors that exist before the first operation.
    """

    name: str
    vocab_size: int
    prologue: tuple[Operation, ...]
    sections: tuple[Section, ...]
    epilogue: tuple[Operation, ...]
    tensors: tuple[TensorSpec, ...]
    parameters: tuple[Parameter, ...]
    ignored_sources: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("token_ids",)

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, the first layer first."""
        return tuple(kind for section in self.sections for kind in section.pattern * section.repeats)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return sum(len(section.pattern) * section.repeats for section in self.sections)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different kinds, in order of their first layer."""
        found: list[LayerKind] = []
        for kind in (kind for section in self.sections for kind in section.pattern):
            if kind not in found:
                found.append(kind)
        return tuple(found)

    @property
    def kind_counts(self) -> tuple[tuple[LayerKind, int], ...]:
        """Each kind and the number of its layers."""
        names = Counter(kind.name for kind in self.layers)
        return tuple((kind, names[kind.name]) for kind in self.kinds)

    @property
    def main_pattern(self) -> tuple[LayerKind, ...]:
        """The pattern of the section with most layers, which represents the model in simulations."""
        return max(self.sections, key=lambda section: len(section.pattern) * section.repeats).pattern

    @property
    def layer(self) -> tuple[Operation, ...]:
        """The operations of all kinds, each name once, in an order that is valid for every kind; plans name these.

        Of several operations with one name, the first kind's is returned. Sizes and costs must be taken from each kind.
        """
        return union_of(self.kinds)

    @property
    def layer_operations(self) -> tuple[Operation, ...]:
        """Every different operation of the layers, including several with one name."""
        return tuple(dict.fromkeys(op for kind in self.kinds for op in kind.operations))

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The different rotary embeddings of the kinds, in order of their first layer."""
        return tuple(dict.fromkeys(kind.rope for kind in self.kinds))

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """The layers by the pool that their KV pages come from; those without a window first."""
        return kv_groups_of(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, None without one."""
        return tuple(kind.attention.window for kind in self.layers)

    def neighbours(self, count: int) -> Iterator[tuple[LayerKind, ...]]:
        """Every different sequence of `count` consecutive layers (all layers if there are fewer).

        Sequences whose layers have operations of the same names can be planned alike, so only one of them is returned.
        """
        layers, seen = self.layers, set[tuple[int, ...]]()
        numbers: dict[tuple[str, ...], int] = {}
        alike = {kind.name: numbers.setdefault(kind.operation_names, len(numbers)) for kind in self.kinds}
        count = min(count, len(layers))
        for start in range(len(layers) - count + 1):
            run = layers[start : start + count]
            names = tuple(alike[kind.name] for kind in run)
            if names not in seen:
                seen.add(names)
                yield run

    @property
    def reach(self) -> int:
        """How many layers back an operation can depend directly; dependencies further back follow from these.

        It is 1 if every layer has the same operations, as each then depends on the layer before.
        """
        names = {kind.operation_names for kind in self.kinds}
        return 1 if len(names) == 1 else max(len(section.pattern) for section in self.sections) + 1

    def parts(self) -> Iterator[tuple[str, tuple[Operation, ...]]]:
        """Prologue, one layer (see `layer`) and epilogue, each with its name."""
        yield from (("prologue", self.prologue), ("layer", self.layer), ("epilogue", self.epilogue))

    def operations(self) -> Iterator[Operation]:
        """Every different operation of prologue, layers and epilogue."""
        yield from (*self.prologue, *self.layer_operations, *self.epilogue)

    def with_layers(self, layers: Sequence[LayerKind]) -> OpGraph:
        """The same model with other layers."""
        return replace(self, sections=sections_of(layers))

    def map_kinds(self, change: Callable[[LayerKind], LayerKind]) -> OpGraph:
        """The same model with each kind changed."""
        return replace(
            self,
            sections=tuple(replace(each, pattern=tuple(map(change, each.pattern))) for each in self.sections),
        )

    def tensor(self, name: str) -> TensorSpec:
        """The tensor of this name; KeyError if there is none."""
        for spec in self.tensors:
            if spec.name == name:
                return spec
        raise KeyError(name)

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters; a tied embedding is counted once."""
        return sum(parameter.num_elements for parameter in self.parameters) + self._over_layers(
            lambda kind: sum(parameter.num_elements for parameter in kind.parameters)
        )

    @property
    def num_fp8_parameters(self) -> int:
        """Elements of the parameters that are kept in FP8, all of which are in layers."""
        return self._over_layers(
            lambda kind: sum(each.num_elements for each in kind.parameters if each.fp8 is not None)
        )

    @property
    def num_active_fp8_parameters(self) -> int:
        """Those of `num_fp8_parameters` that one token passes."""
        return self.num_fp8_parameters - self._over_layers(
            lambda kind: sum(
                op.dims.num_idle_weights
                for op in kind.operations
                if op.kind in FP8_PRODUCTS and isinstance(op.dims, ExpertDims)
            )
        )

    def parameter_bytes(self, dtype_bytes: int) -> int:
        """Bytes of all parameters, if an element of the model's type has so many."""
        return sum(parameter.num_bytes(dtype_bytes) for parameter in self.parameters) + self._over_layers(
            lambda kind: sum(parameter.num_bytes(dtype_bytes) for parameter in kind.parameters)
        )

    @property
    def num_active_parameters(self) -> int:
        """Elements of the parameters that one token passes: all but those of the experts that it does not choose."""
        return self.num_parameters - self._over_layers(
            lambda kind: sum(op.dims.num_idle_weights for op in kind.operations if isinstance(op.dims, ExpertDims))
        )

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values of one token over all layers; `dtype_bytes` are those of an activation."""
        return self._over_layers(lambda kind: kind.attention.cached_bytes(dtype_bytes))

    def with_kv_type(self, kv_type: KvType) -> OpGraph:
        """The same model with keys and values of this type in the cache."""

        def changed(op: Operation) -> Operation:
            return replace(op, dims=replace(op.dims, kv_type=kv_type)) if isinstance(op.dims, AttentionDims) else op

        return self.map_kinds(lambda kind: replace(kind, operations=tuple(map(changed, kind.operations))))

    def flops(self, shape: BatchShape) -> int:
        """Floating-point operations of one iteration."""
        layers = self._over_layers(lambda kind: sum(op.flops(shape) for op in kind.operations))
        return layers + sum(op.flops(shape) for op in (*self.prologue, *self.epilogue))

    def memory_bytes(self, shape: BatchShape, dtype_bytes: int) -> int:
        """Bytes moved by one iteration if every operation moves its inputs and outputs once."""
        layers = self._over_layers(lambda kind: sum(op.memory_bytes(shape, dtype_bytes) for op in kind.operations))
        return layers + sum(op.memory_bytes(shape, dtype_bytes) for op in (*self.prologue, *self.epilogue))

    def _over_layers(self, amount: Callable[[LayerKind], int]) -> int:
        """Sum over all layers of an amount that depends on the kind."""
        return sum(section.repeats * sum(map(amount, section.pattern)) for section in self.sections)

    def validate(self) -> None:
        """Check that names are unique and known, and that nothing is read before it is written.

        Raises:
            GraphError: The message names the operation and the tensor or parameter.
        """
        if not self.num_layers:
            raise GraphError(f"{self.name} has no layer")
        _require_unique("tensor", [spec.name for spec in self.tensors])
        _require_unique("layer kind", [kind.name for kind in self.kinds])
        for kind in self.kinds:
            self._check_kind(kind)

    def _check_kind(self, kind: LayerKind) -> None:
        """Check the graph as if all of its layers had this kind."""
        _require_unique("parameter", [parameter.name for parameter in (*self.parameters, *kind.parameters)])
        shared, of_layer = (
            {name for each in group for name in each.tensor_names} for group in (self.parameters, kind.parameters)
        )
        known = {spec.name for spec in self.tensors}
        written = set(self.inputs)
        parts = (("prologue", self.prologue), (kind.name, kind.operations), ("epilogue", self.epilogue))
        for part, operations in parts:
            _require_unique(f"{part} operation", [op.name for op in operations])
            for op in operations:
                _check_operation(op, known, written, of_layer if operations is kind.operations else shared)
                written.update(op.writes)
        union = self.layer
        if tuple(op.name for op in union if op.name in kind.operation_names) != kind.operation_names:
            raise GraphError(f"{self.name}: layers of kind {kind.name!r} order operations otherwise than other kinds")
        looks = {op.name: _look(op) for op in union}
        for op in kind.operations:
            if looks[op.name] != _look(op):
                raise GraphError(
                    f"operation {op.name!r} differs in layers of kind {kind.name!r} from the others, "
                    "so it needs a name of its own"
                )


def _look(op: Operation) -> tuple[object, ...]:
    """The properties that a plan relies on: operations of one name must agree in them, whatever the kind of layer."""
    return op.kind, op.resource, op.scope, op.reads, op.writes, op.reads_before


def _check_operation(op: Operation, known: set[str], written: set[str], parameters: set[str]) -> None:
    for name in (*op.reads, *op.writes):
        if name not in known:
            raise GraphError(f"operation {op.name!r} touches tensor {name!r}, which the graph does not list")
    for name in op.reads:
        if name not in written:
            raise GraphError(f"operation {op.name!r} reads tensor {name!r} before anything has written it")
    for name in op.weights:
        if name not in parameters:
            raise GraphError(f"operation {op.name!r} takes parameter {name!r}, which its section does not have")
    if not set(op.reads_before) <= set(op.reads):
        raise GraphError(f"operation {op.name!r}: reads_before must be among its reads")
    if op.kind is OpKind.PREFILL_ATTENTION and not op.reads_before:
        raise GraphError(f"operation {op.name!r} must say that it reads keys before its range")


def _require_unique(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise GraphError(f"{what} {name!r} is there twice")
        seen.add(name)
