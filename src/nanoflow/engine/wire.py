"""Messages as bytes, in MessagePack.

All types are known beforehand and every field is checked on arrival, so that bytes cannot name code to run. Sockets
are in `channel.py` (the engine's end) and `link.py` (a front end's end).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from nanoflow.engine.messages import FromEngine, ToEngine


class WireError(RuntimeError):
    """Bytes that are no message of a known type: the two ends do not run the same version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """What an `Add` is decoded to whose requests do not fit their type: only these requests end, not the engine."""

    request_ids: list[int]
    error: str


class _RequestId(msgspec.Struct):
    request_id: int


class _AddedIds(msgspec.Struct, array_like=True, tag="Add"):
    """An `Add` of which only the ids of its requests are read."""

    requests: list[_RequestId]


_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_ADDED_IDS = msgspec.msgpack.Decoder(_AddedIds)


def encode(message: ToEngine | FromEngine) -> bytes:
    """The bytes of a message."""
    return _ENCODER.encode(message)


def decode_to_engine(message: bytes) -> ToEngine | Unreadable:
    """Read a message that a front end sent.

    An error in an `Add` whose request ids can be read concerns these requests alone: it gives `Unreadable`.

    Raises:
        WireError: The bytes are no message.
    """
    try:
        return _TO_ENGINE.decode(message)
    except ValueError as error:  # a DecodeError, or text that is not UTF-8
        request_ids = _ids_of_add(message)
        if not request_ids:
            raise _wire_error(error) from error
        return Unreadable(request_ids=request_ids, error=str(_wire_error(error)))


def decode_from_engine(message: bytes) -> FromEngine:
    """Read a message that an engine sent; WireError if the bytes are none."""
    try:
        return _FROM_ENGINE.decode(message)
    except ValueError as error:
        raise _wire_error(error) from error


def _ids_of_add(message: bytes) -> list[int]:
    """The ids of the requests in an `Add`; none if the bytes are something else."""
    try:
        return [request.request_id for request in _ADDED_IDS.decode(message).requests]
    except ValueError:
        return []


def _wire_error(error: ValueError) -> WireError:
    return WireError(f"a message cannot be read: {error}")
