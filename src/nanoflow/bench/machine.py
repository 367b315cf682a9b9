"""The machine and software that a number was measured on; None for everything that is unknown.

GPUs are read with `nvidia-smi`, which creates no CUDA context. `cli/env.py` and `record.py` print this.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import subprocess
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import nanoflow

# Names the revision of a copy of the sources without git: an environment variable, or a file beside `src`.
REVISION_VARIABLE = "NANOFLOW_REVISION"
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "fastapi", "uvicorn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    memory_bytes: int
    driver_version: str
    power_limit_w: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Hardware and operating system; `num_cores` counts the cores that this process may use."""

    cpu_name: str
    num_cores: int
    memory_bytes: int
    os: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Versions; None for a package that is not installed. `git_revision` ends in `-dirty` with uncommitted changes."""

    nanoflow: str
    git_revision: str | None
    python: str
    cuda: str | None
    packages: dict[str, str | None]


def detect_machine() -> Machine:
    """Describe this machine."""
    return Machine(
        cpu_name=_cpu_name(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        os=platform.platform(),
        gpus=detect_gpus(),
    )


def detect_software() -> Software:
    """Describe the installed software."""
    return Software(
        nanoflow=nanoflow.__version__,
        git_revision=git_revision(),
        python=platform.python_version(),
        cuda=_cuda_of_torch(),
        packages={name: _package_version(name) for name in _PACKAGES},
    )


def detect_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine; none without a driver."""
    fields = "name,memory.total,driver_version,power.limit"
    table = _output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return tuple(_parse_gpu(line) for line in (table or "").splitlines())


def _parse_gpu(line: str) -> Gpu:
    """A line such as `NVIDIA H200, 143771, 570.86.15, 700.00`; memory in MiB, power in watts or `[N/A]`."""
    name, memory_mib, driver_version, power_w = (cell.strip() for cell in line.split(","))
    return Gpu(
        name=name,
        memory_bytes=int(memory_mib) * 2**20 if memory_mib.isdecimal() else 0,
        driver_version=driver_version,
        power_limit_w=None if power_w.startswith("[") else float(power_w),
    )


def git_revision() -> str | None:
    """The commit of this package's sources; None if it does not run from its own checkout.

    For a machine that has only a copy of the sources, the environment variable NANOFLOW_REVISION gives it, or, where
    there is no git checkout, a file of that name beside `src`.
    """
    if stated := os.environ.get(REVISION_VARIABLE):
        return stated.strip()
    package = Path(nanoflow.__file__).parent
    return _checked_out(package) or _noted(package)


def _noted(package: Path) -> str | None:
    """The revision in the file beside `src`."""
    path = package.parents[1] / REVISION_VARIABLE
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None


def _checked_out(package: Path) -> str | None:
    """The revision of the checkout that a package is in."""
    root = _output_of("git", "-C", str(package), "rev-parse", "--show-toplevel")
    if root is None or Path(root) / "src" / "nanoflow" != package:
        return None
    revision = _output_of("git", "-C", root, "rev-parse", "HEAD")
    changes = _output_of("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}-dirty" if revision and changes else revision


def _cuda_of_torch() -> str | None:
    """The version of CUDA that torch was built with, without importing it, which takes seconds."""
    spec = find_spec("torch")
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")
    return runpy.run_path(str(file)).get("cuda") if file is not None and file.is_file() else None


def _output_of(*command: str) -> str | None:
    """Standard output of a command; None if it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
