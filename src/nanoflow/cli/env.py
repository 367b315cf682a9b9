"""`nanoflow env`: a description of this machine for bug reports and benchmarks, gathered by `bench/machine.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanoflow.cli.options import CommandParser, Subcommands, add_command

if TYPE_CHECKING:
    from nanoflow.bench.machine import Machine, Software

_TEACH = """\
Print versions, CPU, memory and GPUs of this machine. Paste it into a bug report."""

_EXAMPLES = """\
  nanoflow env
  nanoflow env --json"""


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow env`."""
    parser = add_command(commands, "env", "versions, CPU, memory and GPUs of this machine", _TEACH, _EXAMPLES)
    parser.add_argument("--json", action="store_true", help="Print one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    import msgspec

    from nanoflow.bench.machine import detect_machine, detect_software

    machine, software = detect_machine(), detect_software()
    if args.json:
        print(msgspec.json.format(msgspec.json.encode({"machine": machine, "software": software}), indent=2).decode())
        return 0
    for label, value in _rows(machine, software):
        print(f"{label:<16}{value}")
    return 0


def _rows(machine: Machine, software: Software) -> Iterator[tuple[str, str]]:
    revision = f" ({software.git_revision})" if software.git_revision else ""
    yield "nanoflow", software.nanoflow + revision
    yield "python", software.python
    for name, version in software.packages.items():
        yield name, version or "not installed"
    yield "cuda", software.cuda or "torch is built without CUDA"
    yield "os", machine.os
    yield "cpu", f"{machine.cpu_name}, {machine.num_cores} cores"
    yield "memory", f"{machine.memory_bytes / 2**30:.1f} GiB"
    for index, gpu in enumerate(machine.gpus):
        power = f", {gpu.power_limit_w:.0f} W" if gpu.power_limit_w is not None else ""
        yield f"gpu {index}", f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB, driver {gpu.driver_version}{power}"
    if not machine.gpus:
        yield "gpu", "none"
