"""Kernels kept to a part of a GPU: products as persistent kernels with one program an SM.

cuBLAS cuts a product for all SMs, and for all of each SM, so that on fewer it takes a wave more, and beside another
kernel it waits. Ours split the tiles of the last round among programs that would be idle. Decode attention on Hopper
has programs for the lane's SMs. What else there is has many small programs and needs no change. Which SMs there are is
`executor/streams.py`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from nanoflow.graph.operation import OpKind
from nanoflow.kernels.dispatch import Kernels
from nanoflow.kernels.gemm_tiles import BESIDE_TILES, PART_TILES, GemmTiles, choose_gemm_tiles
from nanoflow.kernels.hopper import has_gluon
from nanoflow.kernels.launch import Launch


def kernels_on(kernels: Kernels, num_sms: int) -> Kernels:
    """The kernels with products that keep to so many SMs; they take 16-bit types on cards with TMA.

    Products share a workspace, made by the first of them, so they must not run beside each other: each lane gets
    kernels of its own.
    """
    return {**kernels, **_products(PART_TILES, num_sms), **_attention(kernels, num_sms, is_beside=False)}


def kernels_beside(kernels: Kernels, num_sms: int) -> Kernels:
    """The kernels of one of two lanes that share so many SMs; what `kernels_on` says of its products holds of these.

    On each SM there is room for a program of a product and one of decode attention: 228 KiB of shared memory, of which
    the card takes 1 KiB a program, and 65,536 registers.
    """
    return {**kernels, **_products(BESIDE_TILES, num_sms), **_attention(kernels, num_sms, is_beside=True)}


def _products(candidates: tuple[GemmTiles, ...], num_sms: int) -> Kernels:
    """Products cut in one of these ways, with a workspace of their own."""
    from nanoflow.kernels import triton_gemm, triton_split_k
    from nanoflow.kernels.triton_attention import card_of
    from nanoflow.kernels.triton_split_k import SplitWorkspace, choose_split_cut, make_workspace

    @functools.cache
    def workspace_on(device: torch.device) -> SplitWorkspace:
        return make_workspace(candidates, num_sms, device)

    def cut(launch: Launch) -> tuple[GemmTiles, int]:
        limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
        num_columns, num_features = launch.weights[0].shape
        return choose_split_cut(candidates, (len(launch.reads[0]), num_columns, num_features), num_sms, limit_bytes)

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
        tiles = choose_gemm_tiles(candidates, *shape, num_sms, limit_bytes)
        triton_gemm.run_linear_swiglu(launch, tiles, num_sms)

    return {OpKind.LINEAR: linear, OpKind.LINEAR_ADD: linear_add, OpKind.LINEAR_SWIGLU: linear_swiglu}


def _attention(kernels: Kernels, num_sms: int, *, is_beside: bool) -> dict[OpKind, Callable[[Launch], None]]:
    """Decode attention with programs for so many SMs, if it is the kernel that can be told."""
    if not has_gluon():
        return {}
    from nanoflow.kernels.hopper import attention

    if kernels[OpKind.DECODE_ATTENTION] is not attention.decode_attention:
        return {}
    programs_per_sm = attention.PROGRAMS_BESIDE if is_beside else attention.PROGRAMS_PER_SM
    return {
        OpKind.DECODE_ATTENTION: functools.partial(
            attention.decode_attention_on, num_sms=num_sms, programs_per_sm=programs_per_sm
        )
    }
