"""KV events as subscribers get them: their bytes, their numbers, and what is replayed."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from zmq.constants import DEALER, RCVTIMEO, REQ, SUB, SUBSCRIBE
from zmq.error import Again
from zmq.sugar.context import Context

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.kv_event_wire import KvEventEncoder
from nanoflow.engine.kv_publisher import KvPublisher, NoPublisher, publishing
from nanoflow.kv_events import KvEventsConfig, in_full, read_kv_events
from nanoflow.kvcache.events import DISK, HOST, AllCleared, KeyEvent, PagesRemoved, PagesStored
from nanoflow.option_names import from_kwargs

KEYS = tuple(bytes([number]) * 24 + number.to_bytes(8, "big") for number in range(1, 9))
END = (2**64 - 1).to_bytes(8, "big")


def stored(*keys: bytes, before: bytes | None = None, medium: str = "GPU") -> PagesStored:
    return PagesStored(keys=keys, before=before, token_ids=np.arange(2 * len(keys), dtype=np.int32), medium=medium)


def decoded(*events: KeyEvent, **config: Any) -> Any:
    return msgspec.msgpack.decode(KvEventEncoder(KvEventsConfig(**config)).encode(events, 12.5))


@dataclass
class Subscriber:
    """The sockets of a router; every message is [number, events]."""

    config: KvEventsConfig
    context: Any = field(default_factory=Context)

    def __post_init__(self) -> None:
        self.sub = self.context.socket(SUB)
        self.sub.setsockopt(SUBSCRIBE, self.config.topic.encode())
        self.sub.setsockopt(RCVTIMEO, 5000)
        self.sub.connect(self.config.endpoint)
        self.replay = self.context.socket(DEALER)
        self.replay.setsockopt(RCVTIMEO, 5000)
        if self.config.replay_endpoint is not None:
            self.replay.connect(self.config.replay_endpoint)

    def wait(self, publisher: KvPublisher) -> None:
        """Publish until something arrives: a subscription takes a while to reach the publisher."""
        self.sub.setsockopt(RCVTIMEO, 20)
        for number in range(500):
            publisher.put(PagesRemoved(keys=(b"probe %d" % number,)))
            try:
                self.next()
            except Again:
                continue
            self.sub.setsockopt(RCVTIMEO, 300)
            while True:
                try:
                    self.next()
                except Again:
                    self.sub.setsockopt(RCVTIMEO, 5000)
                    return
        raise AssertionError("nothing arrives")

    def next(self) -> tuple[int, list[Any]]:
        topic, number, batch = self.sub.recv_multipart()
        assert topic == self.config.topic.encode() and len(number) == 8
        time_s, events, rank = msgspec.msgpack.decode(batch)
        assert abs(time.time() - time_s) < 60 and rank == 0
        return int.from_bytes(number, "big"), events

    def replayed(self, first: int, *, is_bare: bool = False) -> list[tuple[int, list[Any]]]:
        """Everything from a number on; a bare request has no empty frame before it, as that of AIBrix."""
        self.replay.send_multipart([first.to_bytes(8, "big")] if is_bare else [b"", first.to_bytes(8, "big")])
        found: list[tuple[int, list[Any]]] = []
        while True:
            *envelope, number, batch = self.replay.recv_multipart()
            assert envelope == ([] if is_bare else [b""])
            if not batch:
                assert number == END
                return found
            found.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(batch)[1]))

    def close(self) -> None:
        self.context.destroy(linger=0)


@contextmanager
def published(folder: Path, **config: Any) -> Iterator[tuple[KvPublisher, Subscriber]]:
    given = KvEventsConfig(
        enable_kv_cache_events=True,
        endpoint=f"ipc://{folder}/events",
        replay_endpoint=f"ipc://{folder}/replay",
        **config,
    )
    publisher, subscriber = KvPublisher(given), Subscriber(given)
    try:
        yield publisher, subscriber
    finally:
        publisher.close()
        subscriber.close()


def test_events_have_the_form_that_routers_read() -> None:
    """Positions as in vLLM 0.10 to 0.23, which routers that know no names read."""
    events = (stored(KEYS[0], KEYS[1]), stored(KEYS[2], before=KEYS[1]), PagesRemoved(keys=KEYS[:1]), AllCleared())
    assert decoded(*events) == [
        12.5,
        [
            ["BlockStored", [1, 2], None, [0, 1, 2, 3], 2, None, "GPU", None],
            ["BlockStored", [3], 2, [0, 1], 2, None, "GPU", None],
            ["BlockRemoved", [1], "GPU"],
            ["AllBlocksCleared"],
        ],
        0,
    ]


def test_events_may_be_maps() -> None:
    """Names as in vLLM since 0.24."""
    assert decoded(stored(KEYS[2], before=KEYS[1]), AllCleared(), event_format="map")[1] == [
        {
            "type": "BlockStored",
            "block_hashes": [3],
            "parent_block_hash": 2,
            "token_ids": [0, 1],
            "block_size": 2,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        },
        {"type": "AllBlocksCleared"},
    ]


def test_pages_of_a_lower_tier_need_no_tokens() -> None:
    """A router knows them from the time when the device had them (llm-d adds the place to what it has)."""
    event = PagesStored(keys=KEYS[:2], before=None, token_ids=np.zeros(0, dtype=np.int32), medium=HOST)
    assert decoded(event)[1] == [["BlockStored", [1, 2], None, [], 0, None, "CPU", None]]


def test_keys_may_be_sent_whole() -> None:
    (event,) = decoded(stored(KEYS[2], before=KEYS[1]), block_hash_format="bytes")[1]
    assert event[1:3] == [[KEYS[2]], KEYS[1]]


def test_the_number_of_a_key_is_its_last_64_bits() -> None:
    key = bytes(range(200, 232))
    (event,) = decoded(PagesRemoved(keys=(key,)))[1]
    assert event[1] == [int.from_bytes(key, "big") & (2**64 - 1)]


def test_removals_one_after_the_other_are_one_event() -> None:
    gone = [PagesRemoved(keys=(key,)) for key in KEYS[:3]]
    lower = [PagesRemoved(keys=(KEYS[5],), medium=HOST), PagesRemoved(keys=(KEYS[5],), medium=DISK)]
    events = decoded(*gone, *lower, stored(KEYS[6], medium=HOST), gone[0])[1]
    removed = [([1, 2, 3], "GPU"), ([6], "CPU"), ([6], "DISK")]
    assert events[:3] == [["BlockRemoved", hashes, medium] for hashes, medium in removed]
    assert events[3][6] == "CPU" and events[4] == ["BlockRemoved", [1], "GPU"]


def test_batches_are_numbered_and_can_be_replayed(tmp_path: Path) -> None:
    with published(tmp_path, topic="kv@pod@model") as (publisher, subscriber):
        subscriber.wait(publisher)
        seen = []
        for key in KEYS:
            publisher.put(stored(key))
            seen.append(subscriber.next())
        numbers = [number for number, _ in seen]
        assert numbers == list(range(numbers[0], numbers[0] + len(KEYS)))
        assert [events[0][1] for _, events in seen] == [[number] for number in range(1, 9)]
        every = subscriber.replayed(0)
        assert [number for number, _ in every] == list(range(numbers[-1] + 1))
        assert every[0][1][0] == ["AllBlocksCleared"], "what a subscriber knew of an earlier engine is gone"
        assert every[-len(KEYS) :] == seen
        assert subscriber.replayed(numbers[3]) == seen[3:] == subscriber.replayed(numbers[3], is_bare=True)
        assert subscriber.replayed(numbers[-1] + 1) == []


def test_the_last_batches_are_kept(tmp_path: Path) -> None:
    with published(tmp_path, buffer_steps=3) as (publisher, subscriber):
        subscriber.wait(publisher)
        seen = []
        for key in KEYS:
            publisher.put(stored(key))
            seen.append(subscriber.next())
        assert subscriber.replayed(0) == seen[-3:]


def test_a_wrong_request_to_replay_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with published(tmp_path) as (publisher, subscriber):
        publisher.put(stored(KEYS[0]))
        subscriber.replay.send_multipart([b"", b"what?"])
        while not subscriber.replayed(1):
            time.sleep(0.01)
    assert "has 5 bytes instead of 8" in caplog.text


def test_a_client_of_zeromqs_request_kind_is_answered(tmp_path: Path) -> None:
    """vLLM's example of a subscriber uses one."""
    with published(tmp_path) as (_, subscriber):
        client = subscriber.context.socket(REQ)
        client.setsockopt(RCVTIMEO, 5000)
        client.connect(subscriber.config.replay_endpoint)
        client.send((0).to_bytes(8, "big"))
        number, batch = client.recv_multipart()
        assert number == bytes(8) and msgspec.msgpack.decode(batch)[1] == [["AllBlocksCleared"]]


def test_what_waits_is_published_before_the_end(tmp_path: Path) -> None:
    with published(tmp_path) as (publisher, subscriber):
        subscriber.wait(publisher)
        for number in range(5000):
            publisher.put(stored(number.to_bytes(32, "big")))
        publisher.close()
        hashes: list[int] = []
        assert not any(thread.is_alive() for thread in publisher._threads)
        while len(hashes) < 5000:
            hashes += [event[1][0] for event in subscriber.next()[1]]
        assert hashes == list(range(5000))


def test_a_batch_has_an_end(tmp_path: Path) -> None:
    """The thread is held back, so that everything waits at once."""
    with published(tmp_path) as (publisher, subscriber):
        subscriber.wait(publisher)
        with publisher._lock:
            for number in range(3000):
                publisher.put(stored(number.to_bytes(32, "big")))
        sizes: list[int] = []
        while sum(sizes) < 3000:
            sizes.append(len(subscriber.next()[1]))
        assert max(sizes) == 1024


def test_lost_events_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The thread is held back, so that more waits than may."""
    with published(tmp_path, max_queue_size=4) as (publisher, subscriber):
        subscriber.wait(publisher)
        with publisher._lock:
            publisher.put(stored(KEYS[0]))
            while publisher._waiting.qsize():
                time.sleep(0.001)
            for number in range(10):
                publisher.put(stored(b"%d" % number * 32))
        assert subscriber.next()[1][0][1] == [1]
        assert len(subscriber.next()[1]) == 4
        publisher.put(stored(KEYS[1]))
        assert [event[0] for event in subscriber.next()[1]] == ["AllBlocksCleared", "BlockStored"]
    assert "6 KV events were lost" in caplog.text


@pytest.mark.timing
def test_the_loop_does_not_wait_for_subscribers(tmp_path: Path) -> None:
    with published(tmp_path, hwm=2, max_queue_size=100_000) as (publisher, subscriber):
        subscriber.wait(publisher)
        start_s = time.perf_counter()
        for number in range(20_000):
            publisher.put(stored(number.to_bytes(32, "big")))
        assert time.perf_counter() - start_s < 2.0


def test_an_endpoint_that_is_taken_is_named(tmp_path: Path) -> None:
    nowhere = json.dumps({"enable_kv_cache_events": True, "endpoint": f"ipc://{tmp_path}/no/folder"})
    with pytest.raises(ConfigError, match=r"kv_events_config: ipc:.*no/folder cannot be opened: "), publishing(nowhere):
        pass
    port = _free_port()
    text = json.dumps({"enable_kv_cache_events": True, "endpoint": f"tcp://*:{port}"})
    with publishing(text) as publisher:
        pass
    with pytest.raises(ConfigError, match=f":{port} cannot be opened: Address already in use; give"), publishing(text):
        pass
    publisher.close()


def test_a_failed_start_gives_the_endpoint_back() -> None:
    text = json.dumps({"enable_kv_cache_events": True, "endpoint": f"tcp://*:{_free_port()}"})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no weights"), publishing(text):
            raise RuntimeError("no weights")


def test_off_costs_nothing() -> None:
    num_threads = threading.active_count()
    for text in (None, '{"enable_kv_cache_events": false}', '{"enable_kv_cache_events": true, "publisher": "null"}'):
        with publishing(text) as publisher:
            assert isinstance(publisher, NoPublisher) and publisher.put is None
    assert threading.active_count() == num_threads


def test_the_option_is_vllms() -> None:
    """As JSON on the command line and as a mapping in Python; what publishes nothing is as if it were not given."""
    given = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:5557", "topic": "kv@a@b"}
    text = from_kwargs(EngineConfig, {"kv_events_config": given}).kv_events_config
    assert text is not None and text == in_full(json.dumps(given))
    config = read_kv_events(text)
    assert config == KvEventsConfig(**given) and config.is_publishing  # type: ignore[arg-type]
    assert (config.buffer_steps, config.hwm, config.max_queue_size) == (10_000, 100_000, 100_000)
    assert in_full("{}") is in_full("null") is in_full('{"endpoint": "tcp://*:1"}') is None
    assert from_kwargs(EngineConfig, {"kv_events_config": None}).kv_events_config is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("on", "must be a JSON object, as .*tcp://"),
        ("[1]", "must be a JSON object"),
        ('{"endpiont": "tcp://*:1"}', "unknown field 'endpiont'; did you mean 'endpoint'"),
        ('{"enable_kv_cache_events": 1}', "enable_kv_cache_events must be true or false, got 1"),
        ('{"publisher": "kafka"}', "publisher must be zmq or null, got 'kafka'"),
        ('{"event_format": "json"}', "event_format must be array or map"),
        ('{"block_hash_format": 5}', "block_hash_format must be int or bytes, got 5"),
        ('{"endpoint": "5557"}', "endpoint must be tcp://HOST:PORT or ipc://PATH"),
        ('{"endpoint": "tcp://*:0"}', "endpoint must be tcp://HOST:PORT"),
        ('{"endpoint": "tcp://*:65536"}', "endpoint must be tcp://HOST:PORT"),
        ('{"replay_endpoint": 5}', "replay_endpoint must be tcp://HOST:PORT"),
        ('{"replay_endpoint": "tcp://*:5557"}', "replay_endpoint must be another than endpoint"),
        ('{"buffer_steps": 0}', "buffer_steps must be a whole number from 1, got 0"),
        ('{"hwm": true}', "hwm must be a whole number from 1"),
        ('{"max_queue_size": 1.5}', "max_queue_size must be a whole number from 1"),
        ('{"topic": 1}', "topic must be a string, got 1"),
    ],
)
def test_a_wrong_option_is_refused_with_a_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"kv_events_config: {message}") as refusal:
        from_kwargs(EngineConfig, {"kv_events_config": text})
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match=f"kv_events_config: {message}"):
        EngineConfig(kv_events_config=text)


def test_events_need_the_prefix_cache() -> None:
    text = '{"enable_kv_cache_events": true}'
    with pytest.raises(ConfigError, match="kv_events_config: without enable_prefix_caching there is nothing"):
        EngineConfig(kv_events_config=text, enable_prefix_caching=False)
    assert EngineConfig(enable_prefix_caching=False).kv_events_config is None


@pytest.mark.parametrize("value", [-1, 1.5, True, "5"])
def test_a_wrong_number_of_sessions_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_sessions must be a whole number from 0"):
        EngineConfig(max_sessions=value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        port: int = probe.getsockname()[1]
        return port
