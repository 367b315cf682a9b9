"""Runs an engine in a process of its own, which frees the device in any case, also after a crash."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from nanoflow.bench.offline import run_workloads
from nanoflow.bench.options import ThroughputConfig
from nanoflow.bench.record import BenchRecord
from nanoflow.config import EngineConfig

# How long a process that has sent everything may take to free its device.
_END_S = 60.0

Found = TypeVar("Found")


class RunFailed(Exception):
    """An engine did not start, ended, or ran out of time; the message is one line that says which."""


def run_apart(
    engine: EngineConfig, configs: Sequence[ThroughputConfig], deadline_s: float | None = None
) -> Iterator[BenchRecord]:
    """Records of all workloads in order, each yielded as soon as it is complete.

    Args:
        engine: Options of the engine, which is built once, in the new process.
        configs: The runs.
        deadline_s: When to stop, on `time.monotonic`; a run that is not complete then is lost. None for never.

    Raises:
        RunFailed: Not all records arrived.
    """
    return yielded_apart(run_workloads, (engine, configs), len(configs), deadline_s)


def yielded_apart(
    function: Callable[..., Iterable[Found]], arguments: Sequence[Any], count: int, deadline_s: float | None = None
) -> Iterator[Found]:
    """What a function yields in a new process, each item as soon as it arrives.

    Args:
        function: A function of a module; it must not yield strings, which stand for errors here.
        arguments: Its arguments.
        count: Number of items that it yields.
        deadline_s: When to stop, on `time.monotonic`; an item that has not arrived then is lost. None for never.

    Raises:
        RunFailed: Not all items arrived.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        for _ in range(count):
            if not ours.poll(None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0)):
                raise RunFailed("the time is over")
            found = ours.recv()
            if isinstance(found, str):
                raise RunFailed(found)
            yield found
        process.join(_END_S)
    except EOFError:
        process.join(_END_S)
        raise RunFailed(f"the engine's process ended with status {process.exitcode}") from None
    finally:
        if process.is_alive():
            process.terminate()
            process.join(_END_S)
        process.kill()
        ours.close()


def _send(end: Connection, function: Callable[..., Iterable[Any]], arguments: Sequence[Any]) -> None:
    try:
        for found in function(*arguments):
            end.send(found)
    except (RuntimeError, ValueError) as error:
        end.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
