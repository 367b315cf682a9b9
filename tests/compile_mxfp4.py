"""Compile products of experts in MXFP4 for Hopper, and print what they need: one line for each.

    python -m tests.compile_mxfp4 (in|out):INDEX ...

Compiles a product at the sizes of a gpt-oss-20b with the tiling at an index of `WHOLE_CARD`. It runs in a process of
its own for the reason given in `compile_hopper_attention.py`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoflow.kernels.mxfp4_tiles import WHOLE_CARD, Mxfp4Tiles
from nanoflow.kernels.triton_experts_mxfp4 import _experts_in, _experts_out
from tests.compile_gemm import box
from tests.machine_code import read_machine_code

_POINTERS = {"bias": "*bf16", "out": "*bf16", "rows": "*i32", "ends": "*i32"}


def report_of(product: str, tiles: Mxfp4Tiles) -> dict[str, int]:
    """A report of the first product, or of the second."""
    shared = {
        "FEATURES": 2880,
        "NUM_EXPERTS": 32,
        "EXPERTS": 32,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "GROUP_M": tiles.group_m,
        "IS_FLAT": tiles.is_flat,
    }
    boxes = {
        "words": f"tensordesc<i32[{tiles.block_n}, {tiles.block_k // 8}]>",
        "scales": f"tensordesc<u8[{tiles.block_k // 32}, {tiles.block_n}]>",
    }
    if product == "in":
        first = {"x": "*bf16", **boxes, **_POINTERS, "rows_per_token": "i32", "num_columns": "i32"}
        return compiled(_experts_in, first, {**shared, "ALPHA": 1.702, "LIMIT": 7.0}, tiles)
    second = {"x": box(tiles.block_m, tiles.block_k), **boxes, **_POINTERS, "num_columns": "i32"}
    return compiled(_experts_out, second, shared, tiles)


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], tiles: Mxfp4Tiles) -> dict[str, int]:
    """Shared memory of a program, registers of a thread, and some instructions."""
    order: list[str] = kernel.arg_names
    is_aligned = {name for name, kind in signature.items() if kind.startswith("*") or name == "num_columns"}
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in is_aligned}
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, attributes)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = read_machine_code(done.asm["cubin"])
    names = [word.split(".")[0] for word in code.sass.split()]
    return {
        "shared_bytes": done.metadata.shared,
        "registers": code.registers,
        "num_spills": sum(map(names.count, ("STL", "LDL"))),
        "num_warpgroup_products": names.count("HGMMA"),
        "num_waits_for_all": code.sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x0"),
        "num_waits": code.sass.count("WARPGROUP.DEPBAR"),
        "num_permuted_bytes": names.count("PRMT"),
    }


def main(texts: list[str]) -> None:
    """Compile what is asked for."""
    for text in texts:
        product, _, index = text.partition(":")
        print(json.dumps(report_of(product, WHOLE_CARD[int(index)])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
