"""Which kernel computes an operation on which device. The reference kernels run anywhere, the others where they pay."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from nanoflow.graph.operation import AttentionDims, Operation, OpKind
from nanoflow.kernels.cpu import CPU_KERNELS
from nanoflow.kernels.launch import Kernel
from nanoflow.kernels.reference import REFERENCE_KERNELS

Kernels = dict[OpKind, Kernel]
# Head sizes that the Triton attention takes; other models get the reference kernels.
_TRITON_HEAD_SIZES = (16, 32, 64, 128, 256)


def kernels_for(device: torch.device, layer: tuple[Operation, ...]) -> Kernels:
    """The kernels of a device for a model with these operations in its layer, one for every kind of operation.

    Raises:
        ValueError: Nothing runs on such a device.
    """
    if device.type not in _KERNELS:
        raise ValueError(f"no kernels for device {device.type!r}; there are some for {', '.join(_KERNELS)}")
    return _KERNELS[device.type](layer)


def _cpu_kernels(_layer: tuple[Operation, ...]) -> Kernels:
    return CPU_KERNELS


def _cuda_kernels(layer: tuple[Operation, ...]) -> Kernels:
    if importlib.util.find_spec("triton") is None:
        return REFERENCE_KERNELS
    from nanoflow.kernels import triton_attention
    from nanoflow.kernels.triton_elementwise import ELEMENTWISE_KERNELS

    head_sizes = {op.dims.head_dim for op in layer if isinstance(op.dims, AttentionDims)}
    kernels = {**REFERENCE_KERNELS, **ELEMENTWISE_KERNELS}
    if head_sizes <= set(_TRITON_HEAD_SIZES):
        kernels[OpKind.DECODE_ATTENTION] = triton_attention.decode_attention
        kernels[OpKind.PREFILL_ATTENTION] = triton_attention.prefill_attention
    return kernels


_KERNELS: dict[str, Callable[[tuple[Operation, ...]], Kernels]] = {"cpu": _cpu_kernels, "cuda": _cuda_kernels}
