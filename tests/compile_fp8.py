"""Compile a product in FP8 for Hopper, and print what it needs.

    python -m tests.compile_fp8

It runs in a process of its own for the reason given in `compile_hopper_attention.py`.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoflow.kernels.gemm_tiles import FP8_TILES, GEMM_TILES, GemmTiles, with_addend
from nanoflow.kernels.triton_fp8 import _linear_fp8
from tests.machine_code import read_machine_code


def report_of(tiles: GemmTiles, *, is_blocked: bool) -> dict[str, int | bool]:
    """Shared memory of a program, instructions that move spilled registers, and whether it multiplies in FP8."""
    cut = with_addend(tiles)
    signature = {
        "x": f"tensordesc<fp8e4nv{[cut.block_m, cut.block_k]}>",
        "weight": f"tensordesc<fp8e4nv{[cut.block_n, cut.block_k]}>",
        "x_scales": "*fp32",
        "scales": "*fp32",
        "bias": "*bf16",
        "out": f"tensordesc<bf16{[cut.block_m, cut.store_n]}>",
        "num_rows": "i32",
        "num_columns": "i32",
        "num_features": "i32",
    }
    constants = {
        "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_n,
        "BLOCK_K": cut.block_k,
        "GROUP_M": cut.group_m,
        "STORE_N": cut.store_n,
        "IS_FLAT": cut.is_flat,
        "IS_ADDED": True,
        "IS_BLOCKED": is_blocked,
    }
    # Sizes and addresses are divisible by 16, as in real launches.
    aligned = ("scales", "bias", "num_columns", "num_features")
    places = [place for place, name in enumerate(signature) if name in aligned]
    attributes = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(_linear_fp8, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, attributes)
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    words = read_machine_code(done.asm["cubin"]).sass.split()
    return {
        "shared_bytes": done.metadata.shared,
        "num_spills": sum(word.split(".")[0] in ("STL", "LDL") for word in words),
        "multiplies_fp8": any(word.startswith("QGMMA") and "E4M3.E4M3" in word for word in words),
    }


if __name__ == "__main__":
    # Of all tiles these take the most registers that a thread can have.
    print(json.dumps(report_of(FP8_TILES[GEMM_TILES, False][0], is_blocked=False)), flush=True)
