"""The machine that a profile is made on, and whether a stored profile is of this one."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

import torch

from nanoflow.device.detect import device_name, total_memory_bytes
from nanoflow.device.energy import gpu_power_limit_w
from nanoflow.device.nvml import ask_nvml
from nanoflow.profile.table import Profile, ProfileError, Setup
from nanoflow.profiler.sustained import Span, sustained
from nanoflow.version import __version__

# What times depend on, and what a profile that is continued must agree in besides.
_MACHINE = ("gpu", "num_gpus", "num_sms", "power_limit_w")
_SOFTWARE = ("driver", "software")
_IDLE_CALLS = 200


def detect_setup(device: torch.device) -> Setup:
    """This machine; the power that nothing takes is not measured here."""
    is_gpu = device.type == "cuda"
    return Setup(
        gpu=device_name(device),
        memory_bytes=total_memory_bytes(device),
        num_sms=torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else None,
        power_limit_w=gpu_power_limit_w(device),
        driver=ask_nvml(lambda nvml: str(nvml.nvmlSystemGetDriverVersion())) if is_gpu else None,
        software=_software(),
    )


@torch.inference_mode()
def static_power_w(device: torch.device, span: Span | None = None) -> float | None:
    """Power of the device with its clocks up and next to nothing to do: one-element kernels; None if unknown."""
    if device.type != "cuda":
        return None
    element = torch.zeros(1, device=device)

    def work() -> None:
        for _ in range(_IDLE_CALLS):
            element.add_(1.0)

    measured = sustained(work, device, span)
    return None if measured.energy_j is None else measured.energy_j / measured.time_s


def check_same_machine(profile: Profile, setup: Setup) -> None:
    """Refuse a profile of another machine.

    Raises:
        ProfileError: Names the first difference, with both values.
    """
    _check(profile, setup, _MACHINE)


def check_same_software(profile: Profile, setup: Setup) -> None:
    """Refuse to continue a profile of another machine, driver or software: its points could not be compared.

    Raises:
        ProfileError: Names the first difference, with both values.
    """
    _check(profile, setup, (*_MACHINE, *_SOFTWARE))


def _check(profile: Profile, setup: Setup, names: tuple[str, ...]) -> None:
    if not profile.setup.is_measured:
        raise ProfileError(f"the profile of {profile.model} is an estimate for {profile.setup.gpu}, not a measurement")
    for name in names:
        there, here = getattr(profile.setup, name), getattr(setup, name)
        if there != here:
            raise ProfileError(f"the profile of {profile.model} was made with {name} {there}, here it is {here}")


def _software() -> dict[str, str]:
    found = {"nanoflow": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = metadata.version("triton")
    return found
