"""KV events as bytes, in the form that vLLM publishes and that routers read: MessagePack of [time, events, rank].

vLLM has two forms of an event: an array of its name and its fields, and since 0.24 a map with the name as `type`. The
last 64 bits of a page's key as a number are what vLLM sends by default. This file knows no sockets
(`kv_publisher.py`), nor when an event occurs (`scheduler/key_events.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import msgspec

from nanoflow.kv_events import KvEventsConfig
from nanoflow.kvcache.events import AllCleared, KeyEvent, PagesRemoved, PagesStored

_HASH_BYTES = 8
_RANK = 0  # one engine: there is no other rank

Fields = Mapping[str, Any]


class KvEventEncoder:
    """Makes the bytes of batches.

    Args:
        config: Which forms events and keys have.
    """

    def __init__(self, config: KvEventsConfig) -> None:
        is_array = config.event_format == "array"
        self._shape: Callable[[str, Fields], Any] = _as_array if is_array else _as_map
        self._hash: Callable[[bytes], int | bytes] = _as_number if config.block_hash_format == "int" else bytes
        self._encode = msgspec.msgpack.Encoder().encode

    def encode(self, events: Iterable[KeyEvent], time_s: float) -> bytes:
        """The bytes of a batch of events at this time (seconds since 1970)."""
        return self._encode([time_s, [self._event(event) for event in _joined(events)], _RANK])

    def _event(self, event: KeyEvent) -> Any:
        match event:
            case PagesStored():
                fields = {
                    "block_hashes": [self._hash(key) for key in event.keys],
                    "parent_block_hash": None if event.before is None else self._hash(event.before),
                    "token_ids": event.token_ids.tolist(),
                    "block_size": len(event.token_ids) // len(event.keys),
                    "lora_id": None,
                    "medium": event.medium,
                    "lora_name": None,
                }
                return self._shape("BlockStored", fields)
            case PagesRemoved():
                hashes = [self._hash(key) for key in event.keys]
                return self._shape("BlockRemoved", {"block_hashes": hashes, "medium": event.medium})
            case AllCleared():
                return self._shape("AllBlocksCleared", {})


def _joined(events: Iterable[KeyEvent]) -> Iterable[KeyEvent]:
    """The events, with those that remove pages one after the other as one."""
    for medium, group in groupby(events, lambda event: event.medium if isinstance(event, PagesRemoved) else None):
        if medium is None:
            yield from group
        else:
            yield PagesRemoved(
                keys=tuple(key for event in group if isinstance(event, PagesRemoved) for key in event.keys),
                medium=medium,
            )


def _as_array(name: str, fields: Fields) -> list[Any]:
    return [name, *fields.values()]


def _as_map(name: str, fields: Fields) -> dict[str, Any]:
    return {"type": name, **fields}


def _as_number(key: bytes) -> int:
    return int.from_bytes(key[-_HASH_BYTES:], "big")
