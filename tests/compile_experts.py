"""Compile the kernels of experts for Hopper, and print what they need: `rows`, then one line for each tiling.

    python -m tests.compile_experts [rows] [fp8:INDEX] INDEX ...

Compiles the row-wise kernels, or both grouped products with the tiling at each index of `TILINGS`, in FP8 of those in
`compile_experts_fp8.py`. It runs in a process of its own for the reason given in `compile_hopper_attention.py`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoflow.kernels import triton_experts_rows as rows
from nanoflow.kernels.expert_tiles import ANYWHERE, BESIDE, WHOLE_CARD
from nanoflow.kernels.gemm_tiles import GemmTiles
from nanoflow.kernels.triton_experts import _experts_in, _experts_out
from tests.compile_gemm import box
from tests.machine_code import read_machine_code

TILINGS = tuple(
    dict.fromkeys(tiles for each in (*WHOLE_CARD, *BESIDE, ANYWHERE) for tiles in (each.first, each.second))
)
_NUM_EXPERTS = 128
# Divisible by 16 in real launches, as all addresses are.
_ALIGNED = {"num_columns", "num_features"}
_INDICES = {"rows": "*i32", "ends": "*i32"}


def compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], tiles: GemmTiles | None = None
) -> dict[str, int]:
    """Shared memory of a program, registers of a thread, and some instructions."""
    order: list[str] = kernel.arg_names
    signature = {name: signature[name] for name in order if name in signature}
    is_aligned = {name for name, kind in signature.items() if kind.startswith("*") or name in _ALIGNED}
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in is_aligned}
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, attributes)
    options: dict[str, Any] = {}
    if tiles is not None:
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "maxnreg": tiles.max_registers}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = read_machine_code(done.asm["cubin"])
    names = [word.split(".")[0] for word in code.sass.split()]
    return {
        "shared_bytes": done.metadata.shared,
        "registers": code.registers,
        "num_spills": sum(map(names.count, ("STL", "LDL"))),
        "num_warpgroup_products": names.count("HGMMA"),
        "num_fp8_products": names.count("QGMMA"),
    }


def products_of(tiles: GemmTiles) -> list[dict[str, int]]:
    """A report of each grouped product, with biases and a clamped activation, which need more than others."""
    shared = {
        "NUM_EXPERTS": _NUM_EXPERTS,
        "EXPERTS": _NUM_EXPERTS,
        "BLOCK_M": tiles.block_m,
        "BLOCK_K": tiles.block_k,
        "GROUP_M": tiles.group_m,
        "IS_FLAT": tiles.is_flat,
    }
    sizes = {"num_columns": "i32", "num_features": "i32"}
    half = tiles.block_n // 2
    tensors = {"bias": "*bf16", "out": "*bf16", **_INDICES}
    first = {"x": "*bf16", "weight": box(2, half, tiles.block_k), **tensors, "rows_per_token": "i32"}
    gated = {"BLOCK_N": half, "STORE_N": tiles.store_n // 2, "HAS_WHOLE_STEPS": True, "ALPHA": 1.702, "LIMIT": 7.0}
    second = {
        "x": box(tiles.block_m, tiles.block_k),
        "weight": box(tiles.block_n, tiles.block_k),
        **tensors,
    }
    plain = {"BLOCK_N": tiles.block_n, "STORE_N": tiles.store_n}
    return [
        compiled(_experts_in, {**first, **sizes}, {**shared, **gated}, tiles),
        compiled(_experts_out, {**second, **sizes}, {**shared, **plain}, tiles),
    ]


def row_wise() -> list[dict[str, int]]:
    """A report of each row-wise kernel, at the sizes of a Qwen3-30B-A3B."""
    routed = {"logits": "*bf16", "weights": "*fp32", "ids": "*i32", "num_tokens": "i32"}
    chosen = {"EXPERTS": 128, "PER_TOKEN": 8, "CHOICES": 8, "ROWS": 8, "IS_NORMALISED": True}
    summed = {"out": "*bf16", "weights": "*fp32", "hidden": "*bf16"}
    gated = {"x": "*bf16", "activation": "*bf16", "weight": "*bf16"}
    return [
        compiled(rows._choose, routed, {"NUM_EXPERTS": _NUM_EXPERTS, **chosen}),
        compiled(rows._order, {"ids": "*i32", **_INDICES, "num_rows": "i32"}, {"BLOCK": 4096}),
        compiled(rows._combine, summed, {"WIDTH": 2048, "BLOCK": 2048, "PER_TOKEN": 8}),
        compiled(rows._shared_gate, gated, {"FEATURES": 2048, "WIDTH": 5632, "BLOCK": 2048}),
    ]


def main(texts: list[str]) -> None:
    """Compile what is asked for."""
    # That module needs this one.
    from tests import compile_experts_fp8

    for text in texts:
        kind, _, index = text.rpartition(":")
        if kind == "fp8":
            found = compile_experts_fp8.products_of(*compile_experts_fp8.TILINGS[int(index)])
        else:
            found = row_wise() if text == "rows" else products_of(TILINGS[int(text)])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
