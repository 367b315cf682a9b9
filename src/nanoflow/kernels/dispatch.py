"""Which kernel computes an operation on which device. One dict literal; the reference kernels run anywhere."""

from __future__ import annotations

import torch

from nanoflow.graph.operation import OpKind
from nanoflow.kernels.cpu import CPU_KERNELS
from nanoflow.kernels.launch import Kernel
from nanoflow.kernels.reference import REFERENCE_KERNELS

_KERNELS: dict[str, dict[OpKind, Kernel]] = {
    "cpu": CPU_KERNELS,
    "cuda": REFERENCE_KERNELS,
}


def kernels_for(device: torch.device) -> dict[OpKind, Kernel]:
    """The kernels of a device, one for every kind of operation.

    Raises:
        ValueError: Nothing runs on such a device.
    """
    if device.type not in _KERNELS:
        raise ValueError(f"no kernels for device {device.type!r}; there are some for {', '.join(_KERNELS)}")
    return _KERNELS[device.type]
