"""Compile the grouped products of experts in FP8 for Hopper: what `compile_experts.py` prints of them."""

from __future__ import annotations

from typing import Any

from nanoflow.kernels.expert_tiles import FP8_EXPERT_TILES
from nanoflow.kernels.gemm_tiles import GemmTiles
from nanoflow.kernels.triton_experts_fp8 import _experts_in_fp8, _experts_out_fp8
from tests.compile_experts import compiled

TILINGS = tuple(
    dict.fromkeys(
        (tiles, is_blocked)
        for (_, is_blocked), (found, anywhere) in FP8_EXPERT_TILES.items()
        for each in (*found, anywhere)
        for tiles in (each.first, each.second)
    )
)
_NUM_EXPERTS = 128


def products_of(tiles: GemmTiles, is_blocked: bool) -> list[dict[str, int]]:
    """A report of each grouped product; scales are of rows or of blocks."""
    constants: dict[str, Any] = {
        "NUM_EXPERTS": _NUM_EXPERTS,
        "EXPERTS": _NUM_EXPERTS,
        "BLOCK_M": tiles.block_m,
        "BLOCK_K": tiles.block_k,
        "GROUP_M": tiles.group_m,
        "IS_FLAT": tiles.is_flat,
        "IS_BLOCKED": is_blocked,
    }
    pointers = {"x_scales": "*fp32", "scales": "*fp32", "out": "*bf16", "rows": "*i32", "ends": "*i32"}
    sizes = {"num_columns": "i32", "num_features": "i32", "rows_per_token": "i32"}
    half = tiles.block_n // 2
    first = {"x": "*fp8e4nv", "weight": _box(2, half, tiles.block_k), **pointers, **sizes}
    second = {"x": _box(tiles.block_m, tiles.block_k), "weight": _box(tiles.block_n, tiles.block_k), **pointers}
    gated = {"BLOCK_N": half, "STORE_N": tiles.store_n // 2, "HAS_WHOLE_STEPS": True}
    plain = {"BLOCK_N": tiles.block_n, "STORE_N": tiles.store_n}
    return [
        compiled(_experts_in_fp8, first, {**constants, **gated}, tiles),
        compiled(_experts_out_fp8, {**second, **sizes}, {**constants, **plain}, tiles),
    ]


def _box(*sizes: int) -> str:
    """The type of a descriptor of tiles of this size."""
    return f"tensordesc<fp8e4nv{list(sizes)}>"
