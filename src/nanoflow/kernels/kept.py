"""Kernels kept to a part of a GPU: products as persistent kernels with one program an SM of their partition.

cuBLAS cuts a product for all SMs, so that on fewer it takes a wave more. Ours split the tiles of the last round among
programs that would be idle. Decode attention on Hopper has programs for the partition's SMs.
What else there is has many small programs and needs no change. Which SMs there are is `device/lanes.py`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from nanoflow.graph.operation import OpKind
from nanoflow.kernels.dispatch import Kernels, has_gluon
from nanoflow.kernels.launch import Launch


def kernels_on(kernels: Kernels, num_sms: int) -> Kernels:
    """The kernels with products that keep to so many SMs; they take 16-bit types on cards with TMA.

    Products share a workspace, made by the first of them, so they must not run beside each other: each lane gets
    kernels of its own.
    """
    from nanoflow.kernels import triton_gemm, triton_split_k
    from nanoflow.kernels.triton_attention import card_of
    from nanoflow.kernels.triton_gemm import PART_TILES, GemmTiles, choose_gemm_tiles
    from nanoflow.kernels.triton_split_k import SplitWorkspace, choose_split_cut, make_workspace

    @functools.cache
    def workspace_on(device: torch.device) -> SplitWorkspace:
        return make_workspace(PART_TILES, num_sms, device)

    def cut(launch: Launch) -> tuple[GemmTiles, int]:
        limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
        num_columns, num_features = launch.weights[0].shape
        return choose_split_cut(PART_TILES, (len(launch.reads[0]), num_columns, num_features), num_sms, limit_bytes)

    def linear(launch: Launch) -> None:
        tiles, num_splits = cut(launch)
        if num_splits == 1:
            triton_gemm.run_linear(launch, tiles, num_sms)
        else:
            workspace = workspace_on(launch.reads[0].device)
            triton_split_k.run_linear_split_k(launch, tiles, num_sms, workspace, num_splits)

    def linear_add(launch: Launch) -> None:
        tiles, num_splits = cut(launch)
        if num_splits == 1:
            triton_gemm.run_linear_add(launch, tiles, num_sms)
        else:
            workspace = workspace_on(launch.reads[0].device)
            triton_split_k.run_linear_add_split_k(launch, tiles, num_sms, workspace, num_splits)

    def linear_swiglu(launch: Launch) -> None:
        limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
        shape = (len(launch.reads[0]), len(launch.weights[0]))
        tiles = choose_gemm_tiles(PART_TILES, *shape, num_sms, limit_bytes)
        triton_gemm.run_linear_swiglu(launch, tiles, num_sms)

    kept: dict[OpKind, Callable[[Launch], None]] = {
        OpKind.LINEAR: linear,
        OpKind.LINEAR_ADD: linear_add,
        OpKind.LINEAR_SWIGLU: linear_swiglu,
    }
    if has_gluon():
        from nanoflow.kernels import gluon_attention

        if kernels[OpKind.DECODE_ATTENTION] is gluon_attention.decode_attention:
            kept[OpKind.DECODE_ATTENTION] = functools.partial(gluon_attention.decode_attention_on, num_sms=num_sms)
    return {**kernels, **kept}
