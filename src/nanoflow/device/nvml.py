"""Questions to the driver's management library."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any


def ask_nvml(question: Callable[[Any], Any]) -> Any:
    """What the library says; None without it, without a GPU, or if it does not know."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return question(nvml)
    except nvml.NVMLError:
        return None


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
