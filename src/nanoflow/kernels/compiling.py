"""Compile Triton kernels side by side, before they are needed.

A kernel is compiled when it is first launched with arguments of a new kind, one after the other, each for one to five
seconds of one core. Within `compiling()` that is done by as many threads as there are cores, for the compiler leaves
Python's lock to others most of the time. Knows nothing of models.
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
    """Triton kernels that this thread launches within are compiled by other threads; at the end all of them are.

    Does nothing where there is no Triton, or one that cannot: kernels are then compiled as they are launched. So is one
    whose compilation fails here, which then says why.

    Args:
        prepare_thread: Run in each compiling thread first, e.g. to choose its device.

    Yields:
        `compile_only`: a context in which launches ask for a kernel and do not run it, so that many are compiled at
        once. Whatever else is queued in it does run, and no other thread may launch kernels meanwhile. After it, a
        launch waits for its own kernel.
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

    # Triton has no other way to say of launches in code that is called that they shall only compile.
    JITFunction.run = ask
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
