"""What would be too much in the server is refused, and what has ended makes room again."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
from typing import Any

import httpx
import pytest
from benchmarks.common.stub_facts import stub_facts

from nanoflow.bounds import ServerBounds
from nanoflow.config import ServerConfig
from nanoflow.priorities import BATCH, Priority
from nanoflow.server.admission import Admission, Ledger
from nanoflow.server.app import create_app
from nanoflow.server.counters import Counters, shared_rows
from nanoflow.server.errors import ApiError
from nanoflow.server.inside import InsideCalls
from tests.fake_async_engine import FakeAsyncEngine


def admission(ledger: Ledger, **bounds: Any) -> Admission:
    facts = dataclasses.replace(stub_facts(), max_num_seqs=4)
    return Admission(bounds=ServerBounds(**bounds), facts=facts, ledger=ledger)


def test_rooms_are_counted_until_they_end() -> None:
    ledger = Ledger()
    door = admission(ledger, max_queued_requests=6, max_queued_tokens=100)
    with door.room(7, 50):
        with pytest.raises(ApiError) as caught:
            door.check(4)
        assert caught.value.status == 429
        assert caught.value.headers == {"retry-after": "1"}
        assert "10" in caught.value.message
        with pytest.raises(ApiError, match="tokens of prompts") as caught, door.room(0, 51):
            pass
        assert caught.value.status == 429
        with door.room(3, 50):
            assert ledger.total() == (10, 100)
    assert ledger.total() == (0, 0)
    door.check(10, 100)


def test_calls_of_priority_batch_leave_half_of_the_room_to_others() -> None:
    door = admission(Ledger(), max_queued_requests=6, max_queued_tokens=100)
    with door.room(4, 40, is_background=True), door.room(1, is_background=True):
        for more in ((1, 0), (0, 11)):
            with pytest.raises(ApiError, match="no room"):
                door.check(*more, is_background=True)
        door.check(5, 60)


@pytest.mark.parametrize("is_background", [False, True])
def test_a_call_for_which_there_never_will_be_room_is_not_told_to_try_again(is_background: bool) -> None:
    door = admission(Ledger(), max_queued_requests=6, max_queued_tokens=100)
    part = 2 if is_background else 1
    door.check(10 // part, 100 // part, is_background=is_background)
    for more in ((10 // part + 1, 0), (0, 100 // part + 1)):
        with pytest.raises(ApiError, match="and the server takes at most") as caught:
            door.check(*more, is_background=is_background)
        assert (caught.value.status, caught.value.headers) == (400, None)


def test_all_processes_count_and_dead_ones_do_not() -> None:
    with shared_rows(3) as file:
        ledger = Ledger(Counters(file, 0))
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        counters = Counters(file, 1)
        counters.own(counters.take(3))[:] = (other.pid, 9, 70)
        try:
            ledger.add(1, 5)
            assert ledger.total() == (10, 75)
            with pytest.raises(ApiError):
                admission(ledger, max_queued_requests=6).check(1)
        finally:
            other.kill()
            other.wait()
        assert ledger.total() == (1, 5)
        assert Ledger(Counters(file, 0)).total() == (
            0,
            0,
        )  # in the place of one that died while it had let something in


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_a_full_server_refuses_before_the_engine_hears_of_it(stream: bool, chat: bool) -> None:
    engine = FakeAsyncEngine(step_s=0.02)
    room = 4
    engine.facts = dataclasses.replace(engine.facts, max_num_seqs=room)
    app = create_app(engine, ServerConfig(max_queued_requests=0))
    asked = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    asked["max_tokens"] = 2  # type: ignore[assignment]
    path = "/v1/chat/completions" if chat else "/v1/completions"

    async def run() -> tuple[httpx.Response, int, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            first = asyncio.create_task(client.post("/v1/completions", json={"prompt": ["a"] * room, "max_tokens": 30}))
            while engine.num_running < room:
                await asyncio.sleep(0.005)
            num_seen = len(engine.seen_params)
            refused = await client.post(path, json={**asked, "stream": stream})
            num_new = len(engine.seen_params) - num_seen
            assert (await first).status_code == 200
            return refused, num_new, await client.post(path, json={**asked, "stream": stream})

    refused, num_new, later = asyncio.run(run())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "overloaded"
    assert num_new == 0
    assert later.status_code == 200


def test_tokens_of_prompts_count_once_a_completion() -> None:
    app = create_app(FakeAsyncEngine(), ServerConfig(max_queued_tokens=40))

    async def run() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            bodies = ({"prompt": [1] * 10, "n": 4}, {"prompt": [1] * 11, "n": 4}, {"prompt": [[1] * 10] * 5})
            return [(await client.post("/v1/completions", json=body)).status_code for body in bodies]

    assert asyncio.run(run()) == [200, 400, 400]


@pytest.mark.parametrize("chat", [False, True])
def test_a_call_may_not_take_for_ever(chat: bool) -> None:
    engine = FakeAsyncEngine(step_s=0.05)
    app = create_app(engine, ServerConfig(request_timeout_s=0.3))
    asked = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    path = "/v1/chat/completions" if chat else "/v1/completions"

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [
                await client.post(path, json={**asked, "max_tokens": 100, "ignore_eos": True, "stream": stream})
                for stream in (False, True)
            ]

    whole, stream = asyncio.run(run())
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    assert stream.status_code == 200
    assert '"code":"timeout"' in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    assert (engine.num_running, engine.num_closed) == (0, 2)


def test_calls_of_batches_may_take_as_long_as_they_do() -> None:
    app = create_app(FakeAsyncEngine(step_s=0.05), ServerConfig(request_timeout_s=0.1))
    body = b'{"prompt": "a", "max_tokens": 5, "ignore_eos": true}'

    async def run(priority: Priority) -> int:
        return (await InsideCalls(app, priority=priority).post("/v1/completions", body)).status_code

    assert asyncio.run(run(BATCH)) == 200
    assert asyncio.run(run(0)) == 504
