"""The engine in a process of its own: `python -m nanoflow.engine.process SOCKET`.

A loop between a socket and an engine: take what the front end sends, step, send what came of it. It ends when told to,
when the engine fails, or when its parent is gone. How a front end starts it and talks to it is in `child.py`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from zmq.constants import PAIR
from zmq.sugar.context import Context

from nanoflow.config import EngineConfig
from nanoflow.engine.messages import (
    Abort,
    Add,
    EngineFacts,
    EngineStats,
    Failed,
    Finished,
    FromEngine,
    Heartbeat,
    Ready,
    Shutdown,
    StepOutput,
)
from nanoflow.engine.wire import ToEngine, WireError, decode_to_engine, encode
from nanoflow.outputs import FinishReason
from nanoflow.request import Request

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
_LINGER_S = 2.0


class EngineLoop(Protocol):
    """What this process needs of an engine; `engine.py` has the real one."""

    facts: EngineFacts

    @property
    def has_work(self) -> bool:
        """True while a step can make progress."""

    def add(self, request: Request) -> None:
        """Take a request; ValueError if it can never run."""

    def abort(self, request_ids: Iterable[int]) -> None:
        """Forget requests."""

    def step(self) -> StepOutput:
        """One iteration."""

    def stats(self) -> EngineStats:
        """State now."""

    def close(self) -> None:
        """Stop."""


class Channel:
    """The engine's end of the socket.

    Args:
        path: File of the socket, which the parent has bound.
    """

    def __init__(self, path: str) -> None:
        self._context = Context()
        self._socket = self._context.socket(PAIR)
        # Neither end may block the other: how much can be on its way is bounded by the requests that were let in.
        self._socket.set_hwm(0)
        self._socket.connect(f"ipc://{path}")

    def send(self, message: FromEngine) -> None:
        """Send without waiting."""
        self._socket.send_multipart(encode(message))

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        """All messages that are there; if there are none, wait so long (None: forever) for one."""
        messages: list[ToEngine] = []
        if self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            while self._socket.poll(0):
                messages.append(decode_to_engine(self._socket.recv_multipart()))
        return messages

    def close(self) -> None:
        """Wait a moment until what was sent has left, then close."""
        self._context.destroy(linger=int(_LINGER_S * 1000))


def serve(build: Callable[[EngineConfig], EngineLoop], path: str) -> int:
    """Build the engine that the first message describes, then run it until told to stop.

    Args:
        build: Loads a model; a ValueError's message is for people.
        path: File of the socket.

    Returns:
        The process's exit status: 0 after a `Shutdown`, 1 if the engine could not start or has failed.
    """
    threading.Thread(target=_end_with_parent, args=(path,), name="parent watch", daemon=True).start()
    channel = Channel(path)
    engine: EngineLoop | None = None
    try:
        config, *messages = channel.receive(None)
        if not isinstance(config, EngineConfig):
            raise WireError(f"the first message must be the configuration, got {type(config).__name__}")
        engine = build(config)
        channel.send(Ready(facts=engine.facts))
        _run(engine, channel, messages)
        return 0
    # The border of the process: whatever happened is told to the front end, which ends its requests.
    except Exception as error:
        message = _one_line(error)
        if engine is not None or not isinstance(error, ValueError | OSError):
            logger.exception("the engine has failed")
            message = f"{type(error).__name__}: {message}"
        channel.send(Failed(message=message))
        return 1
    finally:
        if engine is not None:
            engine.close()
        channel.close()


def _run(engine: EngineLoop, channel: Channel, messages: list[ToEngine]) -> None:
    """The loop; while there is nothing to do it says so once a heartbeat."""
    while True:
        for message in messages:
            if isinstance(message, Shutdown):
                return
            _HANDLERS[type(message)](engine, channel, message)
        channel.send(engine.step() if engine.has_work else Heartbeat(stats=engine.stats()))
        messages = channel.receive(0.0 if engine.has_work else HEARTBEAT_S)


def _add(engine: EngineLoop, channel: Channel, message: Add) -> None:
    for request in message.requests:
        try:
            engine.add(request)
        except ValueError as error:
            end = Finished(reason=FinishReason.ERROR, error=_one_line(error))
            channel.send(StepOutput(finished={request.request_id: end}, stats=engine.stats()))


def _abort(engine: EngineLoop, _channel: Channel, message: Abort) -> None:
    engine.abort(message.request_ids)


_HANDLERS: dict[type, Callable[[EngineLoop, Channel, Any], None]] = {Add: _add, Abort: _abort}


def _end_with_parent(path: str) -> None:
    """Wait for the end of standard input, a pipe that only the parent holds: it closes however the parent ends."""
    while os.read(0, 1):
        pass
    with suppress(OSError):
        Path(path).unlink()
        Path(path).parent.rmdir()
    os._exit(1)


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def main() -> int:
    """Run the real engine."""
    from nanoflow.engine.build import build_engine

    logging.basicConfig(format="nanoflow engine: %(levelname)s: %(message)s")
    return serve(build_engine, sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
