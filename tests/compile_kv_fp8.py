"""Compile the programs that write and read keys and values in 8 bits for Hopper, and print what they need.

    python -m tests.compile_kv_fp8

It runs in a process of its own, because Triton's interpreter and its compiler cannot be used in one.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoflow.kernels import triton_attention_programs as programs
from nanoflow.kernels.triton_attention import DECODE_TILES, PREFILL_TILES, Tiles
from nanoflow.kernels.triton_elementwise import _rope_append
from tests.all_cases import RUNS_ALL_CASES
from tests.machine_code import read_machine_code

HEADS = {"KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_D": 128, "PAGE_SIZE": 16, "WINDOW": None}
KEYS = {"keys": "*fp8e4nv", "values": "*fp8e4nv", "scales": "*i32"}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> dict[str, Any]:
    """Registers of a thread, instructions that move spilled registers, and the types of products."""
    names: list[str] = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    # Addresses are divisible by 16, as in real launches.
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name].startswith("*")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = read_machine_code(done.asm["cubin"])
    return {
        "registers": code.registers,
        "shared_bytes": done.metadata.shared,
        "num_spills": sum(word.split(".")[0] in ("STL", "LDL") for word in code.sass.split()),
        "products": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.\S+", done.asm["ptx"]))),
    }


def of_attention(kernel: Any, types: dict[str, str], tiles: Tiles, constants: dict[str, Any]) -> dict[str, Any]:
    """A report of an attention with these tiles."""
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
    tensors = {"out": "*bf16", "q": "*bf16", **KEYS, "page_tables": "*i32", "context_len": "*i32"}
    numbers = {"table_stride": "i32", "log2_scale": "fp32"}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return compiled(kernel, {**tensors, **numbers, **types}, {**HEADS, **blocks, **constants}, **options)


def main() -> None:
    """Print a report of each program; of decode attention alone unless all cases are asked for."""
    constants = {"GROUP": 4, "IS_SPLIT": True, "MIN_SPLIT": 256}
    types = {"log_sums": "*fp32", "first_request": "i32"}
    reports = {"decode": of_attention(programs.decode_program, types, DECODE_TILES[0], constants)}
    if RUNS_ALL_CASES:
        types = {"query_start": "*i32", **dict.fromkeys(("num_requests", "first_token", "stop_token"), "i32")}
        reports["prefill"] = of_attention(programs.prefill_program, types, PREFILL_TILES[0], {"NUM_HEADS": 32})
        reports["append"] = of_append()
    print(json.dumps(reports))


def of_append() -> dict[str, Any]:
    """A report of the program that writes keys and values."""
    return compiled(
        _rope_append,
        {
            "qkv": "*bf16",
            "q_out": "*bf16",
            **KEYS,
            "scales": "*bf16",
            "cos": "*fp32",
            "sin": "*fp32",
            "slots": "*i32",
            "num_slots": "i32",
            "eps": "fp32",
        },
        {
            "q_weight": None,
            "k_weight": None,
            "HEADS": 32,
            "KV_HEADS": 8,
            "HALF": 64,
            "ROTATED": 64,
            "PAGE_SIZE": 16,
            "HEAD_BLOCK": 16,
            "HALF_BLOCK": 64,
        },
        num_warps=4,
    )


if __name__ == "__main__":
    main()
