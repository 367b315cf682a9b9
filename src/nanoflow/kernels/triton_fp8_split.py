"""Products in FP8 whose last round of tiles is split along the features, by `triton_split_k.py`.

With few tokens a product has fewer tiles than a card has SMs, and those that work read the weight alone. On a part of a
card any product may be split. On the whole card only those are that are added to the residual stream: the others are
torch's. Weights with a scale for each block are never split.

The references are in `reference_fp8.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nanoflow.graph.operation import OpKind
from nanoflow.kernels import triton_fp8
from nanoflow.kernels.gemm_tiles import FP8_TILES, GEMM_TILES, GemmTiles, with_addend
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.triton_attention import card_of
from nanoflow.kernels.triton_split_k import Factors, SplitWorkspace, choose_split_cut, make_workspace, run_split

# With more tokens on the whole card, tiles of any size keep all SMs busy for most of the time.
_MOST_TOKENS = 128
_Workspaces = Callable[[torch.device], SplitWorkspace]


def products_on(candidates: tuple[GemmTiles, ...], num_sms: int, workspace_on: _Workspaces) -> dict[OpKind, Kernel]:
    """The products for a part of a card.

    Args:
        candidates: Tilings for 16 bits, fastest first.
        num_sms: SMs of the part.
        workspace_on: Their memory for partial sums on a device, made for `candidates` and `num_sms`.
    """

    def swiglu(launch: Launch) -> None:
        triton_fp8.run_linear_swiglu_fp8(launch, *triton_fp8.choose_cut(launch, candidates, num_sms))

    return {
        OpKind.LINEAR_FP8: functools.partial(_run, candidates, num_sms, workspace_on, False),
        OpKind.LINEAR_ADD_FP8: functools.partial(_run, candidates, num_sms, workspace_on, True),
        OpKind.LINEAR_SWIGLU_FP8: swiglu,
    }


def products() -> dict[OpKind, Kernel]:
    """The products for a whole card.

    Those that are split share memory for partial sums, which the first of them allocates. So two must not run at the
    same time: every stream needs products of its own.
    """

    return {
        OpKind.LINEAR_FP8: triton_fp8.linear_fp8,
        OpKind.LINEAR_ADD_FP8: _LinearAdd(),
        OpKind.LINEAR_SWIGLU_FP8: triton_fp8.linear_swiglu_fp8,
    }


@dataclass(frozen=True, slots=True)
class _LinearAdd:
    """`triton_fp8.linear_add_fp8` on a whole card, with memory of its own; all compute the same, so they are equal."""

    workspaces: dict[torch.device, SplitWorkspace] = field(default_factory=dict, compare=False)

    def __call__(self, launch: Launch) -> None:
        device = launch.reads[0].device
        num_programs = card_of(device).num_sms
        if device not in self.workspaces:
            # At the first launch, whatever its size: none can be made while a CUDA graph is captured.
            self.workspaces[device] = make_workspace(GEMM_TILES, num_programs, device)
        if len(launch.reads[0]) > _MOST_TOKENS:
            triton_fp8.linear_add_fp8(launch)
        else:
            _run(GEMM_TILES, num_programs, self.workspaces.__getitem__, True, launch)


def run_split_fp8(
    launch: Launch,
    tiles: GemmTiles,
    num_programs: int,
    workspace: SplitWorkspace,
    num_splits: int,
    *,
    is_added: bool,
) -> None:
    """`triton_fp8.linear_fp8`, or `linear_add_fp8`, with scales of rows and given tiles and numbers.

    Raises:
        ValueError: As `triton_split_k.run_linear_split_k`, or the weight has scales of blocks.
    """
    (x, x_scales, *_), (out,), (weight, scales, *biases) = launch.reads, launch.writes, launch.weights
    triton_fp8.check_operands(x, weight, out)
    if scales.dim() > 1:
        raise ValueError(f"scales {list(scales.shape)} of blocks of a weight; this kernel takes one for each row")
    factors = Factors(x=x, weight=weight, out=out, bias=biases[0] if biases else None, x_scales=x_scales, scales=scales)
    cut = with_addend(tiles) if is_added else tiles
    run_split(factors, cut, num_programs, workspace, num_splits, is_added=is_added)


def choose_split(launch: Launch, candidates: tuple[GemmTiles, ...], num_programs: int) -> tuple[GemmTiles, int]:
    """Tiles of a launch with scales of rows, and how many programs share a tile of the last round."""
    num_columns, num_features = launch.weights[0].shape
    limit_bytes = card_of(launch.reads[0].device).shared_memory_bytes
    shape = (len(launch.reads[0]), num_columns, num_features)
    return choose_split_cut(FP8_TILES[candidates, False], shape, num_programs, limit_bytes)


def _run(
    candidates: tuple[GemmTiles, ...], num_programs: int, workspace_on: _Workspaces, is_added: bool, launch: Launch
) -> None:
    """A product, split if that takes less time."""
    whole = triton_fp8.run_linear_add_fp8 if is_added else triton_fp8.run_linear_fp8
    if launch.weights[1].dim() > 1:
        whole(launch, *triton_fp8.choose_cut(launch, candidates, num_programs))
        return
    tiles, num_splits = choose_split(launch, candidates, num_programs)
    if num_splits == 1:
        whole(launch, tiles, num_programs)
    else:
        workspace = workspace_on(launch.reads[0].device)
        run_split_fp8(launch, tiles, num_programs, workspace, num_splits, is_added=is_added)
