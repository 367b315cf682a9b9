"""Layers as data: what a layer of one kind is, and how layers of several kinds follow each other.

A kind owns whatever may differ between layers: its operations with their sizes and windows, its parameters, its rotary
embedding, and with the attention the layout of its keys and values. Most models have one kind; others repeat a pattern
of several, such as five layers with a sliding window and one without. The model around them is `graph.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.graph.operation import AttentionDims, Operation, OpKind

# Longest pattern that is looked for; layers that repeat only over more than that are listed one by one.
_MAX_PATTERN = 64


class GraphError(ValueError):
    """A graph contradicts itself; the message names the operation or tensor at fault."""


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
    """A parameter as the kernels take it: checkpoint tensors one below the other (concatenated on dimension 0).

    Attributes:
        name: Unique in its layer, or outside the layers.
        parts: The tensors.
        offset: What is added to every element when it is read.
        is_float32: Whether it is kept in float32, whatever the model's type; for small ones.
    """

    name: str
    parts: tuple[ParameterPart, ...]
    offset: float = 0.0
    is_float32: bool = False

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
class LayerKind:
    """What a layer of one kind is.

    Attributes:
        name: Tells it from the other kinds of the model.
        operations: Of one layer, in an order in which they may run.
        parameters: Of one layer; sources hold `{layer}`.
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
    """

    num_kv_heads: int
    head_dim: int
    window: int | None
    layers: tuple[int, ...]

    @property
    def elements_per_token(self) -> int:
        """Elements of keys and values that one token keeps over the layers of the group."""
        return 2 * self.num_kv_heads * self.head_dim * len(self.layers)


def kv_groups_of(layers: Sequence[LayerKind]) -> tuple[KvGroup, ...]:
    """The groups of these layers: those without a window first, then those with the largest windows."""
    members: dict[tuple[int, int, int | None], list[int]] = {}
    for place, kind in enumerate(layers):
        dims = kind.attention
        members.setdefault((dims.num_kv_heads, dims.head_dim, dims.window), []).append(place)
    groups = (
        KvGroup(num_kv_heads=heads, head_dim=head_dim, window=window, layers=tuple(places))
        for (heads, head_dim, window), places in members.items()
    )
    return tuple(sorted(groups, key=lambda group: -math.inf if group.window is None else -group.window))


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A pattern of layer kinds, one layer each, repeated."""

    pattern: tuple[LayerKind, ...]
    repeats: int = 1


def sections_of(layers: Sequence[LayerKind]) -> tuple[Section, ...]:
    """The layers as sections: always the pattern whose repetition covers most of what is left, then the rest."""
    sections: list[Section] = []
    start = 0
    while start < len(layers):
        longest = min(_MAX_PATTERN, len(layers) - start)
        covered = {1: _repeats(layers, start, 1)}
        if covered[1] < len(layers) - start:
            covered |= {length: length * _repeats(layers, start, length) for length in range(2, longest + 1)}
        # The shortest of equals; a single layer where nothing is repeated.
        length = max(covered, key=covered.__getitem__)
        repeats = covered[length] // length or 1
        length = length if covered[length] else 1
        sections.append(Section(pattern=tuple(layers[start : start + length]), repeats=repeats))
        start += length * repeats
    return tuple(sections)


def _repeats(layers: Sequence[LayerKind], start: int, length: int) -> int:
    """How often the next `length` layers stand there, one after the other; 0 if only once."""
    stop = start + length
    while stop < len(layers) and layers[stop] == layers[stop - length]:
        stop += 1
    repeats = (stop - start) // length
    return repeats if repeats > 1 else 0


def union_of(kinds: Sequence[LayerKind]) -> tuple[Operation, ...]:
    """The operations of all kinds, each name once, in an order that every kind's own order is a part of.

    Where that leaves a choice, what is met first stands first. There is no such order if kinds contradict each other;
    then it is any.
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
