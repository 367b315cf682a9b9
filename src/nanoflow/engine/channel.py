"""The engine's end of the socket: messages from and to every front end, in the process of the engine.

A front end is known by its number, which is the routing id of its socket. The other end is `link.py`.
"""

from __future__ import annotations

from zmq.constants import ROUTER, ROUTER_HANDOVER, USE_FD
from zmq.sugar.context import Context

from nanoflow.engine.messages import FromEngine, ToEngine
from nanoflow.engine.wire import Unreadable, WireError, decode_to_engine, encode

_LINGER_S = 2.0


class Channel:
    """A socket that front ends connect to; sending never waits, and a front end that has gone gets nothing.

    Args:
        listener: File descriptor of a listening Unix socket, as `place.EnginePlace` makes it.
    """

    def __init__(self, listener: int) -> None:
        self._context = Context()
        self._socket = self._context.socket(ROUTER)
        self._socket.set_hwm(0)
        # A front end that comes again is taken for itself, even if its last connection has not been seen to end.
        self._socket.setsockopt(ROUTER_HANDOVER, 1)
        self._socket.setsockopt(USE_FD, listener)
        self._socket.bind(f"ipc:///dev/fd/{listener}")  # a name only: the socket is bound already

    def send(self, front_end: int, message: FromEngine) -> None:
        """Send a message to one front end."""
        self._socket.send_multipart([routing_id(front_end), encode(message)])

    def receive(self, timeout_s: float | None) -> list[tuple[int, ToEngine | Unreadable]]:
        """All messages that have arrived, each with the number of its front end.

        Args:
            timeout_s: How long to wait for the first message if none has arrived; None waits without limit.

        Raises:
            WireError: Something else than a message has arrived.
        """
        messages: list[tuple[int, ToEngine | Unreadable]] = []
        if self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            while self._socket.poll(0):
                sender, *frames = self._socket.recv_multipart()
                if not sender.isdigit() or len(frames) != 1:
                    raise WireError(f"a front end must have a number and send one frame, got {sender!r}, {len(frames)}")
                messages.append((int(sender), decode_to_engine(frames[0])))
        return messages

    def close(self) -> None:
        """Wait a moment until what was sent has left, then close."""
        self._context.destroy(linger=int(_LINGER_S * 1000))


def routing_id(front_end: int) -> bytes:
    """Routing id of a front end's socket."""
    return str(front_end).encode()
