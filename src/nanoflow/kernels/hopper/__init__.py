"""Kernels for NVIDIA Hopper cards, most of them in Gluon, Triton's language of tiles, layouts and barriers.

`attention.py` is decode attention as a kernel of its own. `carry.py` is a product that carries a share of decode
attention: its program runs both in one instruction stream. `merge.py` joins what several programs did of one head.
This file can be imported anywhere; the others need a Triton that has Gluon (`has_gluon`). Which kernel a model gets is
`kernels/dispatch.py`'s; which product carries which attention is `executor/carry.py`'s.
"""

from __future__ import annotations

import importlib.util

import torch

from nanoflow.graph.operation import AttentionDims, KvType


def has_gluon() -> bool:
    """Whether this Triton has Gluon; without it, other kernels are used."""
    try:
        return importlib.util.find_spec("triton.experimental.gluon.nvidia.hopper") is not None
    except ModuleNotFoundError:
        return False


def can_carry(device: torch.device, dtype: torch.dtype, dims: AttentionDims) -> bool:
    """Whether products can carry decode attention of these heads on this device.

    They can where `can_attend` holds, in bfloat16 with keys and values in 16 bits, and without sinks.
    """
    if not has_gluon():
        return False
    from nanoflow.kernels.hopper.attention import can_attend

    return (
        dtype is torch.bfloat16
        and dims.kv_type is KvType.MODEL
        and not dims.has_sinks
        and can_attend(device, dtype, dims)
    )


def steps_of(share: float) -> int:
    """Number of k-steps of a product for each block of keys, if the product has this share of the steps."""
    return max(round(share / (1.0 - share)), 1)


def share_of(steps: int) -> float:
    """The product's share of the steps, with this number of k-steps for each block of keys."""
    return steps / (steps + 1)
