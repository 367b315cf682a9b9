"""CPU kernels where they pay: float32 products by oneDNN. Everything else is `reference.py`, which is their twin.

torch hands a float32 product to MKL, which on some processors is several times slower than oneDNN when there are few
rows, as in decode. Numbers are in docs/log.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow.graph.operation import OpKind
from nanoflow.kernels import reference
from nanoflow.kernels.launch import Kernel, Launch


def has_onednn() -> bool:
    """True if this torch was built with oneDNN's linear operation."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(launch: Launch) -> None:
    """out [T, N] = x [T, K] @ weight [N, K]^T (+ bias [N])."""
    (x,), (out,), (weight, *bias) = launch.reads, launch.writes, launch.weights
    if x.dtype != torch.float32:
        return reference.linear(launch)
    out.copy_(_product(x, weight, bias))
    return None


def linear_add(launch: Launch) -> None:
    """hidden [T, N] += x [T, K] @ weight [N, K]^T (+ bias [N])."""
    (x, _), (hidden,), (weight, *bias) = launch.reads, launch.writes, launch.weights
    if x.dtype != torch.float32:
        return reference.linear_add(launch)
    hidden.add_(_product(x, weight, bias))
    return None


def _product(x: Tensor, weight: Tensor, bias: list[Tensor]) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias[0] if bias else None, "none", [], "")
    return product


CPU_KERNELS: dict[OpKind, Kernel] = {
    **reference.REFERENCE_KERNELS,
    **({OpKind.LINEAR: linear, OpKind.LINEAR_ADD: linear_add} if has_onednn() else {}),
}
