"""The engine in a process of its own: `python -m nanoflow.engine.process LISTENER`, the descriptor of its socket.

It loops: read messages of the front ends, run an iteration, send each front end its part of the output. It ends after
`Shutdown`, when the engine fails, or when its parent has ended. `child.py` starts it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanoflow.config import EngineConfig
from nanoflow.engine.channel import Channel
from nanoflow.engine.front_ends import FrontEnds
from nanoflow.engine.garbage import freeze_heap
from nanoflow.engine.messages import (
    Abort,
    Add,
    EngineFacts,
    EngineStats,
    Failed,
    Heartbeat,
    Join,
    Leave,
    Load,
    Prefetch,
    Prefetched,
    Ready,
    ResetPrefixCache,
    Shutdown,
    StepOutput,
    ToEngine,
)
from nanoflow.engine.quiet_log import log_quietly
from nanoflow.engine.telling import told
from nanoflow.engine.wire import Unreadable, WireError
from nanoflow.errors import one_line
from nanoflow.outputs import Finished, FinishReason
from nanoflow.request import Request, RequestError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
# After so long without a message, the engine prepares for later requests; one that comes meanwhile waits some 50 ms.
_QUIET_S = 0.1

Messages = list[tuple[int, ToEngine | Unreadable]]


class EngineLoop(Protocol):
    """The methods of an engine that this process uses; `engine.py` has the real engine."""

    facts: EngineFacts

    @property
    def has_work(self) -> bool:
        """True while a step can make progress."""

    def add(self, request: Request) -> None:
        """Add a request; RequestError if it can never run."""

    def abort(self, request_ids: Iterable[int]) -> None:
        """Drop requests."""

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes."""

    def prefetch(self, wanted: Prefetch) -> Prefetched:
        """Answer advice about a request that will come."""

    def step(self) -> StepOutput:
        """One iteration."""

    def prepare_next(self) -> bool:
        """Prepare something for later requests, in about 50 ms; False if there is nothing to prepare."""

    def stats(self) -> EngineStats:
        """State now."""

    def close(self) -> None:
        """Stop."""


def serve(build: Callable[[EngineConfig], EngineLoop], listener: str) -> int:
    """Build the engine that the first message describes, then run it until told to stop.

    Args:
        build: Loads a model; the message of a ValueError is shown to the user.
        listener: File descriptor of the listening socket, in digits.

    Returns:
        Exit status of the process: 0 after a `Shutdown`, even before `Load`; 1 if the engine did not start or failed.
    """
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
    # A signal to the whole process group is for the parent: it lets running requests end, then it ends this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel, front_ends = Channel(int(listener)), FrontEnds()
    engine: EngineLoop | None = None
    try:
        first = _configuration(channel, front_ends)
        if first is None:
            return 0
        config, messages = first
        with told(lambda message: channel.send(0, message)):
            engine = build(config)
        freeze_heap()
        _Loop(engine=engine, channel=channel, front_ends=front_ends).run(messages)
        return 0
    # Outermost handler of the process: front ends are told of any failure, and end their requests.
    except Exception as error:
        message = one_line(error)
        if engine is not None or not isinstance(error, ValueError | OSError):
            logger.exception("the engine has failed")
            message = f"{type(error).__name__}: {message}"
        for front_end in front_ends:
            channel.send(front_end, Failed(message=message))
        return 1
    finally:
        if engine is not None:
            engine.close()
        channel.close()


def _configuration(channel: Channel, front_ends: FrontEnds) -> tuple[EngineConfig, Messages] | None:
    """Wait for `Load` from front end 0.

    Returns:
        Its configuration, and the other messages that have arrived; None if `Shutdown` came instead.
    """
    early: Messages = []
    while True:
        for front_end, message in channel.receive(None):
            early.append((front_end, message))
            front_ends.join(front_end)
        for front_end, message in early:
            if front_end == 0:
                if isinstance(message, Shutdown):
                    return None
                if not isinstance(message, Load):
                    raise WireError(f"the first message must be Load, got {type(message).__name__}")
                early.remove((front_end, message))
                return message.config, early


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loop:
    """An engine and its front ends."""

    engine: EngineLoop
    channel: Channel
    front_ends: FrontEnds

    def run(self, messages: Messages) -> None:
        """Run iterations while there are requests; otherwise send a heartbeat every `HEARTBEAT_S` seconds."""
        self.channel.send(0, Ready(facts=self.engine.facts))
        while True:
            for front_end, message in messages:
                if isinstance(message, Shutdown):
                    return
                if not self.front_ends.has_left(front_end):
                    self._take(front_end, message)
            if self.engine.has_work:
                for front_end, part in self.front_ends.parts(self.engine.step()).items():
                    self.channel.send(front_end, part)
            # Also right after the last request has ended, so that front ends know the state at once.
            if not self.engine.has_work:
                beat = Heartbeat(stats=self.engine.stats())
                for front_end in self.front_ends:
                    self.channel.send(front_end, beat)
            messages = self.channel.receive(0.0) if self.engine.has_work else self._idle()

    def _idle(self) -> Messages:
        """Wait up to `HEARTBEAT_S` seconds for messages, and meanwhile prepare what later requests may need."""
        until_s = time.monotonic() + HEARTBEAT_S
        while time.monotonic() < until_s:
            messages = self.channel.receive(_QUIET_S)
            if messages:
                return messages
            if not self.engine.prepare_next():
                return self.channel.receive(max(until_s - time.monotonic(), 0.0))
        return []

    def _take(self, front_end: int, message: ToEngine | Unreadable) -> None:
        match message:
            case Add():
                self._add(front_end, message.whole())
            case Unreadable():
                logger.error("requests are refused: %s", message.error)
                self._refuse(front_end, message.request_ids, message.error)
            case Abort():
                self.engine.abort(self.front_ends.disown(front_end, message.request_ids))
            case ResetPrefixCache():
                self.engine.reset_prefix_cache()
            case Prefetch():
                self.channel.send(front_end, self.engine.prefetch(message))
            case Join():
                self.front_ends.join(front_end)
                self.channel.send(front_end, Ready(facts=self.engine.facts))
            case Leave():
                self.engine.abort(self.front_ends.leave(message.front_end))
            case _:
                raise WireError(f"unexpected {type(message).__name__}")

    def _add(self, front_end: int, requests: Iterable[Request]) -> None:
        for request in requests:
            try:
                self.engine.add(self.front_ends.own(front_end, request))
            # Nothing has been computed for the request yet, so any error concerns this request alone.
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.exception("a request is refused")
                self._refuse(front_end, (request.request_id,), one_line(error))

    def _refuse(self, front_end: int, request_ids: Sequence[int], error: str) -> None:
        """Tell a front end that requests have failed which the engine did not accept."""
        self.front_ends.disown(front_end, request_ids)
        end = Finished(reason=FinishReason.ERROR, error=error)
        refusal = StepOutput(finished=dict.fromkeys(request_ids, end), stats=self.engine.stats())
        self.channel.send(front_end, refusal)


def _end_with_parent() -> None:
    """End when standard input ends: only the parent holds the other end of the pipe, so it closes with the parent."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> int:
    """Serve the real engine; return the exit status."""
    from nanoflow.engine.build import build_engine

    log_quietly("nanoflow engine")
    return serve(build_engine, sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
