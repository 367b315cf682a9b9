"""The option for KV events, as a user writes it: a JSON object with the fields of vLLM's `--kv-events-config`.

`engine/kv_publisher.py` publishes; what the events say is in `kvcache/events.py`, the guide is docs/kv-events.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoflow.option import ConfigError
from nanoflow.parameters import did_you_mean, shown

_CHOICES = {"publisher": ("zmq", "null"), "event_format": ("array", "map"), "block_hash_format": ("int", "bytes")}
_EXAMPLE = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}'
_ENDPOINT = re.compile(r"tcp://\S+:(?P<port>\d{1,5})|ipc://\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEventsConfig:
    """Where and how KV events are published.

    Attributes:
        enable_kv_cache_events: Publish them.
        publisher: "zmq", or "null" for nobody; if not given, zmq where events are enabled.
        endpoint: Where subscribers find them, `tcp://HOST:PORT` or `ipc://PATH`. It is bound if the host is * or ::, or
            for a path; another host is that of a subscriber who has bound it, and is connected to.
        replay_endpoint: Where subscribers ask for batches that they have missed, always bound; None for nowhere.
        buffer_steps: Batches that are kept for them.
        hwm: Batches that wait for one slow subscriber; it loses further ones.
        max_queue_size: Events that wait to be published; if there are more, a batch says that all pages are gone.
        topic: First frame of each message; llm-d reads `kv@POD@MODEL`.
        event_format: "array" is read by all versions of llm-d and AIBrix, "map" is what vLLM sends since 0.24.
        block_hash_format: "int" sends the last 64 bits of a page's key, as vLLM does by default; "bytes" all of it.

    Raises:
        ValueError: A field has a wrong value; the message names it.
    """

    enable_kv_cache_events: bool = False
    publisher: str | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    event_format: str = "array"
    block_hash_format: str = "int"

    def __post_init__(self) -> None:
        if not isinstance(self.enable_kv_cache_events, bool):
            raise ValueError(f"enable_kv_cache_events must be true or false, got {shown(self.enable_kv_cache_events)}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "publisher" and value is None):
                raise ValueError(f"{name} must be {' or '.join(choices)}, got {shown(value)}")
        for name in ("buffer_steps", "hwm", "max_queue_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name} must be a whole number from 1, got {shown(value)}")
        if not isinstance(self.topic, str):
            raise ValueError(f"topic must be a string, got {shown(self.topic)}")
        for name in ("endpoint", "replay_endpoint"):
            if (value := getattr(self, name)) is not None:
                _check_endpoint(name, value)
        if self.replay_endpoint == self.endpoint:
            raise ValueError("replay_endpoint must be another than endpoint")

    @property
    def is_publishing(self) -> bool:
        """True if events are published."""
        return self.enable_kv_cache_events and self.publisher != "null"


def is_bound(endpoint: str) -> bool:
    """Whether the endpoint is ours to bind; another is connected to."""
    return endpoint.startswith("ipc://") or "*" in endpoint or "::" in endpoint


def read_kv_events(text: str | Mapping[str, Any]) -> KvEventsConfig:
    """Read the option from JSON, or from a mapping.

    Raises:
        ValueError: It is no JSON object, has an unknown field, or a field has a wrong value.
    """
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        value = text
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a JSON object, as {_EXAMPLE}, got {shown(text)}")
    names = [field.name for field in dataclasses.fields(KvEventsConfig)]
    for name in value:
        if name not in names:
            raise ValueError(f"unknown field {shown(name)}{did_you_mean(str(name), names) or f'; known: {names}'}")
    given = {name: entry for name, entry in value.items() if entry is not None}
    return KvEventsConfig(**given)


def in_full(text: str) -> str | None:
    """The option as JSON with all fields, so that equal settings are equal texts; None if nothing is published."""
    if text.strip().lower() in ("none", "null"):
        return None
    config = read_kv_events(text)
    return json.dumps(dataclasses.asdict(config)) if config.is_publishing else None


def check_kv_events(text: str | None, *, has_prefix_cache: bool) -> None:
    """Check that the option can be read, and that there is a cache to tell of.

    Raises:
        ConfigError: One line that says what is wrong.
    """
    if text is None:
        return
    try:
        is_publishing = read_kv_events(text).is_publishing
    except ValueError as error:
        raise ConfigError(f"kv_events_config: {error}") from None
    if is_publishing and not has_prefix_cache:
        raise ConfigError("kv_events_config: without enable_prefix_caching there is nothing to publish")


def _check_endpoint(name: str, value: Any) -> None:
    found = _ENDPOINT.fullmatch(value) if isinstance(value, str) else None
    if found is None or not 0 < int(found["port"] or 1) < 2**16:
        raise ValueError(f"{name} must be tcp://HOST:PORT or ipc://PATH, as tcp://*:5557, got {shown(value)}")
