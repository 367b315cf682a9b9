"""Cutting operations into nano-operations, and the rule that decides which must wait for which.

Rule (paper section 4.1.2, made exact): two nano-operations depend on each other if and only if one writes a tensor that
the other reads or writes *and* their token ranges of that tensor intersect. Prefill attention reads the keys of its
whole prefix, so its range in the KV cache starts at 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import Operation, Scope


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class TokenRange:
    """Tokens start..stop-1 of the dense batch."""

    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the range."""
        return self.stop - self.start

    def intersects(self, other: TokenRange) -> bool:
        """True if a token is in both ranges."""
        return self.start < other.stop and other.start < self.stop

    def clip(self, start: int, stop: int) -> TokenRange:
        """The part within start..stop; empty (start == stop) if there is none."""
        low = min(max(self.start, start), stop)
        return TokenRange(start=low, stop=max(low, min(self.stop, stop)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """An operation on a token range in a layer, for which dependencies are decided."""

    op: Operation
    tokens: TokenRange
    layer: int = 0


_DISJOINT_SCOPES = frozenset({Scope.DECODE, Scope.PREFILL})


def depends(graph: OpGraph, first: Access, second: Access) -> bool:
    """True if the two accesses must not be swapped (read after write, write after read, write after write)."""
    if {first.op.scope, second.op.scope} == _DISJOINT_SCOPES:
        return False
    for name in shared_tensors(first.op, second.op):
        is_own_layer_only = graph.tensor(name).is_per_layer
        if is_own_layer_only and first.layer != second.layer:
            continue
        if _touched(first, name).intersects(_touched(second, name)):
            return True
    return False


def shared_tensors(first: Operation, second: Operation) -> set[str]:
    """Tensors that both operations use and at least one of them writes."""
    writes_first, writes_second = set(first.writes), set(second.writes)
    return (writes_first & (writes_second | set(second.reads))) | (set(first.reads) & writes_second)


def _touched(access: Access, name: str) -> TokenRange:
    if name in access.op.reads_before:
        return TokenRange(start=0, stop=access.tokens.stop)
    return access.tokens


def decodes_before(place: int, num_decodes: int, num_tokens: int) -> int:
    """Decodes before a token index at which a batch is cut: nano-batches get decodes in proportion to their size.

    So each nano-batch has a part of the attention, which products of another nano-batch can overlap.
    """
    return num_decodes * min(place, num_tokens) // num_tokens if num_tokens else 0


def split(num_tokens: int, boundaries: Sequence[int] = ()) -> tuple[TokenRange, ...]:
    """Cut 0..num_tokens at the boundaries into nano-batches.

    Args:
        num_tokens: Size of the dense batch.
        boundaries: Strictly increasing, each within (0, num_tokens).

        Returns:
        One range more than there are boundaries; together they cover the batch without overlap.

        Raises:
        ValueError: Boundaries are out of order or out of range.
    """
    edges = [0, *boundaries, num_tokens]
    if any(low >= high for low, high in itertools.pairwise(edges)):
        raise ValueError(f"boundaries {list(boundaries)} must increase strictly inside (0, {num_tokens})")
    return tuple(TokenRange(start=low, stop=high) for low, high in itertools.pairwise(edges))
