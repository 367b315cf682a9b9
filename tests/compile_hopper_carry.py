"""Compile products that carry decode attention for Hopper, and print the resources that they need, one line each.

    python -m tests.compile_hopper_carry COLUMNS:STEPS:KIND:HAS_BIAS:GROUP:HEAD_SIZE ...

It runs in a process of its own, because Triton's interpreter, which other tests enable, cannot be disabled again.
Registers are those before warps exchange them. A wait for all products is correct only where none should be running: in
each warpgroup once at the end of a tile, and twice where keys remain after the last tile. All other waits leave one
k-step running.
"""

from __future__ import annotations

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PAGE_TOKENS, PANEL
from nanoflow.kernels.hopper.carry import KV_STAGES, NARROW, WIDE, WORKER_REGISTERS
from nanoflow.kernels.hopper.carry_programs import Cut, carry_program
from tests.machine_code import read_machine_code


def main(texts: list[str]) -> None:
    """Compile each variant."""
    for text in texts:
        print(json.dumps(report(*(int(part) for part in text.split(":")))), flush=True)


def report(columns: int, steps: int, kind: int, has_bias: int, group: int, head_dim: int) -> dict[str, int]:
    """The resources of a variant."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tiles = {cut.block_n: cut for cut in (WIDE, NARROW)}[columns]
    boxes = {"x": tiles.block_m, "weight": columns // 2, "q": MAX_GROUP, "keys": PAGE_TOKENS, "values": PAGE_TOKENS}
    cut = Cut(
        block_n=columns,
        steps=steps,
        stages=tiles.num_stages,
        kv_stages=KV_STAGES,
        group=group,
        kv_heads=8,
        head_dim=head_dim,
        kind=kind,
        scan=512,
        worker_registers=WORKER_REGISTERS,
    )
    constants = {"CUT": cut, **({} if has_bias else {"bias": None})}
    kinds = {
        **{name: f"tensordesc<bf16[{rows}, {PANEL}],{layout!r}>" for name, rows in boxes.items()},
        **dict.fromkeys(("bias", "out", "attended"), "*bf16"),
        **dict.fromkeys(("parts", "log_sums"), "*fp32"),
        **dict.fromkeys(("begins", "page_tables", "context_len", "key_blocks"), "*i32"),
        "log2_scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: kinds.get(name, "i32") for name in carry_program.arg_names}
    is_aligned = {"out", "attended", "parts", "log_sums", "num_columns"}
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if name in is_aligned}
    source = GluonASTSource(carry_program, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    code = read_machine_code(done.asm["cubin"])
    return {
        "shared_bytes": done.metadata.shared,
        "registers": code.registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code.sass)),
        "products_of_tiles": code.sass.count(f"HGMMA.64x{columns}x16"),
        "products_of_attention": code.sass.count("HGMMA.64x8x16"),
        "waits_for_all_but_one": code.sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x1"),
        "waits_for_all": code.sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x0"),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
