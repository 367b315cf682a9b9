"""The event loop of a process of the server: uvloop's where it is installed. It is light to import (`serve.py`)."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from typing import Any

from nanoflow.device.host_memory import bound_host_memory


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in uvloop's event loop if that is installed, else in asyncio's."""
    bound_host_memory()
    # Encode a text in the calling thread alone: the tokenizer would use all cores, which delays running streams.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform != "win32" and find_spec("uvloop") is not None:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)
