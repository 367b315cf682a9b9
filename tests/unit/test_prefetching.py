"""Advice of a front end: each call gets its own answer, and none waits for an engine that has died."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.messages import Prefetch, PrefetchCounts, Prefetched
from nanoflow.engine.prefetching import Prefetching
from nanoflow.engine.prompts import Prompt, read_prompt
from nanoflow.kvcache.keys import page_keys, root_key
from nanoflow.request import RequestError
from tests.fake_engine import MAX_MODEL_LEN, fake_facts

FACTS = fake_facts()


def counts(num_tokens: int) -> PrefetchCounts:
    return PrefetchCounts(num_tokens=num_tokens, num_cached_tokens=0, num_prefetched_tokens=0)


def prompt(*token_ids: int, **names: Any) -> Prompt:
    return Prompt(text=None, token_ids=list(token_ids), **names)


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_each_gets_its_own_answer() -> None:
    async def run() -> None:
        sent: list[Prefetch] = []
        asking = Prefetching(sent.append, FACTS)
        first = asyncio.ensure_future(asking.of_prompt(prompt(1, 2, 3)))
        second = asyncio.ensure_future(asking.of_session("talk"))
        gone = asyncio.ensure_future(asking.of_session("gone"))
        await turns()
        assert [(one.num_tokens, one.session) for one in sent] == [(3, None), (0, "talk"), (0, "gone")]
        gone.cancel()
        for one, found in zip(reversed(sent), (None, None, counts(3)), strict=True):
            asking.take(Prefetched(number=one.number, found=found))
        assert await first == counts(3) and await second is None
        assert not asking._waiting

    asyncio.run(run())


def test_keys_are_those_of_a_request_with_the_prompt() -> None:
    async def run() -> None:
        sent: list[Prefetch] = []
        asking = Prefetching(sent.append, FACTS)
        tokens = list(range(3 * FACTS.page_size))
        waiting = asyncio.ensure_future(asking.of_prompt(prompt(*tokens, cache_salt="mine")))
        await turns()
        root = root_key("mine")
        expected = b"".join((root, *page_keys(tokens, FACTS.page_size, root)))
        assert sent[0].page_keys == (expected if FACTS.has_prefix_cache else b"")
        waiting.cancel()

    asyncio.run(run())


def test_an_engine_that_dies_leaves_nobody_waiting() -> None:
    async def run() -> None:
        asking = Prefetching(lambda _message: None, FACTS)
        waiting = [asyncio.ensure_future(asking.of_session(str(number))) for number in range(3)]
        await turns()
        asking.die("it was killed")
        for one in waiting:
            with pytest.raises(EngineDeadError, match="it was killed"):
                await one
        assert not asking._waiting

    asyncio.run(run())


def test_a_prompt_that_no_request_could_have_is_refused() -> None:
    asking = Prefetching(lambda _message: None, FACTS)
    for wrong, message in (
        ((), "at least one token|empty|no tokens"),
        ((5,) * MAX_MODEL_LEN, "maximum context length"),
    ):
        with pytest.raises(RequestError, match=message):
            asyncio.run(asking.of_prompt(prompt(*wrong)))


def test_a_mapping_may_name_a_session() -> None:
    named = read_prompt({"prompt_token_ids": [5, 6], "session_id": "talk", "cache_salt": None}, None)
    assert (named.session_id, named.cache_salt) == ("talk", None)
    for wrong in ("", 5):
        with pytest.raises(RequestError, match="session_id is a string that is not empty"):
            read_prompt({"prompt_token_ids": [5, 6], "session_id": wrong}, None)
