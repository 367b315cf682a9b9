"""Load on an OpenAI-compatible server, nanoflow's or another's: requests arrive in time and stream their tokens back.

A request arrives at its drawn time; under `max_concurrency` it arrives when one of so many clients is free to send it.
A failed request is counted with its reason and spoils no other. What the server is made of is not known here; the
same work in process is `offline.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from nanoflow.bench.config import BenchConfig, LoadConfig
from nanoflow.bench.metrics import RequestRecord, RunMetrics, measure, parse_limits
from nanoflow.bench.record import BenchRecord, make_record
from nanoflow.bench.workload import BenchRequest, draw_lengths, make_requests
from nanoflow.engine.messages import BookFacts, PlanName


class RequestFailed(Exception):
    """The server did not complete a request; one line says why."""


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_decode_event = msgspec.json.Decoder(_Event).decode


def run_serve(load: LoadConfig, config: BenchConfig) -> BenchRecord:
    """Warm the server up, measure every repeat.

    Raises:
        ValueError: The workload or a limit is not usable.
        ConnectionError: There is no such server, or it completes no request of the warm-up.
    """
    limits_ms = parse_limits(config.goodput)
    lengths = draw_lengths(config.workload, config.num_requests, config.seed)
    runs = [
        make_requests(
            lengths, vocab_size=load.vocab_size, seed=config.seed, repeat=repeat, request_rate=load.request_rate
        )
        for repeat in range(config.repeats)
    ]
    model, book, repeats = asyncio.run(_run(load, runs, config.num_warmup, limits_ms))
    return make_record(
        "serve",
        model={"name": model} if book is None else {"name": model, "book": book},
        plan=None if book is None else str(book),
        workload=config,
        config=dataclasses.replace(load, api_key=None),
        repeats=repeats,
    )


async def _run(
    load: LoadConfig, runs: Sequence[Sequence[BenchRequest]], num_warmup: int, limits_ms: Mapping[str, float]
) -> tuple[str, BookFacts | None, list[RunMetrics]]:
    """The model's name, its plans if the server names them, and the metrics of every repeat."""
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=load.url, headers=headers, timeout=load.timeout_s, limits=limits) as client:
        model = load.model or await _served_model(client)
        if num_warmup:
            await _warm_up(client, model, runs[0][:num_warmup])
        repeats = [await _measure_run(client, model, load, requests, limits_ms) for requests in runs]
        return model, await _served_book(client), repeats


async def _served_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("models")
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
        raise ConnectionError(f"no OpenAI-compatible server at {client.base_url}: {_describe(error)}") from error


async def _served_book(client: httpx.AsyncClient) -> BookFacts | None:
    """The plan book as a server's metrics name it; None if they do not."""
    try:
        response = await client.get(client.base_url.join("/metrics"))
        families = list(text_string_to_metric_families(response.raise_for_status().text))
    except (httpx.HTTPError, ValueError, LookupError):
        return None
    found = [sample.labels for family in families for sample in family.samples if sample.name.endswith(":plan_info")]
    if not found or not {"name", "digest", "book"} <= found[0].keys():
        return None
    plans = tuple(PlanName(name=labels["name"], digest=labels["digest"]) for labels in found)
    return BookFacts(digest=found[0]["book"], plans=plans)


async def _warm_up(client: httpx.AsyncClient, model: str, requests: Sequence[BenchRequest]) -> None:
    now_s = time.perf_counter()
    records = await asyncio.gather(*(_send(client, model, request, now_s, None) for request in requests))
    errors = [record.error for record in records if record.error is not None]
    if len(errors) == len(records):
        raise ConnectionError(f"the server at {client.base_url} completes no request: {errors[0]}")


async def _measure_run(
    client: httpx.AsyncClient,
    model: str,
    load: LoadConfig,
    requests: Sequence[BenchRequest],
    limits_ms: Mapping[str, float],
) -> RunMetrics:
    slots = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency is not None else None
    with tqdm(total=len(requests), unit=" requests", dynamic_ncols=True) as progress:
        start_s = time.perf_counter()

        async def follow(request: BenchRequest) -> RequestRecord:
            record = await _send(client, model, request, start_s + request.arrival_s, slots)
            progress.update()
            return record

        records = await asyncio.gather(*map(follow, requests))
        return measure(records, time.perf_counter() - start_s, limits_ms)


async def _send(
    client: httpx.AsyncClient, model: str, request: BenchRequest, arrival_s: float, slots: asyncio.Semaphore | None
) -> RequestRecord:
    """Send a request at its arrival (or once a slot is free) and follow it to its end, good or bad."""
    await asyncio.sleep(arrival_s - time.perf_counter())
    async with slots or nullcontext():
        sent = RequestRecord(
            num_prompt_tokens=len(request.prompt_token_ids),
            num_requested_tokens=request.num_output_tokens,
            arrival_s=arrival_s if slots is None else time.perf_counter(),
        )
        try:
            return await _stream(client, model, request, sent)
        except (RequestFailed, httpx.HTTPError, msgspec.DecodeError) as error:
            return dataclasses.replace(sent, error=_describe(error))


async def _stream(client: httpx.AsyncClient, model: str, request: BenchRequest, sent: RequestRecord) -> RequestRecord:
    body = {
        "model": model,
        "prompt": request.prompt_token_ids,
        "max_tokens": request.num_output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times_s: list[float] = []
    usage: _Usage | None = None
    async with client.stream("POST", "completions", json=body) as response:
        if response.is_error:
            raise RequestFailed(f"HTTP {response.status_code}: {(await response.aread()).decode()[:200]}")
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = _decode_event(line.removeprefix("data:"))
            if event.error is not None:
                raise RequestFailed(f"error in the stream: {event.error}")
            usage = event.usage or usage
            # A last event that only says why the completion ended delivers no token.
            if any(choice.text or choice.finish_reason is None for choice in event.choices):
                times_s.append(time.perf_counter())
    if usage is None or not usage.completion_tokens or not times_s:
        raise RequestFailed("the stream ended without tokens or without usage")
    return dataclasses.replace(
        sent,
        num_output_tokens=usage.completion_tokens,
        first_token_s=times_s[0],
        finished_s=times_s[-1],
        gaps_s=tuple(later_s - earlier_s for earlier_s, later_s in pairwise(times_s)),
    )


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, RequestFailed) else f"{type(error).__name__}: {error}"
