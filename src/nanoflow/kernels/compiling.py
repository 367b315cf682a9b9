"""Compile Triton kernels side by side, before they are needed.

A kernel is compiled when it is first launched with arguments of a new kind, one after the other, each for one to five
seconds of one core. Within `compiling()`, launches only say what has to be compiled; it is done by as many threads as
there are cores, for the compiler leaves Python's lock to others most of the time. Knows nothing of models.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def compiling(prepare_thread: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Triton kernels launched within, in this thread, are compiled and not run; at the end all of them are compiled.

    Whatever else is queued within does run. No other thread may launch kernels meanwhile. Does nothing where there is
    no Triton or it cannot compile beside what it does: kernels are then compiled as they are launched.

    Args:
        prepare_thread: Run in each compiling thread first, e.g. to choose its device.

    Raises:
        Exception: Whatever the compiler says of a kernel.
    """
    mode = _async_mode()
    if mode is None:
        yield
        return
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor(num_cores(), "nanoflow-compile", initializer=prepare_thread) as pool, mode(pool):
        # Triton has no other way to say of launches in code that is called that they shall only compile.
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = launch


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _async_mode() -> Any | None:
    """Triton's context for compiling in other threads; None where it has none."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return getattr(triton, "AsyncCompileMode", None)
