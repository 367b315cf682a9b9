"""Reference kernels of the grouped products of experts in FP8: plain torch, on any device.

As in `reference_fp8.py`, numbers in FP8 become float32 by a cast, sums are in float32 and are rounded once, after the
scales. As in `reference_experts.py`, each expert with rows takes a product, and lengths are read on the host.

Shape legend: T tokens, E experts, K experts of a token, H width of the model, I width of an expert; T x K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow.graph.layers import FP8_BLOCK
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.reference_experts import activate, parts_of_experts
from nanoflow.models.fp8 import dequantised


def experts_in_fp8(launch: Launch) -> None:
    """activation [T, K x I], seen as [T x K, I] in the experts' order: silu(gate) * up of the row of each one's token.

    Rows are x e4m3 [T, H] times its scales [T, 1]. The weight is e4m3 [E, 2 I, H], each expert's gate rows before its
    up rows, times scales: one for each row [E, 2 I], or one for each block of 128 x 128.
    """
    (x, x_scales, rows, ends), (activation,) = launch.reads, launch.writes
    tokens, out = rows.flatten() // rows.shape[1], activation.view(rows.numel(), -1)
    for expert, places in parts_of_experts(ends):
        chosen = tokens[places]
        product = _product(x[chosen], x_scales[chosen], launch.weights, expert)
        activate(product.to(out.dtype), None, out[places])


def experts_out_fp8(launch: Launch) -> None:
    """out [T, K x H], seen as [T x K, H] in the tokens' order: each row's activation @ its expert's weight^T.

    The activation is e4m3 [T, K x I], seen as [T x K, I] in the experts' order, times scales [T, K] in that order; the
    weight is e4m3 [E, H, I] times scales, as in `experts_in_fp8`.
    """
    (activation, scales, rows, ends), (out,) = launch.reads, launch.writes
    by_expert, by_row = activation.view(rows.numel(), -1), scales.reshape(-1, 1)
    by_token, places_of = out.view(rows.numel(), -1), rows.flatten()
    for expert, places in parts_of_experts(ends):
        product = _product(by_expert[places], by_row[places], launch.weights, expert)
        by_token[places_of[places]] = product.to(out.dtype)


def _product(x: Tensor, x_scales: Tensor, weights: tuple[Tensor, ...], expert: int) -> Tensor:
    """float32 [rows, N] of one expert."""
    weight, scales = (each[expert] for each in weights)
    if scales.dim() == 1:
        return torch.mm(x.float(), weight.float().t()) * x_scales * scales
    return torch.mm(x.float(), dequantised(weight, scales, FP8_BLOCK).t()) * x_scales


EXPERT_FP8_KERNELS: dict[OpKind, Kernel] = {
    OpKind.EXPERTS_IN_FP8: experts_in_fp8,
    OpKind.EXPERTS_OUT_FP8: experts_out_fp8,
}
