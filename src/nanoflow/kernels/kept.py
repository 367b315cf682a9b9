"""Kernels kept to a part of a GPU: products as persistent kernels with one program an SM of their partition.

cuBLAS cuts a product for all SMs, so that on fewer it takes a wave more. Attentions and row-wise operations have many
small programs and need no change. Which SMs there are is `device/lanes.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from nanoflow.graph.operation import OpKind
from nanoflow.kernels.dispatch import Kernels
from nanoflow.kernels.launch import Launch


def kernels_on(kernels: Kernels, num_sms: int) -> Kernels:
    """The kernels with products that keep to so many SMs; they take 16-bit types on cards with TMA.

    The sum of a LINEAR_ADD is a kernel of its own there.
    """
    from nanoflow.kernels import triton_gemm
    from nanoflow.kernels.triton_attention import card_of
    from nanoflow.kernels.triton_gemm import GEMM_TILES, GemmTiles, choose_gemm_tiles

    def cut(launch: Launch) -> tuple[GemmTiles, int]:
        limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
        shape = (len(launch.reads[0]), len(launch.weights[0]))
        return choose_gemm_tiles(GEMM_TILES, *shape, num_sms, limit_bytes), num_sms

    def linear(launch: Launch) -> None:
        triton_gemm.run_linear(launch, *cut(launch))

    def linear_add(launch: Launch) -> None:
        (x, _), (hidden,) = launch.reads, launch.writes
        product = torch.empty_like(hidden)
        linear(replace(launch, reads=(x,), writes=(product,)))
        hidden.add_(product)

    def linear_swiglu(launch: Launch) -> None:
        triton_gemm.run_linear_swiglu(launch, *cut(launch))

    products: dict[OpKind, Callable[[Launch], None]] = {
        OpKind.LINEAR: linear,
        OpKind.LINEAR_ADD: linear_add,
        OpKind.LINEAR_SWIGLU: linear_swiglu,
    }
    return {**kernels, **products}
