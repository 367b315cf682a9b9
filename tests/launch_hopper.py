"""Launch the Hopper kernels as far as possible without a card, and print what Triton has compiled.

    python -m tests.launch_hopper

It runs in a process of its own, because Triton's interpreter, which other tests enable, cannot be disabled again.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from nanoflow.kernels.hopper import attention
from nanoflow.kernels.hopper.attention_fp8_programs import decode_fp8_program
from nanoflow.kernels.hopper.attention_programs import decode_program
from nanoflow.kernels.hopper.carry import HopperCarrier
from nanoflow.kernels.hopper.carry_programs import carry_program
from nanoflow.kernels.hopper.merge import merge_program
from nanoflow.kernels.launch import SHARES, Launch
from tests.attention_cases import carrier_case, decode_case
from tests.fp8_cases import carried_case
from tests.kv_fp8_cases import on_8_bits

CPU = torch.device("cpu")
CARD = SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda _device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
)


def decodes(num_rows: int, first: int) -> Launch:
    """Inputs of `num_rows` rows from row `first` on."""
    with pytest.MonkeyPatch.context() as patch:
        return decode_case([100] * (first + num_rows), (32, 8, 64), CPU, patch, first)


def launch(num_tokens: int, num_rows: int, first: int, products: dict[int, int]) -> None:
    """Launch every program, with these products and shares; print how many kernels each was compiled to."""
    attention.run_decode(decodes(num_rows, first), 4)
    attention.run_decode(on_8_bits(decodes(num_rows, first)), 4)
    carrier = HopperCarrier(num_sms=4, steps=2)
    taken = carrier.take(decodes(num_rows, first), 4)
    for num_columns, until in products.items():
        product, _ = carrier_case("linear", num_tokens, (num_columns, 128), CPU)
        carrier.run(product, taken, until)
    # In FP8, from a row on whose scale is not aligned.
    whole, _ = carried_case("linear", num_tokens + 1, (128, 128), CPU)
    later = tuple(each[num_rows % 2 :][:num_tokens] for each in whole.reads)
    carrier.run(replace(whole, reads=later, writes=(whole.writes[0][:num_tokens],)), taken, SHARES - 1)
    carrier.finish(taken)
    programs = {"carry": carry_program, "decode": decode_program, "decode of 8 bits": decode_fp8_program}
    programs["merge"] = merge_program
    print(json.dumps({key: len(program.device_caches[0][0]) for key, program in programs.items()}), flush=True)


def main() -> None:
    """Try numbers of tokens, rows and shares that Triton might specialise on: 1, and multiples of 16."""
    triton.runtime.driver.set_active(CARD)
    # Machine code is not looked at, and takes a third of the time.
    CUDABackend.make_cubin = lambda *_: b""
    JITFunction.run = functools.partialmethod(_compile, JITFunction.run)
    launch(200, 5, 0, {1040: 100, 128: 200})
    launch(1, 1, 1, {128: 1, 1040: 2})
    launch(128, 16, 16, {128: 16, 1040: 128})
    launch(640, 3, 7, {})


def _compile(self: Any, run: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    return run(self, *args, grid=grid, warmup=True, **options)


if __name__ == "__main__":
    main()
