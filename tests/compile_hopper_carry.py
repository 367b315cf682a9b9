"""Compile products that carry decode attention for Hopper, and print the resources that they need, one line each.

    python -m tests.compile_hopper_carry COLUMNS:STEPS:KIND:HAS_BIAS:GROUP:HEAD_SIZE:ITEM_BYTES ...

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

from nanoflow.kernels.hopper.attention_programs import MAX_GROUP, PAGE_TOKENS
from nanoflow.kernels.hopper.carry import KV_STAGES, NARROW, WIDE, WORKER_REGISTERS
from nanoflow.kernels.hopper.carry_programs import Cut, carry_program
from tests.machine_code import read_machine_code


def main(texts: list[str]) -> None:
    """Compile each variant."""
    for text in texts:
        print(json.dumps(report(*(int(part) for part in text.split(":")))), flush=True)


def _descriptor(num_rows: int, item_bytes: int) -> str:
    """The type of a tensor of which `num_rows` rows are copied, 128 bytes of each."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * item_bytes, rank=2)
    dtype = {1: "fp8e4nv", 2: "bf16"}[item_bytes]
    return f"tensordesc<{dtype}[{num_rows}, {128 // item_bytes}],{layout!r}>"


def report(
    columns: int, steps: int, kind: int, has_bias: int, group: int, head_dim: int, item_bytes: int
) -> dict[str, int]:
    """The resources of a variant."""
    tiles = {cut.block_n: cut for cut in (WIDE, NARROW)}[columns]
    boxes = {"x": tiles.block_m, "weight": columns // 2, "q": MAX_GROUP, "keys": PAGE_TOKENS, "values": PAGE_TOKENS}
    sizes = {name: item_bytes if name in ("x", "weight") else 2 for name in boxes}
    cut = Cut(
        block_n=columns,
        steps=steps,
        stages=tiles.num_stages,
        kv_stages=KV_STAGES,
        group=group,
        kv_heads=8,
        head_dim=head_dim,
        kind=kind,
        item_bytes=item_bytes,
        scan=512,
        worker_registers=WORKER_REGISTERS,
    )
    missing = [*([] if has_bias else ["bias"]), *(["x_scales", "scales"] if item_bytes == 2 else [])]
    constants = {"CUT": cut, **dict.fromkeys(missing)}
    kinds = {
        **{name: _descriptor(rows, sizes[name]) for name, rows in boxes.items()},
        **dict.fromkeys(("bias", "out", "attended"), "*bf16"),
        **dict.fromkeys(("parts", "log_sums", "x_scales", "scales"), "*fp32"),
        **dict.fromkeys(("begins", "page_tables", "context_len", "key_blocks"), "*i32"),
        "log2_scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: kinds.get(name, "i32") for name in carry_program.arg_names}
    is_aligned = {"scales", "out", "attended", "parts", "log_sums", "num_columns"} - {*missing}
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if name in is_aligned}
    source = GluonASTSource(carry_program, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    code = read_machine_code(done.asm["cubin"])
    return {
        "shared_bytes": done.metadata.shared,
        "registers": code.registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code.sass)),
        "products_of_tiles": code.sass.count(f"GMMA.64x{columns}x{32 // item_bytes}."),
        "products_of_attention": code.sass.count("HGMMA.64x8x16"),
        "waits_for_all_but_one": code.sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x1"),
        "waits_for_all": code.sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x0"),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
