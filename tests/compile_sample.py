"""Compile the sampling programs for Hopper, and print the resources that they need.

    python -m tests.compile_sample

It runs in a process of its own, because Triton's interpreter and its compiler cannot be used in one.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoflow.kernels import triton_sample_programs as programs
from nanoflow.kernels.triton_sample import ADJUSTED, CHOICE, LARGEST, LOGPROBS, RowBlocks
from tests.all_cases import RUNS_ALL_CASES, part
from tests.machine_code import read_machine_code

VOCAB_SIZE = 128256


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], blocks: RowBlocks) -> dict[str, Any]:
    """Registers of a thread, shared memory of a program, and instructions that move spilled registers."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in range(len(signature))}
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, attributes)
    options = {"num_warps": blocks.num_warps, "enable_fp_fusion": False, "maxnreg": blocks.max_registers}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = read_machine_code(done.asm["cubin"])
    num_spills = sum(word.split(".")[0] in ("STL", "LDL") for word in code.sass.split())
    loads = sorted({word for word in code.sass.split() if word.startswith(("LDG", "LDGSTS"))})
    return {"registers": code.registers, "shared_bytes": done.metadata.shared, "num_spills": num_spills, "loads": loads}


def sizes(blocks: RowBlocks) -> dict[str, int]:
    """The same for a program that reads its row with these blocks."""
    num_blocks = triton.next_power_of_2(triton.cdiv(VOCAB_SIZE, blocks.block))
    return {"VOCAB": VOCAB_SIZE, "BLOCK": blocks.block, "INNER": 8, "NUM_BLOCKS": num_blocks}


def main() -> None:
    """Print a report of each program, for logits in bfloat16 and float32.

    Without all cases only those for bfloat16, and of the longest the one that has all of its code: with adjustments.
    """
    reports = {}
    for dtype, bits in part([("bf16", 16)], of=[("bf16", 16), ("fp32", 0)]):
        logits = {"logits": f"*{dtype}"}
        results = {"token_ids": "*i64", "best": "*fp32"}
        reports[f"largest {dtype}"] = compiled(programs.largest_program, {**logits, **results}, sizes(LARGEST), LARGEST)
        tables = {
            "numbers": "*i32",
            "floats": "*fp32",
            "seeds": "*i64",
            "seen": "*i16",
            "edit_ids": "*i32",
            "edit_values": "*fp32",
            "masks": "*i32",
            "edit_stride": "i32",
        }
        # The code of adjustments does not depend on the dtype.
        wanted = ([False] if RUNS_ALL_CASES else []) + ([True] if bits else [])
        for adjusts in wanted:
            constants = {**sizes(CHOICE), "GRID_BITS": bits, "ADJUSTS": adjusts, "ROOM": CHOICE.room}
            signature = {**logits, **tables, **results, "scratch": "*fp32"}
            reports[f"choose {dtype} {adjusts}"] = compiled(
                programs.choose_program, signature, constants, ADJUSTED if adjusts else CHOICE
            )
        scored = {"places": "*i64", "token_ids": "*i64", "top_ids": "*i32", "logprobs": "*fp32", "ranks": "*i32"}
        reports[f"logprobs {dtype}"] = compiled(
            programs.top_logprobs_program, {**logits, **scored, "num_top": "i32"}, sizes(LOGPROBS), LOGPROBS
        )
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
