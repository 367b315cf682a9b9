"""Load on an OpenAI-compatible server, nanoflow's or another's: requests arrive over time and stream their tokens.

A request is sent at its drawn time; with `max_concurrency` it waits until fewer than that many are in flight. A failed
request is counted with its reason and does not affect others. `client.py` sends and receives bytes; `clients.py` shares
requests among processes; `offline.py` runs the same workloads in process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from nanoflow.bench.client import Answer, ExchangeFailed, Pieces, exchange, post, read_address, read_answer, read_events
from nanoflow.bench.options import BenchConfig, LoadConfig
from nanoflow.engine.messages import BookFacts, PlanName
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

    @property
    def has_tokens(self) -> bool:
        """False for an event that only names the role of a message or why the completion ended."""
        if self.delta is None:
            return bool(self.text) or self.finish_reason is None
        return bool(self.delta.content) or (self.finish_reason is None and self.delta.role is None)


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int | None = None


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
    """The JSON body of a request. Options that are not set are left out, as some servers do not know all of them."""
    body: dict[str, Any] = {"model": model, "max_tokens": request.num_output_tokens, **config.sampling}
    if "min_tokens" in body:
        body["min_tokens"] = min(config.min_tokens, request.num_output_tokens)
    if load.ignore_eos and not config.min_tokens:
        body["ignore_eos"] = True
    if load.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if load.prompts == "ids":
        return body | {"prompt": request.prompt_token_ids}
    text = " ".join(_WORDS[token % len(_WORDS)] for token in request.prompt_token_ids)
    if load.api == "completions":
        return body | {"prompt": text}
    if config.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": config.logprobs}
    return body | {"messages": [{"role": "user", "content": text}]}


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
            try:
                pieces = await exchange(address, sending.message, load.timeout_s, tls)
            except (OSError, ExchangeFailed) as error:
                return Sent(request=dataclasses.replace(request, error=_describe(error)), pieces=None)
            return Sent(request=request, pieces=pieces)

    return list(await asyncio.gather(*map(follow, sendings)))


def record_of(sent: Sent, *, is_stream: bool) -> RequestRecord:
    """The record of a request, successful or failed."""
    if sent.pieces is None:
        return sent.request
    try:
        answer = read_answer(sent.pieces)
        if answer.status != 200:
            raise RequestFailed(f"HTTP {answer.status}: {answer.body.decode(errors='replace')[:200]}")
        return _streamed(sent.request, answer) if is_stream else _whole(sent.request, answer)
    except (RequestFailed, ExchangeFailed, msgspec.DecodeError) as error:
        return dataclasses.replace(sent.request, error=_describe(error))


def _streamed(sent: RequestRecord, answer: Answer) -> RequestRecord:
    times_s: list[float] = []
    usage: _Usage | None = None
    for time_s, data in read_events(answer):
        event = _decode_event(data)
        if event.error is not None:
            raise RequestFailed(f"error in the stream: {event.error}")
        usage = event.usage or usage
        if any(choice.has_tokens for choice in event.choices):
            times_s.append(time_s)
    if usage is None or not usage.completion_tokens or not times_s:
        raise RequestFailed("the stream ended without tokens or without usage")
    return dataclasses.replace(
        sent,
        num_prompt_tokens=usage.prompt_tokens or sent.num_prompt_tokens,
        num_output_tokens=usage.completion_tokens,
        first_token_s=times_s[0],
        finished_s=times_s[-1],
        gaps_s=tuple(later_s - earlier_s for earlier_s, later_s in pairwise(times_s)),
    )


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


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, RequestFailed | ExchangeFailed) else f"{type(error).__name__}: {error}"


def served_model(load: LoadConfig) -> str:
    """The name of a server's first model.

    Raises:
        ConnectionError: The server cannot be reached.
    """
    try:
        document = msgspec.json.decode(_get(f"{load.url.rstrip('/')}/models", load.api_key))
        return str(document["data"][0]["id"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ConnectionError(f"no OpenAI-compatible server at {load.url}: {_describe(error)}") from error


# For each metric: labels and value of its samples.
Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]


def served_metrics(load: LoadConfig) -> Samples:
    """A server's metrics by name, without a prefix that ends in a colon; empty if none can be read."""
    address = read_address(load.url)
    scheme = "https" if address.is_secure else "http"
    try:
        text = _get(f"{scheme}://{address.host}:{address.port}/metrics", load.api_key).decode()
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError, LookupError):
        return {}
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name.rpartition(":")[2], []).append((sample.labels, sample.value))
    return found


def _get(url: str, api_key: str | None) -> bytes:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # Never through a proxy, like the load.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        content: bytes = answer.read()
    return content


def served_book(metrics: Samples) -> BookFacts | None:
    """The plan book that a server's metrics name; None if they name none."""
    found = [labels for labels, _ in metrics.get("plan_info", ())]
    if not found or not {"name", "digest", "book"} <= found[0].keys():
        return None
    plans = tuple(PlanName(name=labels["name"], digest=labels["digest"]) for labels in found)
    return BookFacts(digest=found[0]["book"], plans=plans)


def served_settings(metrics: Samples) -> dict[str, Any]:
    """A server's settings from its metrics: the labels of every metric `..._info` with one sample."""
    return {
        name: dict(samples[0][0])
        for name, samples in sorted(metrics.items())
        if name.endswith("_info") and len(samples) == 1 and not name.startswith("python")
    }
