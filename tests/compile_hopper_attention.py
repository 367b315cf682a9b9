"""Compile decode attention in Gluon for Hopper, and print the resources that it needs, one line each.

    python -m tests.compile_hopper_attention TYPE:GROUP:HEAD_SIZE:HAS_SINKS ...

TYPE is that of the KV cache, `auto` or `fp8_e4m3`; HAS_SINKS is 0 or 1. It runs in a process of its own, because
Triton's interpreter, which other tests enable, cannot be disabled again.
"""

from __future__ import annotations

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from nanoflow.graph.operation import KEY_BLOCK, KvType
from nanoflow.kernels.hopper.attention import NUM_WARPS, OCCUPANCIES
from nanoflow.kernels.hopper.attention_fp8_programs import decode_fp8_program
from nanoflow.kernels.hopper.attention_programs import PAGE_TOKENS, PANEL, decode_program
from nanoflow.kernels.hopper.merge import SCAN
from tests.machine_code import read_machine_code


def main(texts: list[str]) -> None:
    """Compile each variant."""
    for text in texts:
        kv_type, group, head_dim, has_sinks = text.split(":")
        print(json.dumps(report(KvType(kv_type), int(group), int(head_dim), has_sinks == "1")), flush=True)


def report(kv_type: KvType, group: int, head_dim: int, has_sinks: bool) -> dict[str, object]:
    """Instructions, shared memory and registers of a variant."""
    occupancy, is_fp8 = OCCUPANCIES[kv_type], kv_type is KvType.FP8
    constants = {
        "GROUP": group,
        "KV_HEADS": 8,
        "HEAD_DIM": head_dim,
        "BLOCK": KEY_BLOCK,
        "STAGES": occupancy.num_stages,
        "SCAN": SCAN,
        "WARPS": NUM_WARPS,
        "LOADER_REGISTERS": occupancy.loader_registers,
        **({} if has_sinks else {"sinks": None}),
    }
    scales = {"scales": _boxes("i32", [1, PAGE_TOKENS], 0)} if is_fp8 else {}
    pages = (
        _boxes("fp8e4nv", [PAGE_TOKENS, head_dim], head_dim) if is_fp8 else _boxes("bf16", [PAGE_TOKENS, PANEL], 128)
    )
    signature = {
        "out": "*bf16", "parts": "*fp32", "log_sums": "*fp32", "q": "*bf16", "keys": pages, "values": pages, **scales,
        "page_tables": "*i32", "sinks": "*fp32", "context_len": "*i32", "key_blocks": "*i32", "table_stride": "i32",
        "first_row": "i32", "num_rows": "i32", "log2_scale": "fp32", **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    program = decode_fp8_program if is_fp8 else decode_program
    source = GluonASTSource(program, signature, constants)
    options = {"num_warps": NUM_WARPS, "maxnreg": occupancy.max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx, sass = compiled.asm["ptx"], read_machine_code(compiled.asm["cubin"]).sass
    return {
        "products": sorted(set(re.findall(r"wgmma\.mma_async\.sync\.\S+", ptx))),
        "has_tma": "cp.async.bulk.tensor" in ptx,
        "num_conversions": sass.count("F2FP.F16.E4M3"),
        "num_spills": sum(word.split(".")[0] in ("STL", "LDL") for word in sass.split()),
        "shared_bytes": compiled.metadata.shared,
        "registers": compiled.metadata.num_warps * 32 * occupancy.max_registers,
    }


def _boxes(dtype: str, shape: list[int], swizzle_bytes: int) -> str:
    """The type of a TMA descriptor."""
    bits = {"i32": 32, "bf16": 16, "fp8e4nv": 8}[dtype]
    layout = NVMMASharedLayout(swizzle_byte_width=swizzle_bytes, element_bitwidth=bits, rank=2)
    return f"tensordesc<{dtype}{shape},{layout!r}>"


if __name__ == "__main__":
    main(sys.argv[1:])
