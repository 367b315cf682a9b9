"""The engine's end of the socket: receives messages from every front end and sends messages to each.

A front end has a number, which is the routing id of its socket. Its end of the socket is in `link.py`.
"""

from __future__ import annotations

from zmq.constants import ROUTER, ROUTER_HANDOVER, USE_FD
from zmq.sugar.context import Context

from nanoflow.engine.messages import FromEngine, ToEngine
from nanoflow.engine.wire import Unreadable, WireError, decode_to_engine, encode

_LINGER_S = 2.0


class Channel:
    """A socket that front ends connect to. Sending never blocks; a message to a front end that has left is dropped.

    Args:
        listener: File descriptor of a listening Unix socket, as `place.EnginePlace` makes it.
    """

    def __init__(self, listener: int) -> None:
        self._context = Context()
        self._socket = self._context.socket(ROUTER)
        self._socket.set_hwm(0)
        # A front end may connect again before the end of its last connection is noticed: the new one takes over.
        self._socket.setsockopt(ROUTER_HANDOVER, 1)
        self._socket.setsockopt(USE_FD, listener)
        self._socket.bind(f"ipc:///dev/fd/{listener}")  # only a name: the listener is bound already

    def send(self, front_end: int, message: FromEngine) -> None:
        """Send a message to one front end."""
        self._socket.send_multipart([routing_id(front_end), encode(message)])

    def receive(self, timeout_s: float | None) -> list[tuple[int, ToEngine | Unreadable]]:
        """All messages that have arrived, each with the number of its front end.

        Args:
            timeout_s: How long to wait for the first message if none has arrived; None waits without limit.

        Raises:
            WireError: What has arrived is no message.
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
        """Wait up to `_LINGER_S` until all messages are sent, then close."""
        self._context.destroy(linger=int(_LINGER_S * 1000))


def routing_id(front_end: int) -> bytes:
    """Routing id of a front end's socket."""
    return str(front_end).encode()
