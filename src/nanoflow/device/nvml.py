"""Questions to the driver's management library.

It counts all cards of the machine by their places on the bus. Torch counts those that CUDA shows it, in the order that
`CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER` give them. So a card is named by its UUID, never by an index.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def ask_gpu(device: torch.device | str, question: Callable[[Any, Any], Any]) -> Any:
    """What the library says of a GPU.

    Args:
        device: As torch names it; without an index the current one of this thread.
        question: Gets the library, and the library's handle of the card.

    Returns:
        None where `ask_nvml` has None, for a CPU, and for a part of a card (MIG): what the library counts there is the
        whole card's, with all else that runs on it.
    """
    import torch

    if torch.device(device).type != "cuda":
        return None

    def ask(nvml: Any) -> Any:
        card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return None if _is_divided(nvml, card) else question(nvml, card)

    return ask_nvml(ask)


def ask_nvml(question: Callable[[Any], Any]) -> Any:
    """What the library says; None without it, without a GPU, or if it does not know."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return question(nvml)
    except nvml.NVMLError:
        return None


def _is_divided(nvml: Any, card: Any) -> bool:
    """True if the card is divided in parts, one of which is what torch sees."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(card)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError:
        # It is a card that cannot be divided.
        return False


@functools.cache
def _nvml() -> Any:
    """The library, ready for questions; None without it."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
