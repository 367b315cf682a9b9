"""Compile the products that run beside decode attention for Hopper, and print what they need, one line each.

    python -m tests.compile_gemm INDEX ...

Compiles all kernels with the tiles at each index of `BESIDE_TILES`. It runs in a process of its own for the reason
given in `compile_hopper_attention.py`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoflow.kernels.gemm_tiles import BESIDE_TILES, GemmTiles, with_addend
from nanoflow.kernels.triton_gemm import _linear, _linear_swiglu
from nanoflow.kernels.triton_split_k import _linear_split_k
from tests.machine_code import read_machine_code

_OF_16_BITS = {"x_scales": None, "scales": None}
_SIZES = {"num_rows": "i32", "num_columns": "i32", "num_features": "i32"}


def box(*sizes: int) -> str:
    """The shape of a TMA box."""
    return f"tensordesc<bf16{list(sizes)}>"


def compiled(kernel: Any, tiles: GemmTiles, signature: dict[str, str], constants: dict[str, Any]) -> dict[str, int]:
    """Shared memory of a program, registers of all its threads, and instructions that move spilled registers."""
    constants = {"BLOCK_M": tiles.block_m, "BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m, **constants}
    # Sizes and addresses are divisible by 16, as in real launches.
    names = kernel.arg_names
    is_aligned = {"sums", "flags", "bias", "num_columns", "num_features"}
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in is_aligned}
    kinds = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, {name: kinds[name] for name in names}, constants, attributes)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "maxnreg": tiles.max_registers}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = read_machine_code(done.asm["cubin"])
    # The card allocates registers in units of eight.
    registers = -(-code.registers // 8) * 8 * 32 * tiles.num_warps
    num_spills = sum(word.split(".")[0] in ("STL", "LDL") for word in code.sass.split())
    return {"shared_bytes": done.metadata.shared, "registers": registers, "num_spills": num_spills}


def main(texts: list[str]) -> None:
    """Compile with all of these tiles."""
    for text in texts:
        print(json.dumps(reports_of(int(text))), flush=True)


def reports_of(place: int) -> list[dict[str, int]]:
    """A report of each kernel, with a bias and an addend where possible, which needs the most resources."""
    tiles = BESIDE_TILES[place]
    cut = with_addend(tiles)
    boxes = {
        "x": box(cut.block_m, cut.block_k),
        "weight": box(cut.block_n, cut.block_k),
        "bias": "*bf16",
        "out": box(cut.block_m, cut.store_n),
    }
    constants = {"BLOCK_N": cut.block_n, "STORE_N": cut.store_n, "IS_ADDED": True}
    reports = [compiled(_linear, cut, {**boxes, **_SIZES}, {**constants, "IS_FLAT": cut.is_flat})]
    split = {**boxes, "sums": "*fp32", "flags": "*i32", **_SIZES, "num_splits": "i32"}
    of_split = {**constants, **_OF_16_BITS, "NUM_THREADS": 32 * cut.num_warps}
    reports.append(compiled(_linear_split_k, cut, split, of_split))
    half, store_half = tiles.block_n // 2, tiles.store_n // 2
    boxes = {
        "x": box(tiles.block_m, tiles.block_k),
        "weight": box(2, half, tiles.block_k),
        "out": box(tiles.block_m, store_half),
    }
    gated = {"BLOCK_N": half, "STORE_N": store_half, "IS_FLAT": tiles.is_flat}
    reports.append(compiled(_linear_swiglu, tiles, {**boxes, **_SIZES}, gated))
    return reports


if __name__ == "__main__":
    main(sys.argv[1:])
