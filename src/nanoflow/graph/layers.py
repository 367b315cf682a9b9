"""Layers as data: the properties of a layer kind, and the sequence of kinds in a model.

A kind has everything that may differ between layers: operations with their sizes and windows, parameters, rotary
embedding, and (by its attention) the layout of keys and values. Most models have one kind. Others repeat a pattern of
several, such as five layers with a sliding window and one without. `graph.py` has the rest of the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.graph.operation import AttentionDims, KvType, Operation, OpKind

# Longest pattern that is looked for. Layers that only repeat after more than that are listed one by one.
_MAX_PATTERN = 64

# Rows and columns of a weight in FP8 that may share a scale.
FP8_BLOCK = (128, 128)
# Numbers of a row in MXFP4 that share a scale, and those of a word.
MXFP4_GROUP, MXFP4_PER_WORD = 32, 8


class GraphError(ValueError):
    """A graph contradicts itself; the message names the operation or tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPart:
    """A tensor of the checkpoint.

    Attributes:
        source: Its name, with `{layer}` in it if each layer has one.
        shape: As kernels take it.
        other_source: An alternative name for it.
        is_transposed: Whether checkpoints have each matrix of a stack [E, rows, columns] transposed, unless it is
            packed.
        is_interleaved: Whether checkpoints alternate the rows of two halves of each matrix, or bias, of a stack (gate
            and up); kernels take the first half's, then the second's.
    """

    source: str
    shape: tuple[int, ...]
    other_source: str | None = None
    is_transposed: bool = False
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """How a parameter is kept in 8 bits: e4m3 numbers, and scales in float32 that they are multiplied by.

    Attributes:
        block: Rows and columns that share a scale, which are those of `FP8_BLOCK`; None if each row (output channel)
            has a scale of its own.
    """

    block: tuple[int, int] | None = None

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a matrix, or of equal matrices in front of which there is a dimension more."""
        *outer, rows, columns = shape
        if self.block is None:
            return (*outer, rows)
        return (*outer, -(-rows // self.block[0]), -(-columns // self.block[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMxfp4:
    """How matrices of experts are kept in MXFP4: 4 bits a number, and a power of two for 32 numbers of a row.

    Shapes of parameters are those of the numbers, [E, N, K]; `models/mxfp4.py` says where the bits of each are.

    Attributes:
        is_gated: Whether a matrix has rows of gate and up, which alternate by eight.
    """

    is_gated: bool

    def words_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the words of 32 bits."""
        return (*shape[:-1], shape[-1] // MXFP4_PER_WORD)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales, of a byte each."""
        *outer, rows, columns = shape
        return (*outer, columns // MXFP4_GROUP, rows)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of words and scales."""
        return 4 * math.prod(self.words_shape(shape)) + math.prod(self.scales_shape(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter as kernels take it: tensors of the checkpoint, concatenated along dimension 0.

    Attributes:
        name: Unique in its layer, or outside the layers.
        parts: The tensors.
        offset: Added to every element on loading.
        is_float32: Whether it is stored in float32 whatever the model's dtype; for small parameters.
        num_stacked: Number of equal matrices that the concatenated rows are seen as, in a dimension of their own in
            front (one for each expert); None for one matrix.
        whole: Name of a tensor of the checkpoint that has the whole parameter, and that some checkpoints have in place
            of the parts; None if there is none.
        fp8: How it is kept in 8 bits; None if it has the model's type. Its scales are a tensor of their own, which
            operations name beside it (`scales_name`).
        packed: How it is kept in 4 bits; None if it is not. It then has scales too.
    """

    name: str
    parts: tuple[ParameterPart, ...]
    offset: float = 0.0
    is_float32: bool = False
    num_stacked: int | None = None
    whole: str | None = None
    fp8: Fp8 | None = None
    packed: PackedMxfp4 | None = None

    @property
    def scales_name(self) -> str:
        """The name of its scales, if it is kept in 8 or 4 bits."""
        return f"{self.name}_scales"

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The tensors that it consists of on a device: itself and its scales."""
        return (self.name,) if self.fp8 is None and self.packed is None else (self.name, self.scales_name)

    def num_bytes(self, dtype_bytes: int) -> int:
        """Bytes on a device, scales included, if an element of the model's type has so many."""
        if self.packed is not None:
            return self.packed.num_bytes(self.shape)
        if self.fp8 is not None:
            return self.num_elements + 4 * math.prod(self.fp8.scales_shape(self.shape))
        return self.num_elements * (4 if self.is_float32 else dtype_bytes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the concatenated parameter."""
        num_rows, rest = sum(part.shape[0] for part in self.parts), self.parts[0].shape[1:]
        return (
            (num_rows, *rest) if self.num_stacked is None else (self.num_stacked, num_rows // self.num_stacked, *rest)
        )

    @property
    def num_elements(self) -> int:
        """Number of its elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding, reduced to what a kernel needs.

    Attributes:
        inv_freq: Angular frequencies, one for each pair of rotated dimensions, with scaling applied. With R pairs, pair
            i is dimensions i and i + R of a head; dimensions from 2 R on are not rotated. R is at most head_dim / 2.
        attention_factor: Factor on cos and sin (YaRN); 1 otherwise.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """The properties of one kind of layer.

    Attributes:
        name: Unique among the kinds of the model.
        operations: Operations of one layer, in a valid order.
        parameters: Parameters of one layer; names of checkpoint tensors have `{layer}` in them.
        rope: Rotary embedding.
    """

    name: str
    operations: tuple[Operation, ...]
    parameters: tuple[Parameter, ...]
    rope: RopeSpec

    @property
    def operation_names(self) -> tuple[str, ...]:
        """Names of its operations, in order."""
        return tuple(op.name for op in self.operations)

    @property
    def attention(self) -> AttentionDims:
        """Sizes of the attention, and so of keys and values."""
        for op in self.operations:
            if isinstance(op.dims, AttentionDims) and op.kind is not OpKind.ROPE_APPEND:
                return op.dims
        raise GraphError(f"layers of kind {self.name!r} have no attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroup:
    """Layers that share the pages of a pool: their keys and values are laid out alike and are needed equally long.

    Attributes:
        num_kv_heads, head_dim: Layout of the keys, and of the values, of one token.
        window: Sliding window of these layers (see `AttentionDims`); None without.
        layers: Their places in the model, ascending.
        kv_type: Type of keys and values.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None
    layers: tuple[int, ...]
    kv_type: KvType = KvType.MODEL

    def bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that one token keeps over the layers of the group; `dtype_bytes` are those of an activation."""
        return 2 * self.num_kv_heads * self.kv_type.vector_bytes(self.head_dim, dtype_bytes) * len(self.layers)


def kv_groups_of(layers: Sequence[LayerKind]) -> tuple[KvGroup, ...]:
    """The groups of these layers: those without a window first, then those with the largest windows."""
    members: dict[tuple[int, int, int | None, KvType], list[int]] = {}
    for place, kind in enumerate(layers):
        dims = kind.attention
        members.setdefault((dims.num_kv_heads, dims.head_dim, dims.window, dims.kv_type), []).append(place)
    groups = (
        KvGroup(num_kv_heads=heads, head_dim=head_dim, window=window, layers=tuple(places), kv_type=kv_type)
        for (heads, head_dim, window, kv_type), places in members.items()
    )
    return tuple(sorted(groups, key=lambda group: -math.inf if group.window is None else -group.window))


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A pattern of layer kinds (one layer each), repeated."""

    pattern: tuple[LayerKind, ...]
    repeats: int = 1


def sections_of(layers: Sequence[LayerKind]) -> tuple[Section, ...]:
    """Group layers into sections: repeatedly take the pattern whose repetitions cover most of the remaining layers."""
    sections: list[Section] = []
    start = 0
    while start < len(layers):
        longest = min(_MAX_PATTERN, len(layers) - start)
        covered = {1: _repeats(layers, start, 1)}
        if covered[1] < len(layers) - start:
            covered |= {length: length * _repeats(layers, start, length) for length in range(2, longest + 1)}
        # The shortest of equally good patterns; a single layer if nothing repeats.
        length = max(covered, key=covered.__getitem__)
        repeats = covered[length] // length or 1
        length = length if covered[length] else 1
        sections.append(Section(pattern=tuple(layers[start : start + length]), repeats=repeats))
        start += length * repeats
    return tuple(sections)


def _repeats(layers: Sequence[LayerKind], start: int, length: int) -> int:
    """How often the sequence of `length` layers at `start` occurs in a row; 0 if only once."""
    stop = start + length
    while stop < len(layers) and layers[stop] == layers[stop - length]:
        stop += 1
    repeats = (stop - start) // length
    return repeats if repeats > 1 else 0


def union_of(kinds: Sequence[LayerKind]) -> tuple[Operation, ...]:
    """The operations of all kinds, each name once, in an order that contains each kind's own order.

    Ties are resolved by first appearance. If the orders of kinds contradict each other, the order is arbitrary.
    """
    if len(kinds) == 1:
        return kinds[0].operations
    found: dict[str, Operation] = {}
    before: dict[str, set[str]] = {}
    for kind in kinds:
        for previous, op in itertools.pairwise((None, *kind.operations)):
            if op is not None:
                found.setdefault(op.name, op)
                before.setdefault(op.name, set()).update({previous.name} if previous is not None else ())
    order: list[Operation] = []
    while found:
        ready = (name for name in found if before[name].isdisjoint(found))
        order.append(found.pop(next(ready, next(iter(found)))))
    return tuple(order)
