"""Load on an OpenAI-compatible server, nanoflow's or another's: requests arrive over time and stream their tokens.

A request is sent at its drawn time; with `max_concurrency` it waits until fewer than that many are in flight. A failed
request is counted with its reason and does not affect others. `client.py` sends and receives bytes; `clients.py` shares
requests among processes; `served.py` asks a server about itself; `offline.py` runs the same workloads in process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import msgspec

from nanoflow.bench.client import (
    Address,
    Answer,
    ExchangeFailed,
    Pieces,
    exchange,
    post,
    read_address,
    read_answer,
    read_events,
)
from nanoflow.bench.options import BenchConfig, LoadConfig
from nanoflow.run_metrics import RequestRecord
from nanoflow.workload import BenchRequest

# Short words that are one token each, with the space before, in most vocabularies.
_WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "are", "as", "with", "his", "they")


class RequestFailed(Exception):
    """The server did not complete a request; the message is one line that says why."""


class _Message(msgspec.Struct):
    content: str | None = None
    role: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None
    delta: _Message | None = None
    token_ids: list[int] | None = None

    @property
    def has_tokens(self) -> bool:
        """False for an event that only names the role of a message or why the completion ended."""
        if self.delta is None:
            return bool(self.text) or self.finish_reason is None
        return bool(self.delta.content) or (self.finish_reason is None and self.delta.role is None)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_decode_event = msgspec.json.Decoder(_Event).decode


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """A request encoded in advance, so that sending it costs little CPU time.

    Attributes:
        message: The whole HTTP request.
        arrival_s: Seconds from the start of the run.
        num_prompt_tokens, num_output_tokens: Tokens that it asks for.
    """

    message: bytes
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def prepare(load: LoadConfig, config: BenchConfig, model: str, requests: Sequence[BenchRequest]) -> list[Sending]:
    """Encode requests as HTTP messages."""
    address = read_address(load.url)
    headers = {"authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    path = "chat/completions" if load.api == "chat" else "completions"
    return [
        Sending(
            message=post(address, path, msgspec.json.encode(body_of(load, config, model, request)), headers),
            arrival_s=request.arrival_s,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=request.num_output_tokens,
        )
        for request in requests
    ]


def body_of(load: LoadConfig, config: BenchConfig, model: str, request: BenchRequest) -> dict[str, Any]:
    """The JSON body of a request."""
    body = options_of(load, config, model, request.num_output_tokens)
    if load.prompts == "ids":
        return body | {"prompt": request.prompt_token_ids}
    text = words_of(request.prompt_token_ids)
    if load.api == "completions":
        return body | {"prompt": text}
    return body | {"messages": [{"role": "user", "content": text}]}


def options_of(load: LoadConfig, config: BenchConfig, model: str, num_output_tokens: int) -> dict[str, Any]:
    """A body without its prompt. Options that are not set are left out, as some servers do not know all of them."""
    body: dict[str, Any] = {"model": model, "max_tokens": num_output_tokens, **config.sampling}
    if "min_tokens" in body:
        body["min_tokens"] = min(config.min_tokens, num_output_tokens)
    if load.ignore_eos and not config.min_tokens:
        body["ignore_eos"] = True
    if load.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if load.api == "chat" and config.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": config.logprobs}
    return body


def words_of(token_ids: Sequence[int]) -> str:
    """As many short words as there are tokens, for servers that take no token ids."""
    return " ".join(_WORDS[token % len(_WORDS)] for token in token_ids)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A sent request and what was received; `pieces` is None if that failed, and `request` has the reason."""

    request: RequestRecord
    pieces: Pieces | None


async def drive(load: LoadConfig, sendings: Sequence[Sending], start_s: float) -> list[Sent]:
    """Send each request at its time after `start_s` (of `time.monotonic`) and wait until all answers have ended."""
    address = read_address(load.url)
    tls = address.tls
    slots = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency is not None else None

    async def follow(sending: Sending) -> Sent:
        arrival_s = start_s + sending.arrival_s
        await asyncio.sleep(arrival_s - time.monotonic())
        async with slots or nullcontext():
            request = RequestRecord(
                num_prompt_tokens=sending.num_prompt_tokens,
                num_requested_tokens=sending.num_output_tokens,
                arrival_s=arrival_s if slots is None else time.monotonic(),
            )
            return await send(address, sending.message, request, load.timeout_s, tls)

    return list(await asyncio.gather(*map(follow, sendings)))


async def send(
    address: Address, message: bytes, request: RequestRecord, timeout_s: float, tls: ssl.SSLContext | None
) -> Sent:
    """Send one request and receive its answer; a failure is in the record."""
    try:
        pieces = await exchange(address, message, timeout_s, tls)
    except (OSError, ExchangeFailed) as error:
        return Sent(request=dataclasses.replace(request, error=describe(error)), pieces=None)
    return Sent(request=request, pieces=pieces)


def record_of(sent: Sent, *, is_stream: bool) -> RequestRecord:
    """The record of a request, successful or failed."""
    if sent.pieces is None:
        return sent.request
    try:
        answer = _good_answer(sent.pieces)
        return _read_stream(sent.request, answer).record if is_stream else _whole(sent.request, answer)
    except (RequestFailed, ExchangeFailed, msgspec.DecodeError) as error:
        return dataclasses.replace(sent.request, error=describe(error))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a server sent of a completion.

    Attributes:
        record: Its record.
        token_ids: Its tokens; empty unless the request asked for them and the server knows `return_token_ids`.
        text: Its text.
        num_cached_tokens: Prompt tokens that the server had in its KV cache; None if it does not say.
    """

    record: RequestRecord
    token_ids: list[int]
    text: str
    num_cached_tokens: int | None


def completion_of(sent: Sent) -> Completion:
    """The streamed completion of a request that was answered.

    Raises:
        RequestFailed, ExchangeFailed, msgspec.DecodeError: There is none; one line that says why.
    """
    assert sent.pieces is not None
    return _read_stream(sent.request, _good_answer(sent.pieces))


def _good_answer(pieces: Pieces) -> Answer:
    answer = read_answer(pieces)
    if answer.status != 200:
        raise RequestFailed(f"HTTP {answer.status}: {answer.body.decode(errors='replace')[:200]}")
    return answer


def _read_stream(sent: RequestRecord, answer: Answer) -> Completion:
    times_s: list[float] = []
    token_ids: list[int] = []
    texts: list[str] = []
    usage: _Usage | None = None
    for time_s, data in read_events(answer):
        event = _decode_event(data)
        if event.error is not None:
            raise RequestFailed(f"error in the stream: {event.error}")
        usage = event.usage or usage
        for choice in event.choices:
            token_ids += choice.token_ids or ()
            texts.append(choice.text if choice.delta is None else choice.delta.content or "")
        if any(choice.has_tokens for choice in event.choices):
            times_s.append(time_s)
    if usage is None or not usage.completion_tokens or not times_s:
        raise RequestFailed("the stream ended without tokens or without usage")
    record = dataclasses.replace(
        sent,
        num_prompt_tokens=usage.prompt_tokens or sent.num_prompt_tokens,
        num_output_tokens=usage.completion_tokens,
        first_token_s=times_s[0],
        finished_s=times_s[-1],
        gaps_s=tuple(later_s - earlier_s for earlier_s, later_s in pairwise(times_s)),
    )
    details = usage.prompt_tokens_details
    cached = None if details is None else details.cached_tokens
    return Completion(record=record, token_ids=token_ids, text="".join(texts), num_cached_tokens=cached)


def _whole(sent: RequestRecord, answer: Answer) -> RequestRecord:
    usage = _decode_event(answer.body).usage
    if usage is None or not usage.completion_tokens:
        raise RequestFailed("the answer has no tokens, or no usage")
    return dataclasses.replace(
        sent,
        num_prompt_tokens=usage.prompt_tokens or sent.num_prompt_tokens,
        num_output_tokens=usage.completion_tokens,
        first_token_s=None,
        finished_s=answer.parts[-1][0],
    )


def describe(error: Exception) -> str:
    """Why a request failed, as one line."""
    return str(error) if isinstance(error, RequestFailed | ExchangeFailed) else f"{type(error).__name__}: {error}"
