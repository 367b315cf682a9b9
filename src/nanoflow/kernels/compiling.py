"""Compiles Triton kernels in parallel before they are needed.

Normally Triton compiles a kernel at its first launch with arguments of a new kind, which takes one to five seconds of
one core. Within `compiling()` as many threads as there are cores compile; the compiler mostly releases Python's lock.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


@contextmanager
def compiling(
    prepare_thread: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Triton kernels that this thread launches within the context are compiled by other threads; it ends when all are.

    Does nothing without Triton, or with a version that cannot do this: kernels are then compiled at their launch. The
    same holds for a kernel whose compilation fails here; its launch raises the error.

    Args:
        prepare_thread: Called first in each compiling thread, e.g. to choose its device.

    Yields:
        `compile_only`: a context in which launches request compilation and run nothing, so that many kernels compile in
            parallel. Other queued work does run, and no other thread may launch kernels meanwhile. After it, a launch
            waits for its own kernel.
    """
    mode = _async_mode()
    if mode is None:
        yield nullcontext
        return
    with (
        ThreadPoolExecutor(num_cores(), "nanoflow-compile", initializer=prepare_thread) as pool,
        mode(pool, ignore_errors=True),
    ):
        yield _compile_only


@contextmanager
def _compile_only() -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def ask(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    # Triton has no other way to make launches inside called code compile only.
    JITFunction.run = ask
    try:
        yield
    finally:
        JITFunction.run = launch


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _async_mode() -> Any | None:
    """Triton's context for compiling in other threads; None if it has none."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return getattr(triton, "AsyncCompileMode", None)
