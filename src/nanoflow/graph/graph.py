"""The whole model as data: sections of operations, the tensors between them, the parameters they take.

A graph has three sections: `prologue` (once), `layer` (repeated `num_layers` times) and `epilogue` (once, on the rows
that get logits). Operations stand in an order in which they may run; what may be reordered follows from the tensors
they touch (`nanobatch.py`), not from this order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanoflow.graph.operation import AttentionDims, BatchShape, Operation, OpKind, Scope


class GraphError(ValueError):
    """A graph contradicts itself; the message names the operation or tensor at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor between operations.

    Attributes:
        name: Unique in the graph.
        width: Elements a row; 0 for the paged KV cache, which has its own layout.
        scope: ALL: one row a token of the dense batch. SAMPLED: one row a row with logits.
        is_per_layer: True for the KV cache: layers do not share it. All other tensors are reused by every layer.
    """

    name: str
    width: int
    scope: Scope = Scope.ALL
    is_per_layer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPart:
    """A tensor of the checkpoint: its name (with `{layer}` in it if it is a layer's) and its shape.

    `other_source` is a name under which it may be stored instead.
    """

    source: str
    shape: tuple[int, ...]
    other_source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter as the kernels take it: checkpoint tensors one below the other (concatenated on dimension 0)."""

    name: str
    parts: tuple[ParameterPart, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the fused parameter."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def num_elements(self) -> int:
        """Elements of the fused parameter."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding, reduced to what a kernel needs.

    Attributes:
        inv_freq: One angular frequency a pair of rotated dimensions, scaling already applied. Pair i of R is made of
            dimensions i and i + R of a head; those from 2 R on are not rotated. R is at most head_dim / 2.
        attention_factor: Factor on cos and sin (YaRN); 1 otherwise.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpGraph:
    """A model.

    Attributes:
        name: Architecture and size, for messages.
        num_layers: How often `layer` is repeated.
        vocab_size: Width of the logits.
        prologue, layer, epilogue: Operations of the three sections.
        tensors: Every tensor that an operation reads or writes.
        parameters: Parameters outside the layers.
        layer_parameters: Parameters of one layer; sources hold `{layer}`.
        ignored_sources: Regular expressions of checkpoint tensors that may be there and are not needed.
        rope: Rotary embedding.
        inputs: Tensors that are there before the first operation.
    """

    name: str
    num_layers: int
    vocab_size: int
    prologue: tuple[Operation, ...]
    layer: tuple[Operation, ...]
    epilogue: tuple[Operation, ...]
    tensors: tuple[TensorSpec, ...]
    parameters: tuple[Parameter, ...]
    layer_parameters: tuple[Parameter, ...]
    rope: RopeSpec
    ignored_sources: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("token_ids",)

    def sections(self) -> Iterator[tuple[str, tuple[Operation, ...]]]:
        """The three sections with their names, in order."""
        yield from (("prologue", self.prologue), ("layer", self.layer), ("epilogue", self.epilogue))

    def tensor(self, name: str) -> TensorSpec:
        """The tensor of this name; KeyError without one."""
        return {spec.name: spec for spec in self.tensors}[name]

    @property
    def attention(self) -> AttentionDims:
        """Sizes of the attention (the same in every layer)."""
        return next(op.dims for op in self.layer if isinstance(op.dims, AttentionDims))

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters; a tied embedding counts once."""
        once = sum(parameter.num_elements for parameter in self.parameters)
        return once + self.num_layers * sum(parameter.num_elements for parameter in self.layer_parameters)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token keeps over all layers."""
        return 2 * self.attention.kv_width * self.num_layers

    def flops(self, shape: BatchShape) -> int:
        """Floating-point operations of one iteration."""
        layers = self.num_layers * sum(op.flops(shape) for op in self.layer)
        return layers + sum(op.flops(shape) for op in (*self.prologue, *self.epilogue))

    def memory_bytes(self, shape: BatchShape, dtype_bytes: int) -> int:
        """Bytes moved by one iteration if every operation reads and writes device memory once."""
        layers = self.num_layers * sum(op.memory_bytes(shape, dtype_bytes) for op in self.layer)
        return layers + sum(op.memory_bytes(shape, dtype_bytes) for op in (*self.prologue, *self.epilogue))

    def validate(self) -> None:
        """Check that names are unique and known, and that nothing is read before it is written.

        Raises:
            GraphError: Names the operation and the tensor or parameter.
        """
        _require_unique("tensor", [spec.name for spec in self.tensors])
        _require_unique("parameter", [parameter.name for parameter in (*self.parameters, *self.layer_parameters)])
        shared = {parameter.name for parameter in self.parameters}
        of_layer = {parameter.name for parameter in self.layer_parameters}
        known = {spec.name for spec in self.tensors}
        written = set(self.inputs)
        for section, operations in self.sections():
            _require_unique(f"{section} operation", [op.name for op in operations])
            for op in operations:
                _check_operation(op, known, written, of_layer if section == "layer" else shared)
                written.update(op.writes)
        if any(len(op.dims.windows) != self.num_layers for op in self.layer if isinstance(op.dims, AttentionDims)):
            raise GraphError(f"{self.name}: attention must give one sliding window (or None) a layer")


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
