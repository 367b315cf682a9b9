"""Hundreds of requests at once, a third of them cancelled midway: the others complete, and nothing is left behind."""

from __future__ import annotations

import asyncio
import re
import time

import httpx
import openai
import pytest

from tests.all_cases import RUNS_ALL_CASES
from tests.server_process import running_server

NUM_REQUESTS = 500 if RUNS_ALL_CASES else 200
MAX_TOKENS = 10
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


async def _complete(client: openai.AsyncOpenAI, place: int) -> int:
    """Stream one completion; every third one leaves after a few tokens. Returns the tokens of the whole ones."""
    stream = await client.completions.create(
        model="default",
        prompt=f"def function_{place}(" + "argument, " * (place % 40),
        max_tokens=MAX_TOKENS,
        temperature=0.8,
        seed=place,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    num_chunks = 0
    async for chunk in stream:
        num_chunks += 1
        if place % 3 == 0 and num_chunks == 1 + place % 7:
            await stream.close()
            return 0
        if chunk.usage is not None:
            return int(chunk.usage.completion_tokens)
    raise AssertionError("the stream ended without its usage")


def _gauges(text: str) -> list[float]:
    return [float(value) for name in GAUGES for value in re.findall(rf"^nanoflow:{name}{{.*}} (\S+)$", text, re.M)]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_hundreds_of_requests_a_third_cancelled() -> None:
    # A small cache makes the requests queue.
    with running_server(("default", "--num-pages", "600", "--max-model-len", "512")) as server:

        async def run_all() -> list[int]:
            limits = httpx.Limits(max_connections=None)
            async with (
                httpx.AsyncClient(limits=limits, timeout=200) as transport,
                openai.AsyncOpenAI(
                    base_url=f"{server.root_url}/v1", api_key="none", http_client=transport, max_retries=0
                ) as client,
            ):
                return await asyncio.gather(*(_complete(client, place) for place in range(NUM_REQUESTS)))

        counts = asyncio.run(run_all())
        whole = [count for place, count in enumerate(counts) if place % 3]
        assert whole == [MAX_TOKENS] * len(whole)
        deadline_s = time.monotonic() + 15
        while any(_gauges(httpx.get(f"{server.root_url}/metrics").text)):
            assert time.monotonic() < deadline_s, "gauges did not return to 0"
            time.sleep(0.1)
        assert len(_gauges(httpx.get(f"{server.root_url}/metrics").text)) == len(GAUGES)
        assert httpx.get(f"{server.root_url}/health").status_code == 200
