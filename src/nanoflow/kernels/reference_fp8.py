"""Reference kernels of products in FP8 in plain torch: `reference.py` has those of all other operations.

Numbers in FP8 (e4m3) become float32 by a cast, so any device emulates a product of them; sums are in float32 and are
rounded once, after the scales. Rows are rounded to the model's type before they are quantised, as if norm or activation
and quantisation were two operations.

Shape legend: T tokens, K features in, N features out, I width of an activation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nanoflow.graph.layers import FP8_BLOCK
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import reference
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.reference_experts_fp8 import EXPERT_FP8_KERNELS
from nanoflow.models.fp8 import dequantised, quantise_rows


def rms_norm_fp8(launch: Launch) -> None:
    """`reference.rms_norm` of hidden [T, K]: rows e4m3 [T, K], scales float32 [T, 1], and perhaps the rows as well."""
    _quantised(launch, reference.rms_norm, torch.empty_like(launch.reads[0]))


def swiglu_fp8(launch: Launch) -> None:
    """`reference.swiglu` of gate and up [T, 2 I]: rows e4m3 [T, I] and scales float32 [T, 1]."""
    _quantised(launch, reference.swiglu, _half(launch.reads[0]))


def geglu_fp8(launch: Launch) -> None:
    """`reference.geglu` of gate and up [T, 2 I]: rows e4m3 [T, I] and scales float32 [T, 1]."""
    _quantised(launch, reference.geglu, _half(launch.reads[0]))


def quantise_fp8(launch: Launch) -> None:
    """Rows e4m3 [T, K] and scales float32 [T, P] of x [T, K], whose rows are P equal parts with a scale each."""
    scales = launch.writes[1]
    parts = replace(launch, writes=tuple(each.view(scales.numel(), -1) for each in launch.writes))
    _write(parts, launch.reads[0].view(scales.numel(), -1))


def linear_fp8(launch: Launch) -> None:
    """out [T, N] = (x [T, K] * its scales [T, 1]) @ (weight [N, K] * its scales)^T (+ bias [N]).

    x and weight are e4m3. Scales of the weight are float32, one for each row [N], or one for each block of rows and
    columns, of 128 x 128.
    """
    (out,) = launch.writes
    out.copy_(_product(launch))


def linear_add_fp8(launch: Launch) -> None:
    """hidden [T, N] += the product of `linear_fp8`, added in float32 and rounded once."""
    (hidden,) = launch.writes
    hidden.copy_(hidden.float() + _product(launch))


def linear_swiglu_fp8(launch: Launch) -> None:
    """out [T, I] = silu(gate) * up of the product [T, 2 I] of `linear_fp8`, rounded in between, in the model's type."""
    (out,) = launch.writes
    gate_up = _product(launch).to(out.dtype)
    reference.swiglu(replace(launch, reads=(gate_up,), weights=()))


def _product(launch: Launch) -> Tensor:
    x, x_scales, *_ = launch.reads
    weight, scales, *bias = launch.weights
    if scales.dim() == 1:
        product = torch.mm(x.float(), weight.float().t()) * x_scales * scales
    else:
        product = torch.mm(x.float(), dequantised(weight, scales, FP8_BLOCK).t()) * x_scales
    return product + bias[0].float() if bias else product


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


def _quantised(launch: Launch, kernel: Kernel, rows: Tensor) -> None:
    """Run a kernel that writes `rows`, and quantise these."""
    kernel(replace(launch, writes=(rows,)))
    _write(launch, rows)


def _write(launch: Launch, rows: Tensor) -> None:
    numbers, scales, *kept = launch.writes
    quantised, scale = quantise_rows(rows)
    numbers.copy_(quantised)
    scales.copy_(scale)
    for each in kept:
        each.copy_(rows)


FP8_KERNELS: dict[OpKind, Kernel] = {
    OpKind.RMS_NORM_FP8: rms_norm_fp8,
    OpKind.SWIGLU_FP8: swiglu_fp8,
    OpKind.GEGLU_FP8: geglu_fp8,
    OpKind.QUANTISE_FP8: quantise_fp8,
    OpKind.LINEAR_FP8: linear_fp8,
    OpKind.LINEAR_ADD_FP8: linear_add_fp8,
    OpKind.LINEAR_SWIGLU_FP8: linear_swiglu_fp8,
    **EXPERT_FP8_KERNELS,
}
