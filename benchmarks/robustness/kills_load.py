"""The load of `kills.py`: clients that send requests all the time, and how their requests end."""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import httpx

NUM_CLIENTS = 6
# A request that has not ended after so long hangs; servers and clients may share few cores with others.
REQUEST_BOUND_S = 120.0
_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended.

    Attributes:
        kind: "answered" completely; "told" of an error by the server; "broken off" without a message; "refused", as
            nothing listened; "hangs"; or "cut short": it looked complete and was not.
        end_s: Time of the end.
        detail: More, as text.
    """

    kind: str
    end_s: float
    detail: str = ""


class Load:
    """Clients of one server.

    Args:
        url: Root URL of the server, without /v1.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._ended: list[Outcome] = []
        self._clients: list[asyncio.Task[None]] = []
        self._is_on = False

    @property
    def is_running(self) -> bool:
        """True while clients send requests."""
        return self._is_on

    def start(self) -> None:
        """Let all clients send requests, one after the other."""
        self._is_on = True
        self._clients = [asyncio.create_task(self._ask_on()) for _ in range(NUM_CLIENTS)]

    async def pause(self) -> None:
        """Send no new requests, and wait for the open ones."""
        self._is_on = False
        await asyncio.gather(*self._clients)
        self._clients = []

    stop = pause

    def take(self) -> list[Outcome]:
        """Requests that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    async def _ask_on(self) -> None:
        while self._is_on:
            outcome = await self._ask()
            self._ended.append(outcome)
            if outcome.kind != "answered":
                await asyncio.sleep(_PAUSE_S)

    async def _ask(self) -> Outcome:
        is_stream = random.random() < 0.7
        body = {
            "prompt": "def add(first, second):",
            "max_tokens": random.choice((8, 64, 400)),
            "ignore_eos": True,
            "stream": is_stream,
        }
        kind, detail = "hangs", f"after {REQUEST_BOUND_S:.0f} s"
        try:
            async with asyncio.timeout(REQUEST_BOUND_S), httpx.AsyncClient(timeout=None) as client:
                kind, detail = await _complete(client, self.url, body, is_stream=is_stream)
        except TimeoutError:
            pass
        except httpx.ConnectError as error:
            kind, detail = "refused", str(error)
        except httpx.HTTPError as error:
            kind, detail = "broken off", f"{type(error).__name__}: {error}"
        return Outcome(kind=kind, end_s=time.monotonic(), detail=detail)


async def _complete(client: httpx.AsyncClient, url: str, body: dict[str, Any], *, is_stream: bool) -> tuple[str, str]:
    """Send a request, and say how it ended."""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != httpx.codes.OK or not is_stream:
            return _judge(answer.status_code, await answer.aread(), body["max_tokens"])
        last, has_error, has_end = "", "", False
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and "error" in (event := json.loads(line[6:])):
                has_error = event["error"]["message"]
            elif line.startswith("data: {"):
                has_end |= event["choices"][0]["finish_reason"] is not None
            last = line or last
    if last != "data: [DONE]":
        return "cut short", f"the stream ended with {last[:80]!r}"
    if has_error:
        return "told", has_error
    return ("answered", "") if has_end else ("cut short", "the stream has no finish reason")


def _judge(status: int, body: bytes, max_tokens: int) -> tuple[str, str]:
    try:
        answer = json.loads(body)
    except ValueError:
        return "no JSON", f"status {status}: {body[:80]!r}"
    if status != httpx.codes.OK:
        return "told", answer["error"]["message"]
    num_tokens = answer["usage"]["completion_tokens"]
    return ("answered", "") if num_tokens == max_tokens else ("cut short", f"{num_tokens} of {max_tokens} tokens")


def is_healthy(url: str) -> bool:
    """Whether /health says that the server is well."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == httpx.codes.OK)
    except (OSError, urllib.error.URLError):
        return False
