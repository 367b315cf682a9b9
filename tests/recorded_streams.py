"""Stand-ins for CUDA streams and events that record which work must have ended when a piece of work begins."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import pytest
import torch


class RecordedEvent:
    """The work queued on a stream when the event was recorded; None before that."""

    def __init__(self) -> None:
        self.work: frozenset[Hashable] | None = None

    def record(self, stream: RecordedStream) -> None:
        self.work = frozenset(stream.work)


class RecordedStream:
    """Runs work in order, each piece after all in `work`: earlier work on this stream, and work that was waited for."""

    def __init__(self) -> None:
        self.work: set[Hashable] = set()

    def wait_event(self, event: RecordedEvent) -> None:
        """Waiting for an event that was never recorded has no effect, as on a device."""
        self.work |= event.work or frozenset()


class RecordedStreams:
    """Replaces torch's streams and events in a test.

    Attributes:
        before: For each piece of work so far, all work that must have ended when it begins.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._current = [RecordedStream()]
        self.before: dict[Hashable, frozenset[Hashable]] = {}
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: self._current[-1])
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(torch.cuda, "Event", RecordedEvent)

    def queue(self, work: Hashable) -> None:
        """Queue a piece of work on the current stream."""
        stream = self._current[-1]
        self.before[work] = frozenset(stream.work)
        stream.work.add(work)

    @contextmanager
    def _within(self, stream: RecordedStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()
