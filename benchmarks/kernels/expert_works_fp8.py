"""The grouped products of a sparse layer in FP8 as work to measure, beside those in 16 bits of `expert_works.py`.

The rows of the first product are quantised by the norm before it, which is not measured here. Those of the second one
are quantised by an operation of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.kernels.expert_works import Form, Work, launch_of
from nanoflow.graph.layers import FP8_BLOCK, Fp8
from nanoflow.graph.operation import OpKind, RowDims
from nanoflow.kernels import reference_experts_fp8 as reference
from nanoflow.kernels import reference_fp8, triton_experts_fp8, triton_fp8_rows
from nanoflow.kernels.launch import Launch
from nanoflow.models.fp8 import E4M3, LARGEST, quantise_rows, quantised_chunks

_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """A stack of matrices [E, N, K] in FP8, with a scale for each row [E, N] or for each block."""

    numbers: Tensor
    scales: Tensor

    @property
    def form(self) -> Form:
        """By its scales."""
        return Form.FP8 if self.scales.dim() < self.numbers.dim() else Form.FP8_BLOCKS

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return self.numbers[0].numel() + _SCALE_BYTES * self.scales[0].numel()


def quantised(weight: Tensor, *, has_blocks: bool) -> Quantised:
    """Experts in FP8, quantised a few rows at a time; blocks share one scale here."""
    numbers = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    if has_blocks:
        scale = float(max(matrix.abs().max() for matrix in weight)) / LARGEST
        for matrix, into in zip(weight, numbers, strict=True):
            into.copy_(matrix.float() / scale)
        shape = Fp8(block=FP8_BLOCK).scales_shape(tuple(weight.shape))
        return Quantised(numbers=numbers, scales=torch.full(shape, scale, device=weight.device))
    scales = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    for first, rows, of_rows in quantised_chunks(weight.flatten(0, 1)):
        numbers.flatten(0, 1)[first : first + len(rows)] = rows
        scales.flatten()[first : first + len(rows)] = of_rows
    return Quantised(numbers=numbers, scales=scales)


def fp8_works(works: Mapping[str, Work], num_touched: int, weights: Sequence[Quantised]) -> dict[str, Work]:
    """Both products in FP8 and what quantises the rows of the second, from those in 16 bits on the same rows.

    Args:
        works: Has "experts_in" and "experts_out".
        num_touched: Experts that have rows.
        weights: Of both.
    """
    into, out = works["experts_in"], works["experts_out"]
    (x, *order), (activation, *_) = into.launch.reads, out.launch.reads
    num_rows = order[0].numel()
    rows, row_scales = quantise_rows(x)
    places, place_scales = quantise_rows(activation.view(num_rows, -1))
    quantise = launch_of(
        OpKind.QUANTISE_FP8,
        RowDims(width=activation.shape[1], num_parts=order[0].shape[1]),
        (activation,),
        (torch.empty_like(activation, dtype=E4M3), torch.empty(order[0].shape, device=x.device)),
    )
    first, second = weights
    return {
        "experts_in_fp8": replace(
            into,
            launch=_in_fp8(into, OpKind.EXPERTS_IN_FP8, (rows, row_scales), first),
            kernel=triton_experts_fp8.experts_in_fp8,
            reference=reference.experts_in_fp8,
            num_bytes=num_touched * first.expert_bytes + rows.numel() + 2 * activation.numel(),
            with_tiles=triton_experts_fp8.run_experts_in_fp8,
            form=first.form,
        ),
        "quantise": Work(
            launch=quantise,
            kernel=triton_fp8_rows.quantise_fp8,
            reference=reference_fp8.quantise_fp8,
            flops=0.0,
            num_bytes=3 * activation.numel() + _SCALE_BYTES * num_rows,
        ),
        "experts_out_fp8": replace(
            out,
            launch=_in_fp8(
                out, OpKind.EXPERTS_OUT_FP8, (places.view_as(activation), place_scales.view_as(order[0])), second
            ),
            kernel=triton_experts_fp8.experts_out_fp8,
            reference=reference.experts_out_fp8,
            num_bytes=num_touched * second.expert_bytes + activation.numel() + 2 * out.launch.writes[0].numel(),
            with_tiles=triton_experts_fp8.run_experts_out_fp8,
            form=second.form,
        ),
    }


def _in_fp8(work: Work, kind: OpKind, rows: tuple[Tensor, Tensor], weight: Quantised) -> Launch:
    """The launch of a product with rows and their scales, and a weight, in FP8."""
    launch = work.launch
    return replace(
        launch,
        op=replace(launch.op, kind=kind),
        reads=(*rows, *launch.reads[1:]),
        writes=tuple(map(torch.empty_like, launch.writes)),
        weights=(weight.numbers, weight.scales),
    )
