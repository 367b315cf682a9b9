"""/health is answered while everything else is busy."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from benchmarks.engine.front_end import load

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.request import SamplingParams
from nanoflow.server.app import create_app
from nanoflow.server.bodies import LONG_BODY_BYTES, decode
from nanoflow.server.listen import BACKLOG, bind, url
from tests.fake_async_engine import FakeAsyncEngine
from tests.slowness import slowness
from tests.toy_models import write_toy_model

MIB = 1 << 20
# Of the event loop's thread, so that neither other processes nor other threads count. Reading one of the bodies below
# in the loop takes several times as long.
MAX_TURN_S = 0.06


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_model(tmp_path_factory.mktemp("model")))


@asynccontextmanager
async def serving(model: str) -> AsyncIterator[tuple[AsyncEngine, str]]:
    """The fake engine and a server for it in this event loop, which have answered once."""
    engine = await AsyncEngine.start(EngineConfig(model=model), module="tests.fake_engine_process")
    server = uvicorn.Server(uvicorn.Config(create_app(engine, ServerConfig()), log_level="warning", backlog=BACKLOG))
    gc.collect()
    gc.freeze()  # as a server does: a full collection is no part of a turn
    try:
        with bind("127.0.0.1", 0)[0] as listener:
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(post, f"{url(listener)}/v1/completions", b'{"prompt": "hello"}')
            yield engine, url(listener)
            server.should_exit = True
            await task
    finally:
        gc.unfreeze()
        await engine.close()


async def longest_turn_s(stop: asyncio.Event) -> float:
    """Most CPU time that the loop's thread needed before a task that only waits had its turn again."""
    longest_s, last_s = 0.0, time.thread_time()
    while not stop.is_set():
        await asyncio.sleep(0.001)
        now_s = time.thread_time()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    return longest_s


def test_no_call_holds_the_event_loop_for_long(model: str) -> None:
    ids, text = [index % 300 for index in range(MIB // 2 - 8)], "hello world " * 20_000
    bodies: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/completions", {"prompt": ids}, 413),
        ("/v1/completions", {"prompt": [*ids, *ids]}, 413),
        ("/v1/completions", {"prompt": text}, 400),
        ("/v1/completions", {"prompt": ["hello world " * 80] * 128}, 400),
        ("/v1/completions", {"prompt": [*ids[:-1], "no token"]}, 413),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, 400),
        ("/tokenize", {"prompt": text}, 200),
        ("/detokenize", {"tokens": ids}, 413),
    ]

    async def run() -> tuple[list[int], float]:
        async with serving(model) as (engine, url):
            stop, statuses = asyncio.Event(), list[int]()
            streams = [asyncio.create_task(keep_streaming(engine, stop)) for _ in range(64)]
            turns = asyncio.create_task(longest_turn_s(stop))
            for path, body, _ in bodies:
                content = await asyncio.to_thread(msgspec.json.encode, body)
                statuses.append(await asyncio.to_thread(post, url + path, content))
            stop.set()
            await asyncio.gather(*streams)
            return statuses, await turns

    statuses, longest_s = asyncio.run(run())
    assert statuses == [status for *_, status in bodies]
    assert longest_s < MAX_TURN_S * slowness()


@pytest.mark.timing
def test_a_burst_does_not_hold_the_event_loop_for_long(model: str) -> None:
    """Calls that come, begin and end all at once are taken in, begun and ended a few at a time."""
    count = 600
    body = msgspec.json.encode({"prompt": [5, 6], "max_tokens": 8, "ignore_eos": True, "stream": True})

    async def run() -> tuple[float, float]:
        async with serving(model) as (_, url):
            stop, path = asyncio.Event(), f"{url}/v1/completions"
            turns = asyncio.create_task(longest_turn_s(stop))
            seen = await asyncio.to_thread(lambda: asyncio.run(load(path, body, count)))
            stop.set()
            return seen["num_chunks"], await turns

    # What holds the loop does so each time; another program that has the core for a moment does not.
    runs = [asyncio.run(run()) for _ in range(3)]
    assert all(num_chunks >= count for num_chunks, _ in runs)
    # Taken in all at once, 600 calls hold the loop for half a second and more.
    assert min(longest_s for _, longest_s in runs) < 2 * MAX_TURN_S * slowness()


def post(url: str, content: bytes) -> int:
    """Status of an answer."""
    return httpx.post(url, content=content, headers={"content-type": "application/json"}, timeout=120).status_code


async def keep_streaming(engine: AsyncEngine, stop: asyncio.Event) -> None:
    """Read one request's tokens after the other's."""
    while not stop.is_set():
        async for _ in engine.generate([5, 6], SamplingParams(max_tokens=200, ignore_eos=True)):
            if stop.is_set():
                return


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": [1, 2.5, -3e2, true, null, "\\u00e9\\n"], "a": {"b": []}}',
        b'{"a": NaN}',
        b'"\\ud800"',
        b"[" + b"9" * 400 + b"]",
        '"\N{GRINNING FACE}"'.encode("utf-16"),
        b"18446744073709551616",
    ],
)
def test_long_bodies_are_decoded_as_short_ones(content: bytes) -> None:
    assert repr(decode(content)) == repr(json.loads(content))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[1,]"])
def test_what_is_no_json_is_told_alike(content: bytes) -> None:
    with pytest.raises(ValueError) as slow:
        json.loads(content)
    with pytest.raises(ValueError) as fast:
        decode(content)
    assert str(fast.value) == str(slow.value)


def test_a_long_body_is_refused_as_a_short_one_is() -> None:
    app = create_app(FakeAsyncEngine(), ServerConfig())
    padding = " " * LONG_BODY_BYTES
    contents = (
        '{"prompt": ["a", 5]}',
        '{"prompt": "a", "temperature": "hot", "n": 0}',
        '{"prompt": "a", "best_of": 2}',
        '{"prompt": "a"',
        "[]",
        '{"prompt": "\\ud800"}',
    )

    async def run() -> list[tuple[Any, Any]]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"content-type": "application/json"}
            answers = [
                [await client.post("/v1/completions", content=text, headers=headers) for text in (one, one + padding)]
                for one in contents
            ]
        return [((short.status_code, short.json()), (long.status_code, long.json())) for short, long in answers]

    for short, long in asyncio.run(run()):
        assert short[0] == 400
        assert long == short
