"""Rough rates of matrix products on devices that nobody measured, for the choice of an engine's limits.

`hardware.py` has the GPUs that others are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

from nanoflow.hardware import GPUS

# From this compute capability on, the GPU of this file that unknown GPUs are compared with.
_LIKE: Mapping[tuple[int, int], str] = {(8, 0): "a100-80", (8, 9): "ada6000", (9, 0): "h200", (10, 0): "b200"}
# Sustained rate of GEMMs / peak rate, as measured on an H200; used where none was measured.
_SUSTAINED_SHARE = 0.68
# FLOP/s of a core with 256-bit vectors when all cores work and share memory: an order of magnitude, not a measurement.
_CORE_FLOPS_PER_S = 30e9


def rough_gpu_flops_per_s(capability: tuple[int, int], num_sms: int) -> float:
    """Rough sustained rate of products on a GPU: its SMs times the rate of an SM of the most similar known GPU."""
    likes = [name for least, name in sorted(_LIKE.items()) if least <= capability] or ["ada6000"]
    spec = GPUS[likes[-1]]
    sustained = spec.sustained_compute_flops_per_s
    reached = spec.compute_flops_per_s.value * _SUSTAINED_SHARE if sustained is None else sustained.value
    return reached / spec.num_sms.value * num_sms


def rough_cpu_flops_per_s(num_cores: int) -> float:
    """Rough sustained rate of products on this many CPU cores."""
    return num_cores * _CORE_FLOPS_PER_S
