"""The parameters of a model on its device, and where in them each part of a checkpoint goes.

A part is copied to rows of a parameter. Where a parameter is kept in FP8 the rows' scales go with them: numbers are
quantised on the way, and a part that is stored in the same form is copied as it is. So are blocks and scales in MXFP4,
which are laid out for kernels when all are there. `weights.py` reads the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoflow.graph.graph import Fp8, OpGraph, Parameter
from nanoflow.models.contents import Contents, parts_of
from nanoflow.models.dequantise import check_scales, read_rows
from nanoflow.models.fp8 import E4M3, quantised_chunks, stored_scales
from nanoflow.models.fp8_stored import fp8_of
from nanoflow.models.mxfp4 import check_range
from nanoflow.models.stored import Stored

# Copies the second tensor to the first.
Copy = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Parameters of a model, by `Parameter.name`, and their scales by `Parameter.scales_name`.

    Attributes:
        shared: Parameters outside the layers.
        layers: Parameters of each layer.
    """

    shared: dict[str, Tensor]
    layers: tuple[dict[str, Tensor], ...]

    @property
    def num_bytes(self) -> int:
        """Memory of the parameters in bytes."""
        return sum(tensor.nbytes for group in (self.shared, *self.layers) for tensor in group.values())


def allocate(graph: OpGraph, dtype: torch.dtype, device: torch.device) -> Weights:
    """Parameters of a model, not yet filled."""

    def group(parameters: tuple[Parameter, ...]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for each in parameters:
            if each.packed is not None:
                words, scales = each.packed.words_shape(each.shape), each.packed.scales_shape(each.shape)
                found[each.name] = torch.empty(words, dtype=torch.int32, device=device)
                found[each.scales_name] = torch.empty(scales, dtype=torch.uint8, device=device)
                continue
            stored_as = torch.float32 if each.is_float32 else dtype
            found[each.name] = torch.empty(each.shape, dtype=stored_as if each.fp8 is None else E4M3, device=device)
            if each.fp8 is not None:
                shape = each.fp8.scales_shape(each.shape)
                found[each.scales_name] = torch.empty(shape, dtype=torch.float32, device=device)
        return found

    return Weights(shared=group(graph.parameters), layers=tuple(group(kind.parameters) for kind in graph.layers))


def groups_of(graph: OpGraph, weights: Weights) -> Iterator[tuple[tuple[Parameter, ...], dict[str, Tensor]]]:
    """The parameters outside the layers and those of each layer, with their tensors."""
    yield graph.parameters, weights.shared
    yield from zip((kind.parameters for kind in graph.layers), weights.layers, strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a part is copied to: rows of a parameter, and their scales if it is kept in FP8.

    Attributes:
        rows: The rows, or all matrices of a tensor that is stored whole.
        scales: A scale for each row, or for each block of rows and columns.
        fp8: As `Parameter.fp8`.
        is_packed: Whether `rows` has the words of matrices in MXFP4, and `scales` a scale for each group of theirs.
    """

    rows: Tensor
    scales: Tensor | None = None
    fp8: Fp8 | None = None
    is_packed: bool = False

    def matrices(self, chosen: slice | None) -> Target:
        """Of a stack of matrices that is never kept in FP8: the rows of some of them, or of all, below each other."""
        chosen = slice(None) if chosen is None else chosen
        if self.is_packed:
            assert self.scales is not None
            return replace(self, rows=self.rows[chosen], scales=self.scales[chosen])
        return Target(rows=self.rows[chosen].flatten(0, 1))

    def put(self, first: int, rows: Tensor, copy: Copy) -> None:
        """Copy numbers to the rows from `first` on, quantised if they are kept in FP8."""
        into = self.rows.narrow(0, first, len(rows))
        if self.scales is None:
            copy(into, rows)
            return
        # Of a stack of matrices the rows of all of them, below each other.
        into, of_rows = into.flatten(0, -2), self.scales.narrow(0, first, len(rows)).flatten()
        for place, numbers, scales in quantised_chunks(rows.flatten(0, -2)):
            copy(into.narrow(0, place, len(numbers)), numbers)
            copy(of_rows.narrow(0, place, len(scales)), scales)

    def put_part(self, part: Stored, tensors: Mapping[str, Tensor], copy: Copy) -> None:
        """Copy a whole part: as it is stored if it is kept so, else its numbers."""
        if self.is_packed:
            assert self.scales is not None
            check_range(part, tensors)
            for target, role in ((self.rows.view(torch.uint8), "blocks"), (self.scales, "scales")):
                copy(target, tensors[role].reshape(target.shape))
            return
        if self.scales is not None and fp8_of(part) == self.fp8:
            check_scales(part, tensors)
            copy(self.rows, tensors["weight"])
            copy(self.scales, stored_scales(part, tensors).contiguous())
            return
        for first, rows in read_rows(part, tensors):
            self.put(first, rows, copy)


def targets_of(graph: OpGraph, weights: Weights, contents: Contents) -> Iterator[tuple[str, Target]]:
    """Name of every part, and the slice of the parameter that it is copied to."""
    layers: tuple[int | None, ...] = (None, *range(graph.num_layers))
    for layer, (parameters, group) in zip(layers, groups_of(graph, weights), strict=True):
        for parameter in parameters:
            yield from _slices(parameter, group, contents, layer)


def _slices(
    parameter: Parameter, group: dict[str, Tensor], contents: Contents, layer: int | None
) -> Iterator[tuple[str, Target]]:
    fused = group[parameter.name]
    if parameter.packed is not None:
        (name, _), *_ = parts_of(parameter, contents.names, layer=layer)
        yield name, Target(rows=fused, scales=group[parameter.scales_name], is_packed=True)
        return
    scales = None if parameter.fp8 is None else group[parameter.scales_name]
    parts = {name: part.shape for name, part in parts_of(parameter, contents.names, layer=layer)}
    # Parts are below each other; only a tensor that is stored whole has a dimension for stacked matrices.
    if fused.dim() > len(next(iter(parts.values()))):
        fused, scales = fused.flatten(0, 1), None if scales is None else scales.flatten(0, 1)
    start = 0
    for name, shape in parts.items():
        # Rows that share a scale are in one part.
        per_scale = 1 if parameter.fp8 is None or parameter.fp8.block is None else parameter.fp8.block[0]
        yield (
            name,
            Target(
                rows=fused.narrow(0, start, shape[0]),
                scales=None if scales is None else scales[start // per_scale : -(-(start + shape[0]) // per_scale)],
                fp8=parameter.fp8,
            ),
        )
        start += shape[0]
