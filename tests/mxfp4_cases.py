"""Launches of products of experts in MXFP4 on random words, and their twins with the same numbers in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import torch

from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.layers import PackedMxfp4
from nanoflow.kernels.launch import Launch
from nanoflow.models.mxfp4 import numbers_of


def packed(launch: Launch, *, scales: tuple[int, int] = (119, 124)) -> tuple[Launch, Launch]:
    """The launch of a product of experts with words and scales between two in place of its matrices, and its twin."""
    dims, (matrices, *biases) = launch.op.dims, launch.weights
    assert isinstance(dims, ExpertDims)
    form = PackedMxfp4(is_gated=dims.is_gated)
    words = torch.empty(form.words_shape(matrices.shape), dtype=torch.int32, device=matrices.device)
    words.view(torch.uint8).random_(0, 256)
    powers = torch.empty(form.scales_shape(matrices.shape), dtype=torch.uint8, device=matrices.device)
    powers.random_(scales[0], scales[1] + 1)
    numbers = numbers_of(words, powers, is_gated=dims.is_gated)
    return replace(launch, weights=(words, powers, *biases)), replace(launch, weights=(numbers, *biases))
