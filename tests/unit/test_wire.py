"""Messages between the engine and its front ends as bytes: what is read back, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import msgspec
import pytest
from zmq.constants import DEALER, ROUTING_ID
from zmq.sugar.context import Context

from nanoflow.config import EngineConfig
from nanoflow.engine.channel import Channel
from nanoflow.engine.messages import (
    Abort,
    Add,
    EngineStats,
    Failed,
    FromEngine,
    Heartbeat,
    Join,
    Leave,
    Load,
    PlaceLogprobs,
    Prefetch,
    PrefetchCounts,
    Prefetched,
    Ready,
    ResetPrefixCache,
    Shutdown,
    StepOutput,
    ToEngine,
    Told,
)
from nanoflow.engine.place import EnginePlace
from nanoflow.engine.wire import Unreadable, WireError, decode_from_engine, decode_to_engine, encode
from nanoflow.kvcache.tier_counts import TierCounts
from nanoflow.outputs import Finished, FinishReason
from nanoflow.request import Request, SamplingParams
from tests.fake_engine import fake_facts

PARAMS = SamplingParams(max_tokens=4, stop=["\n"], logit_bias={5: -1.0}, seed=1 << 63)
REQUEST = Request(
    request_id=7, prompt_token_ids=[5, 6], params=PARAMS, seed=3, max_tokens=4, bad_word_ids=((1, 2),), priority="batch"
)
SCORES = PlaceLogprobs(first_position=2, token_ids=[[1, 2]], logprobs=[[-0.5, -math.inf]], ranks=[1])
STATS = EngineStats(
    num_running=3, iteration=9, plan_digest="ab", tiers={"device": TierCounts(hits=5, load_seconds=0.5)}
)
STEP = StepOutput(
    request_ids=[7, 7, 1 << 62],
    token_ids=[5, 6, 7],
    finished={
        7: Finished(reason=FinishReason.STOP, stop_token_id=6),
        8: Finished(reason=FinishReason.ERROR, error="x"),
    },
    logprobs={7: SCORES},
    prompt_logprobs={9: SCORES},
    scheduled={7: 16},
    preempted=[9],
    stats=STATS,
)
DOWN: list[ToEngine] = [
    Load(config=EngineConfig(model="there", seed=5)),
    Join(),
    Prefetch(number=3, page_keys=b"k" * 64, num_tokens=17, session=None),
    Prefetch(number=4, session="a"),
    Leave(front_end=3),
    Add.of([REQUEST, REQUEST]),
    ResetPrefixCache(),
    Abort(request_ids=[7, 8]),
    Shutdown(),
]
UP: list[FromEngine] = [
    Prefetched(number=3, found=PrefetchCounts(num_tokens=17, num_cached_tokens=16, num_prefetched_tokens=0)),
    Prefetched(number=4, found=None),
    Ready(facts=fake_facts()),
    Failed(message="no"),
    Told(level=20, text="loading"),
    Heartbeat(stats=STATS),
    STEP,
    StepOutput(),
]


def _packed(*parts: Any) -> bytes:
    return msgspec.msgpack.encode(parts)


@pytest.mark.parametrize("message", DOWN, ids=lambda message: type(message).__name__)
def test_the_engine_reads_what_a_front_end_sends(message: ToEngine) -> None:
    assert decode_to_engine(encode(message)) == message


@pytest.mark.parametrize("message", UP, ids=lambda message: type(message).__name__)
def test_a_front_end_reads_what_the_engine_sends(message: FromEngine) -> None:
    assert decode_from_engine(encode(message)) == message


def test_every_message_is_tried_here() -> None:
    assert {type(message) for message in DOWN} == set(ToEngine.__args__)
    assert {type(message) for message in UP} == set(FromEngine.__args__)


@pytest.mark.parametrize("message", [*DOWN, *UP], ids=lambda message: type(message).__name__)
def test_a_message_of_the_other_direction_is_refused(message: Any) -> None:
    decode = decode_to_engine if message in UP else decode_from_engine
    with pytest.raises(WireError, match="cannot be read: Invalid value"):
        decode(encode(message))


@pytest.mark.parametrize("message", [*DOWN, *UP], ids=lambda message: type(message).__name__)
def test_a_message_that_is_cut_off_or_goes_on_is_refused(message: Any) -> None:
    decode = decode_to_engine if message in DOWN else decode_from_engine
    whole = encode(message)
    for part in (b"", whole[:-1], whole + b"\xc0"):
        with pytest.raises(WireError, match="cannot be read"):
            decode(part)


@pytest.mark.parametrize(
    "message",
    [
        b"\xc1",
        _packed(),
        _packed("Unknown"),
        _packed("Heartbeat"),
        _packed("Heartbeat", {"num_running": "many"}),
        _packed("Heartbeat", {}, 1),
        _packed("Told", 20, 5),
        b"\x93\xa4Told\x14\xa1\xff",
        msgspec.msgpack.encode({"type": "Heartbeat", "stats": {}}),
    ],
)
def test_bytes_that_are_no_message_of_the_engine_are_refused(message: bytes) -> None:
    with pytest.raises(WireError):
        decode_from_engine(message)


@pytest.mark.parametrize(
    "message",
    [
        b"\xc1",
        _packed("Add"),
        _packed("Add", []) + b"\xc1",
        _packed("Add", {}),
        _packed("Add", [{}]),
        _packed("Add", [{"request_id": "seven"}]),
        _packed("Add", [[7]]),
        _packed("Abort", {}),
        _packed("Abort", [{"request_id": 7}]),
        _packed("Join", 1),
    ],
)
def test_what_names_no_request_is_no_message_to_the_engine(message: bytes) -> None:
    with pytest.raises(WireError):
        decode_to_engine(message)


def test_an_add_that_does_not_fit_names_its_requests_and_what_is_wrong() -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(REQUEST))
    message = decode_to_engine(_packed("Add", [fields | {"request_id": 9}, fields | {"seed": "x"}], [5, 6]))
    assert isinstance(message, Unreadable) and message.request_ids == [9, 7]
    assert message.error == "a message cannot be read: Expected `int`, got `str` - at `$[1][1].seed`"


@pytest.mark.parametrize(
    ("front_end", "frames", "is_message"),
    [
        (b"3", [encode(Join())], True),
        (b"three", [encode(Join())], False),
        (b"3", [encode(Join()), b""], False),
        (b"3", [b"Join"], False),
    ],
)
def test_a_socket_gives_messages_of_numbered_front_ends_alone(
    front_end: bytes, frames: list[bytes], is_message: bool
) -> None:
    place = EnginePlace()
    # A channel closes its descriptor.
    channel, context = Channel(os.dup(place.listener)), Context()
    try:
        socket = context.socket(DEALER)
        socket.setsockopt(ROUTING_ID, front_end)
        socket.connect(f"ipc://{place.path}")
        socket.send_multipart(frames)
        if is_message:
            assert channel.receive(10.0) == [(3, Join())]
        else:
            with pytest.raises(WireError):
                channel.receive(10.0)
    finally:
        context.destroy(linger=0)
        channel.close()
        place.close()


def test_requests_of_one_prompt_are_the_same_after_the_way() -> None:
    requests = [dataclasses.replace(REQUEST, request_id=number, page_keys=b"key") for number in (7, 8)]
    message = decode_to_engine(encode(Add.of(requests)))
    assert isinstance(message, Add) and message.whole() == requests
    one, two = message.whole()
    assert one.prompt_token_ids is two.prompt_token_ids
    long = [dataclasses.replace(request, prompt_token_ids=[5] * 10_000) for request in requests]
    assert len(encode(Add.of(long))) < 1.3 * len(encode(Add.of(long[:1])))
