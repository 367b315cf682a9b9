"""Queries to NVIDIA's management library (NVML).

NVML numbers all cards of the machine by their place on the bus. Torch numbers the cards that CUDA shows it, in the
order set by `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER`. So a card is identified by its UUID, never by an index.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def ask_gpu(device: torch.device | str, question: Callable[[Any, Any], Any]) -> Any:
    """Query NVML about a GPU.

    Args:
        device: As torch names it; without an index, the current device of this thread.
        question: Called with the library and its handle of the card.

    Returns:
        The answer. None if `ask_nvml` returns None, for a CPU, and for a part of a card (MIG), as NVML's counters are
            of the whole card.
    """
    import torch

    if torch.device(device).type != "cuda":
        return None

    def ask(nvml: Any) -> Any:
        card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return None if _is_divided(nvml, card) else question(nvml, card)

    return ask_nvml(ask)


def ask_nvml(question: Callable[[Any], Any]) -> Any:
    """Query NVML; None without the library, without a GPU, or if the query is not supported."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return question(nvml)
    except nvml.NVMLError:
        return None


def _is_divided(nvml: Any, card: Any) -> bool:
    """True if the card is divided into MIG instances, one of which torch sees."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(card)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError:
        # The card cannot be divided.
        return False


@functools.cache
def _nvml() -> Any:
    """The library, initialized; None if it is not available."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
