"""Compile paged attention with and without sinks for Hopper, and print the resources that it needs.

    python -m tests.compile_attention

It runs in a process of its own, because Triton's interpreter and its compiler cannot be used in one.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoflow.kernels import triton_attention_programs as programs
from nanoflow.kernels.triton_attention import DECODE_TILES, PREFILL_TILES, Tiles
from tests.machine_code import read_machine_code

# Those of gpt-oss.
SIZES = {"KV_HEADS": 8, "HEAD_DIM": 64, "BLOCK_D": 64, "PAGE_SIZE": 16}
TENSORS = {"q": "*bf16", "keys": "*bf16", "values": "*bf16"}


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], tiles: Tiles) -> dict[str, Any]:
    """Registers of a thread, shared memory of a program, and instructions that move spilled registers."""
    names = {name: place for place, name in enumerate(kernel.arg_names)}
    attributes = {(names[name],): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants, attributes)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = read_machine_code(done.asm["cubin"])
    num_spills = sum(word.split(".")[0] in ("STL", "LDL") for word in code.sass.split())
    return {"registers": code.registers, "shared_bytes": done.metadata.shared, "num_spills": num_spills}


def main() -> None:
    """Print a report of each program: decodes in parts without a window, and prompts with one."""
    reports = {}
    for has_sinks in (False, True):
        sinks = {"sinks": "*fp32"} if has_sinks else {}
        absent: dict[str, Any] = {"scales": None} if has_sinks else {"scales": None, "sinks": None}
        name = "with sinks" if has_sinks else "without"
        tiles = DECODE_TILES[0]
        reports[f"decode {name}"] = compiled(
            programs.decode_program,
            {
                "out": "*fp32",
                "log_sums": "*fp32",
                **TENSORS,
                "page_tables": "*i32",
                **sinks,
                "context_len": "*i32",
                "table_stride": "i32",
                "first_request": "i32",
                "log2_scale": "fp32",
            },
            {
                **SIZES,
                **absent,
                "GROUP": 8,
                "WINDOW": None,
                "IS_SPLIT": True,
                "MIN_SPLIT": 256,
                "BLOCK_M": tiles.block_m,
                "BLOCK_N": tiles.block_n,
            },
            tiles,
        )
        tiles = PREFILL_TILES[0]
        reports[f"prefill {name}"] = compiled(
            programs.prefill_program,
            {
                "out": "*bf16",
                **TENSORS,
                "page_tables": "*i32",
                **sinks,
                "query_start": "*i32",
                "context_len": "*i32",
                "table_stride": "i32",
                "num_requests": "i32",
                "first_token": "i32",
                "stop_token": "i32",
                "log2_scale": "fp32",
            },
            {
                **SIZES,
                **absent,
                "NUM_HEADS": 64,
                "WINDOW": 128,
                "BLOCK_M": tiles.block_m,
                "BLOCK_N": tiles.block_n,
            },
            tiles,
        )
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
