"""Choosing a device and a dtype, and measuring free memory. Nothing here allocates memory on the device."""

from __future__ import annotations

import torch

from nanoflow.config import ConfigError
from nanoflow.device.host_memory import free_host_bytes, total_host_bytes
from nanoflow.device.rough_rates import rough_cpu_flops_per_s, rough_gpu_flops_per_s
from nanoflow.hardware import LocalDevice

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The torch device for an option `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: The device does not exist on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def device_name(device: torch.device) -> str:
    """The GPU's name as reported by its driver; `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def count_sms(device: torch.device) -> int:
    """Number of streaming multiprocessors (SMs) of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def local_device(device: torch.device) -> LocalDevice:
    """What limits are chosen from: the present memory of the device, and its rough speed."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        flops_per_s = rough_gpu_flops_per_s((found.major, found.minor), count_sms(device))
    else:
        flops_per_s = rough_cpu_flops_per_s(torch.get_num_threads())
    return LocalDevice(
        name=device_name(device) if device.type == "cuda" else "the CPU",
        is_gpu=device.type == "cuda",
        memory_bytes=total_memory_bytes(device),
        free_bytes=free_memory_bytes(device),
        flops_per_s=flops_per_s,
    )


def use_device(device: torch.device) -> None:
    """Make it the current device of this thread, on which kernels are launched."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def resolve_dtype(name: str, model_dtype: str | None, device: torch.device) -> torch.dtype:
    """The torch dtype of an option; `auto` is the model's own on a GPU, and float32 on a CPU."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else (model_dtype or "bfloat16")
    return _DTYPES.get(name, torch.bfloat16)


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on the device at present."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()


def total_memory_bytes(device: torch.device) -> int:
    """Total memory of the device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return total_host_bytes()
