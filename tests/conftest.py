"""Settings that must be in effect before any test module is imported.

Triton decides on import whether to compile or to interpret. Tests send SIGINT to this process and to its children. A
shell that starts this process in the background makes it ignore SIGINT, and children inherit that, so the handler is
restored. Property tests have no deadlines, because the machine may be busy.
Slow tests come first, so that none of them is the last one that a single worker still has to do.
"""

from __future__ import annotations

import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
