"""Reads a kernel that was compiled without a card with the CUDA tools."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """Registers of a thread, and the instructions as printed by `cuobjdump -sass`."""

    registers: int
    sass: str


def read_machine_code(cubin: bytes) -> MachineCode:
    """Read a compiled kernel (`asm["cubin"]`)."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers = next(int(word.removeprefix("REG:")) for word in usage.split() if word.startswith("REG:"))
    return MachineCode(registers=registers, sass=sass)
