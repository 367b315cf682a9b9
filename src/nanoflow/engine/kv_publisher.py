"""Publishes KV events over ZeroMQ, beside the engine's loop, which never waits for it.

Each message is [topic, number of the batch (8 bytes, big-endian), batch]. Numbers begin at 0 and have no gaps, so a
subscriber sees when it has missed a batch. It may then send the first number that it wants to the replay socket, and
gets [number, batch] for each of the last batches from there on, and [-1, nothing] at the end.
`kv_event_wire.py` has the batches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Protocol

from zmq.constants import IPV6, LINGER, MAXMSGSIZE, PUB, ROUTER, SNDHWM
from zmq.error import ContextTerminated, ZMQError
from zmq.sugar.context import Context

from nanoflow.engine.kv_event_wire import KvEventEncoder
from nanoflow.kv_events import KvEventsConfig, is_bound, read_kv_events
from nanoflow.kvcache.events import AllCleared, KeyEvent
from nanoflow.option import ConfigError
from nanoflow.scheduler.key_events import Put

logger = logging.getLogger(__name__)

_NUMBER_BYTES = 8
_END = (-1).to_bytes(_NUMBER_BYTES, "big", signed=True)
# Events of one message; more that wait go into the next.
_EVENTS_A_BATCH = 1024
_LONGEST_REQUEST_BYTES = 1024
_CLOSE_S = 2.0


class Publisher(Protocol):
    """Where events go.

    Attributes:
        put: Takes an event without waiting; None if nobody wants events.
    """

    @property
    def put(self) -> Put | None:
        """As above."""

    def close(self) -> None:
        """Publish what waits, and end."""


class NoPublisher:
    """Nobody is told."""

    put: Put | None = None

    def close(self) -> None:
        """Nothing to end."""


class KvPublisher:
    """Publishes in two threads of its own: one sends new batches, one answers replay requests.

    The first batch says that nothing is cached: a subscriber forgets what it knew of an engine that ran before.

    Args:
        config: Where, and how much is kept.

    Raises:
        ConfigError: An endpoint cannot be bound; one line that says why.
    """

    def __init__(self, config: KvEventsConfig) -> None:
        self._encoder = KvEventEncoder(config)
        self._topic = config.topic.encode()
        self._most_waiting = config.max_queue_size
        self._waiting: SimpleQueue[KeyEvent | None] = SimpleQueue()
        self._num_lost = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._lock = threading.Lock()
        self._context = Context()
        self._context.setsockopt(LINGER, int(_CLOSE_S * 1000))
        try:
            self._pub = self._open(PUB, config.endpoint, most_waiting=config.hwm)
            self._router = None
            if config.replay_endpoint is not None:
                self._router = self._open(ROUTER, config.replay_endpoint, most_waiting=config.buffer_steps + 1)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._threads = [threading.Thread(target=self._publish, name="kv events", daemon=True)]
        if self._router is not None:
            self._threads.append(threading.Thread(target=self._replay, name="kv events replay", daemon=True))
        self.put(AllCleared())
        for thread in self._threads:
            thread.start()

    def put(self, event: KeyEvent) -> None:
        """Take an event. If too many wait it is lost, and the next one is preceded by one that all pages are gone."""
        if self._waiting.qsize() >= self._most_waiting:
            if self._num_lost == 0:
                logger.warning("KV events are lost: %d wait to be published (max_queue_size)", self._most_waiting)
            self._num_lost += 1
            return
        if self._num_lost:
            logger.warning("%d KV events were lost: subscribers are told that all pages are gone", self._num_lost)
            self._waiting.put(AllCleared())
            self._num_lost = 0
        self._waiting.put(event)

    def close(self) -> None:
        """Publish what waits, for two seconds at most, and close the sockets."""
        self._waiting.put(None)
        self._threads[0].join(_CLOSE_S)
        # Ends the wait for replay requests. It returns when both threads have closed their sockets.
        closing = threading.Thread(target=self._context.term, name="kv events end", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    # A socket of ZeroMQ: it is of no type that is known here.
    def _open(self, kind: int, endpoint: str, *, most_waiting: int):  # type: ignore[no-untyped-def]
        socket = self._context.socket(kind)
        socket.setsockopt(SNDHWM, most_waiting)
        socket.setsockopt(IPV6, int("::" in endpoint or "[" in endpoint))
        try:
            if kind == ROUTER or is_bound(endpoint):
                socket.setsockopt(MAXMSGSIZE, _LONGEST_REQUEST_BYTES)
                socket.bind(endpoint)
            else:
                socket.connect(endpoint)
        except ZMQError as error:
            problem = f"{endpoint} cannot be opened: {str(error).partition(' (addr=')[0]}"
            raise ConfigError(f"kv_events_config: {problem}; give each server endpoints of its own") from None
        return socket

    def _publish(self) -> None:
        number = 0
        while events := self._next():
            try:
                batch = self._encoder.encode(events, time.time())
                with self._lock:
                    self._kept.append((number, batch))
                self._pub.send_multipart((self._topic, number.to_bytes(_NUMBER_BYTES, "big"), batch))
            # Whatever it was, the number that is missing tells subscribers, and later events may be published.
            except Exception:
                logger.exception("KV events could not be published")
            number += 1
        self._pub.close()

    def _next(self) -> list[KeyEvent]:
        """Wait for events, then take all that are there; none at the end."""
        events: list[KeyEvent] = []
        event = self._waiting.get()
        while event is not None:
            events.append(event)
            if len(events) == _EVENTS_A_BATCH:
                break
            try:
                event = self._waiting.get_nowait()
            except Empty:
                return events
        if event is None and events:
            self._waiting.put(None)  # the end comes after these
        return events

    def _replay(self) -> None:
        assert self._router is not None
        try:
            while True:
                *envelope, wanted = self._router.recv_multipart()
                if len(wanted) != _NUMBER_BYTES:
                    logger.warning("a request to replay KV events has %d bytes instead of 8", len(wanted))
                    continue
                first = int.from_bytes(wanted, "big")
                with self._lock:
                    kept = [(number, batch) for number, batch in self._kept if number >= first]
                for number, batch in kept:
                    self._router.send_multipart((*envelope, number.to_bytes(_NUMBER_BYTES, "big"), batch))
                self._router.send_multipart((*envelope, _END, b""))
        except ContextTerminated:
            self._router.close()


@contextmanager
def publishing(text: str | None) -> Iterator[Publisher]:
    """The publisher that the option `kv_events_config` asks for; it is closed if the block fails, and only then.

    Raises:
        ConfigError: An endpoint cannot be bound.
    """
    config = KvEventsConfig() if text is None else read_kv_events(text)
    publisher: Publisher = KvPublisher(config) if config.is_publishing else NoPublisher()
    try:
        yield publisher
    except BaseException:
        publisher.close()
        raise
