"""Compile products in FP8 for Hopper, and print what they need, one line each.

    python -m tests.compile_fp8 product gated

It runs in a process of its own for the reason given in `compile_hopper_attention.py`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from nanoflow.kernels.gemm_tiles import FP8_TILES, GEMM_TILES, GemmTiles, with_addend
from nanoflow.kernels.triton_fp8 import _linear_fp8, _linear_swiglu_fp8
from tests.machine_code import read_machine_code


def product_of(tiles: GemmTiles) -> dict[str, int | bool]:
    """What a product with a bias needs that is added to the residual stream."""
    cut = with_addend(tiles)
    constants = {"BLOCK_N": cut.block_n, "STORE_N": cut.store_n, "IS_ADDED": True, "IS_BLOCKED": False}
    boxes = {"weight": [cut.block_n, cut.block_k], "out": [cut.block_m, cut.store_n]}
    return report_of(cut, _linear_fp8, boxes, constants)


def gated_of(tiles: GemmTiles) -> dict[str, int | bool]:
    """What a product needs that ends in SwiGLU."""
    half = tiles.block_n // 2
    boxes = {"weight": [2, half, tiles.block_k], "out": [tiles.block_m, tiles.store_n // 2]}
    return report_of(tiles, _linear_swiglu_fp8, boxes, {"BLOCK_N": half, "STORE_N": tiles.store_n // 2})


def report_of(
    cut: GemmTiles, program: JITFunction[Any], boxes: dict[str, list[int]], constants: dict[str, int | bool]
) -> dict[str, int | bool]:
    """Shared memory of a program, instructions that move spilled registers, and whether it multiplies in FP8."""
    kinds = {
        "x": f"tensordesc<fp8e4nv{[cut.block_m, cut.block_k]}>",
        "weight": f"tensordesc<fp8e4nv{boxes['weight']}>",
        "x_scales": "*fp32",
        "scales": "*fp32",
        "bias": "*bf16",
        "out": f"tensordesc<bf16{boxes['out']}>",
        "num_rows": "i32",
        "num_columns": "i32",
        "num_features": "i32",
    }
    signature = {name: kind for name, kind in kinds.items() if name in program.arg_names}
    of_tiles = {"BLOCK_M": cut.block_m, "BLOCK_K": cut.block_k, "GROUP_M": cut.group_m, "IS_FLAT": cut.is_flat}
    constants = {**constants, **of_tiles}
    # Sizes and addresses are divisible by 16, as in real launches.
    aligned = ("scales", "bias", "num_columns", "num_features")
    places = [place for place, name in enumerate(signature) if name in aligned]
    attributes = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(program, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, attributes)
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    words = read_machine_code(done.asm["cubin"]).sass.split()
    return {
        "shared_bytes": done.metadata.shared,
        "num_spills": sum(word.split(".")[0] in ("STL", "LDL") for word in words),
        "multiplies_fp8": any(word.startswith("QGMMA") and "E4M3.E4M3" in word for word in words),
    }


REPORTS = {"product": product_of, "gated": gated_of}

if __name__ == "__main__":
    # Of all tiles these take the most registers that a thread can have.
    for name in sys.argv[1:]:
        print(json.dumps(REPORTS[name](FP8_TILES[GEMM_TILES, False][0])), flush=True)
