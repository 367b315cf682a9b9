"""Kernels restricted to a part of a GPU: some of its SMs (`kernels_on`), or a part of every SM (`kernels_beside`).

cuBLAS sizes a product for all SMs and for all of each SM's memory. On fewer SMs it needs one more wave of tiles, and
beside another kernel it waits. The products here are persistent kernels with one program an SM. The tiles of the last
wave are split along the inner dimension among programs that would be idle. Decode attention on Hopper gets programs
for the lane's SMs. All other kernels have many small programs and need no change. `executor/streams.py` opens the
streams on which these kernels run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from nanoflow.graph.operation import OpKind
from nanoflow.kernels import mxfp4_tiles, reference_fp8
from nanoflow.kernels.dispatch import Kernels
from nanoflow.kernels.expert_tiles import BESIDE, WHOLE_CARD, ExpertTiles
from nanoflow.kernels.gemm_tiles import BESIDE_TILES, PART_TILES, GemmTiles, choose_gemm_tiles
from nanoflow.kernels.hopper import has_gluon
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.mxfp4_tiles import Mxfp4Tiles


def kernels_on(kernels: Kernels, num_sms: int) -> Kernels:
    """Kernels for a lane that has SMs of its own.

    Products need 16-bit types or FP8, and a card with a tensor memory accelerator (TMA). They share a workspace, which
    the first of them allocates, so two of them must not run at the same time: every lane needs a mapping of its own.

    Args:
        kernels: Kernels for the whole device; those without a restricted form are taken over.
        num_sms: SMs of the lane.
    """
    return {
        **kernels,
        **_products(PART_TILES, num_sms),
        **_experts(kernels, WHOLE_CARD, num_sms),
        **_mxfp4_experts(kernels, mxfp4_tiles.WHOLE_CARD, num_sms),
        **_attention(kernels, num_sms, is_beside=False),
    }


def kernels_on_stream(kernels: Kernels) -> Kernels:
    """Kernels for a lane that is a stream on the whole card: products have a workspace of their own, as above.

    Args:
        kernels: Kernels for the whole device.
    """
    if kernels.get(OpKind.LINEAR_ADD_FP8) in (None, reference_fp8.linear_add_fp8):
        return kernels
    from nanoflow.kernels import triton_fp8_split

    return {**kernels, **triton_fp8_split.products()}


def kernels_beside(kernels: Kernels, num_sms: int) -> Kernels:
    """Kernels for one of two lanes that share the same SMs; types and workspace as in `kernels_on`.

    A program of a product and one of decode attention fit on an SM together: they share its 65,536 registers and
    228 KiB of shared memory, of which the card takes 1 KiB a program.

    Args:
        kernels: Kernels for the whole device; those without a restricted form are taken over.
        num_sms: SMs that the two lanes share.
    """
    return {
        **kernels,
        **_products(BESIDE_TILES, num_sms),
        **_experts(kernels, BESIDE, num_sms),
        **_mxfp4_experts(kernels, mxfp4_tiles.BESIDE, num_sms),
        **_attention(kernels, num_sms, is_beside=True),
    }


def _products(candidates: tuple[GemmTiles, ...], num_sms: int) -> Kernels:
    """Products with tile sizes from these candidates, and a workspace of their own."""
    from nanoflow.kernels import triton_fp8_split, triton_gemm, triton_split_k
    from nanoflow.kernels.triton_attention import card_of
    from nanoflow.kernels.triton_split_k import SplitWorkspace, choose_split_cut, make_workspace

    @functools.cache
    def workspace_on(device: torch.device) -> SplitWorkspace:
        return make_workspace(candidates, num_sms, device)

    def cut(launch: Launch) -> tuple[GemmTiles, int]:
        limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
        num_columns, num_features = launch.weights[0].shape
        return choose_split_cut(candidates, (len(launch.reads[0]), num_columns, num_features), num_sms, limit_bytes)

    def product(whole: Callable[..., None], split: Callable[..., None]) -> Kernel:
        def run(launch: Launch) -> None:
            tiles, num_splits = cut(launch)
            if num_splits == 1:
                whole(launch, tiles, num_sms)
            else:
                split(launch, tiles, num_sms, workspace_on(launch.reads[0].device), num_splits)

        return run

    def linear_swiglu(launch: Launch) -> None:
        limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
        shape = (len(launch.reads[0]), len(launch.weights[0]))
        tiles = choose_gemm_tiles(candidates, *shape, num_sms, limit_bytes)
        triton_gemm.run_linear_swiglu(launch, tiles, num_sms)

    return {
        **triton_fp8_split.products_on(candidates, num_sms, workspace_on),
        OpKind.LINEAR: product(triton_gemm.run_linear, triton_split_k.run_linear_split_k),
        OpKind.LINEAR_ADD: product(triton_gemm.run_linear_add, triton_split_k.run_linear_add_split_k),
        OpKind.LINEAR_SWIGLU: linear_swiglu,
    }


def _experts(kernels: Kernels, candidates: tuple[ExpertTiles, ...], num_sms: int) -> Kernels:
    """Grouped products with a program an SM; nothing unless their kernels are those in Triton."""
    from nanoflow.kernels import triton_experts, triton_experts_fp8

    # By kernel of the whole card.
    restricted: dict[Kernel, Callable[..., None]] = {
        triton_experts.experts_in: triton_experts.experts_in_on,
        triton_experts.experts_out: triton_experts.experts_out_on,
        triton_experts_fp8.experts_in_fp8: triton_experts_fp8.experts_in_fp8_on,
        triton_experts_fp8.experts_out_fp8: triton_experts_fp8.experts_out_fp8_on,
    }
    return {
        kind: functools.partial(restricted[kernel], candidates=candidates, num_programs=num_sms)
        for kind, kernel in kernels.items()
        if kernel in restricted
    }


def _mxfp4_experts(kernels: Kernels, candidates: tuple[Mxfp4Tiles, ...], num_sms: int) -> Kernels:
    """As `_experts`, of weights in MXFP4; a tiling says how many programs share a multiprocessor."""
    from nanoflow.kernels import triton_experts_mxfp4 as packed

    restricted: Kernels = {
        OpKind.EXPERTS_IN_MXFP4: functools.partial(packed.experts_in_on, candidates=candidates, num_sms=num_sms),
        OpKind.EXPERTS_OUT_MXFP4: functools.partial(packed.experts_out_on, candidates=candidates, num_sms=num_sms),
    }
    whole = packed.TRITON_MXFP4_KERNELS
    return {kind: kernel for kind, kernel in restricted.items() if kernels.get(kind) is whole[kind]}


def _attention(kernels: Kernels, num_sms: int, *, is_beside: bool) -> dict[OpKind, Callable[[Launch], None]]:
    """Decode attention with programs for this number of SMs; nothing unless its kernel is the one in Gluon."""
    if not has_gluon():
        return {}
    from nanoflow.kernels.hopper import attention

    if kernels[OpKind.DECODE_ATTENTION] is not attention.decode_attention:
        return {}
    programs_per_sm = attention.PROGRAMS_BESIDE if is_beside else None
    return {
        OpKind.DECODE_ATTENTION: functools.partial(
            attention.decode_attention_on, num_sms=num_sms, programs_per_sm=programs_per_sm
        )
    }
