"""Messages as bytes: two frames, the name of the type and its fields in MessagePack.

Every type is known beforehand and checked on arrival; nothing that comes over the wire can name code to run. Sockets
are not known here: see `channel.py` (the engine's end) and `link.py` (a front end's).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from nanoflow.config import EngineConfig
from nanoflow.engine.messages import (
    Abort,
    Add,
    Failed,
    FromEngine,
    FromFrontEnd,
    Heartbeat,
    Join,
    Leave,
    Ready,
    Shutdown,
    StepOutput,
    Told,
    Unreadable,
)

ToEngine = EngineConfig | FromFrontEnd
"""What goes down: the configuration first, then everything else."""

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    b"EngineConfig": msgspec.msgpack.Decoder(EngineConfig),
    b"Join": msgspec.msgpack.Decoder(Join),
    b"Leave": msgspec.msgpack.Decoder(Leave),
    b"Add": msgspec.msgpack.Decoder(Add),
    b"Abort": msgspec.msgpack.Decoder(Abort),
    b"Shutdown": msgspec.msgpack.Decoder(Shutdown),
}
_FROM_ENGINE: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    b"Ready": msgspec.msgpack.Decoder(Ready),
    b"Failed": msgspec.msgpack.Decoder(Failed),
    b"StepOutput": msgspec.msgpack.Decoder(StepOutput),
    b"Heartbeat": msgspec.msgpack.Decoder(Heartbeat),
    b"Told": msgspec.msgpack.Decoder(Told),
}


class WireError(RuntimeError):
    """A message is of no known type or does not fit its type: the two ends are not of one version."""


def encode(message: ToEngine | FromEngine) -> list[bytes]:
    """The two frames of a message."""
    return [type(message).__name__.encode(), _ENCODER.encode(message)]


def decode_to_engine(frames: Sequence[bytes]) -> ToEngine | Unreadable:
    """Read a message that a front end sent; WireError if it is none.

    An `Add` that names its requests is always a message: what is wrong with it concerns them alone.
    """
    try:
        message: ToEngine = _decode(frames, _TO_ENGINE)
    except WireError as error:
        request_ids = _ids_of_add(frames)
        if not request_ids:
            raise
        return Unreadable(request_ids=request_ids, error=str(error))
    return message


def decode_from_engine(frames: Sequence[bytes]) -> FromEngine:
    """Read a message that an engine sent; WireError if it is none."""
    message: FromEngine = _decode(frames, _FROM_ENGINE)
    return message


def _ids_of_add(frames: Sequence[bytes]) -> list[int]:
    """The requests of an `Add` that cannot be read as one; none if it is something else."""
    if frames[:1] != [b"Add"]:
        return []
    try:
        return [fields["request_id"] for fields in msgspec.msgpack.decode(frames[1])["requests"]]
    except (msgspec.DecodeError, LookupError, TypeError):
        return []


def _decode(frames: Sequence[bytes], decoders: dict[bytes, msgspec.msgpack.Decoder[Any]]) -> Any:
    try:
        name, fields = frames
        return decoders[name].decode(fields)
    except (ValueError, KeyError, msgspec.DecodeError) as error:
        raise WireError(f"a message cannot be read: {error}") from error
