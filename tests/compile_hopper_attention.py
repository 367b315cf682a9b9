"""Compile decode attention in Gluon for Hopper, and print the resources that it needs, one line each.

    python -m tests.compile_hopper_attention GROUP:HEAD_SIZE ...

It runs in a process of its own, because Triton's interpreter, which other tests enable, cannot be disabled again.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from nanoflow.graph.operation import KEY_BLOCK
from nanoflow.kernels.hopper import attention as kernel
from nanoflow.kernels.hopper.attention_programs import PAGE_TOKENS, PANEL, decode_program
from nanoflow.kernels.hopper.merge import SCAN


def main(texts: list[str]) -> None:
    """Compile each variant."""
    for text in texts:
        print(json.dumps(report(*(int(part) for part in text.split(":")))), flush=True)


def report(group: int, head_dim: int) -> dict[str, int]:
    """Instructions, shared memory and registers of a variant."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    pages = f"tensordesc<bf16[{PAGE_TOKENS}, {PANEL}],{layout!r}>"
    constants = {
        "GROUP": group,
        "KV_HEADS": 8,
        "HEAD_DIM": head_dim,
        "BLOCK": KEY_BLOCK,
        "STAGES": kernel.NUM_STAGES,
        "SCAN": SCAN,
        "WARPS": kernel.NUM_WARPS,
    }
    signature = {
        "out": "*bf16", "parts": "*fp32", "log_sums": "*fp32", "q": "*bf16", "keys": pages, "values": pages,
        "page_tables": "*i32", "context_len": "*i32", "key_blocks": "*i32", "table_stride": "i32",
        "first_row": "i32", "num_rows": "i32", "log2_scale": "fp32", **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    source = GluonASTSource(decode_program, signature, constants)
    options = {"num_warps": kernel.NUM_WARPS, "maxnreg": kernel.MAX_REGISTERS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "has_columns_of_queries": "m64n8k16" in ptx,
        "has_tma": "cp.async.bulk.tensor" in ptx,
        "shared_bytes": compiled.metadata.shared,
        "registers": compiled.metadata.num_warps * 32 * kernel.MAX_REGISTERS,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
