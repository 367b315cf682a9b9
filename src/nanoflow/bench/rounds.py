"""Conversations of several rounds, in an engine started here or at a server: asks every round and measures.

A round is asked when the completion before it has ended and the think time is over; its prompt is the whole
conversation so far with the round's new tokens. If a round fails, its conversation ends, and the rounds after it count
as failed too. `conversations.py` draws conversations, `endpoints.py` answers, `round_metrics.py` counts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm

from nanoflow.bench.clients import run_loop, server_processes
from nanoflow.bench.endpoints import Endpoint, EngineEndpoint, History, Reply, ServedEndpoint
from nanoflow.bench.options import BenchConfig, LoadConfig
from nanoflow.bench.processes import processes_of
from nanoflow.bench.provenance import facts_of, portable_options, settings_of
from nanoflow.bench.record import BenchRecord, make_record
from nanoflow.bench.served import served_book, served_metrics
from nanoflow.config import EngineConfig
from nanoflow.conversation_options import ConversationConfig
from nanoflow.conversations import Conversation, Turn, draw_conversations, fitted, num_rounds
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.models.presets import preset_name
from nanoflow.round_metrics import AskedRound, ConversationMetrics, in_between, measure_conversations
from nanoflow.run_metrics import RequestRecord, parse_limits

_BENCHMARK = "rounds"
_AFTER_A_FAILURE = "an earlier round of the conversation failed"
# Hexadecimal digits of a digest: enough to tell completions of one conversation apart.
_DIGEST_LENGTH = 12


def run_engine_rounds(
    engine: EngineConfig, config: BenchConfig, talk: ConversationConfig, repeats: Sequence[int] | None = None
) -> BenchRecord:
    """Start an engine in a process of its own, warm it up and measure every repeat.

    Args:
        engine: Options of the engine.
        config: What requests ask for; their number is that of all rounds.
        talk: The conversations.
        repeats: Numbers of the repeats to measure; None for as many as `config` says, from 0.

    Raises:
        ValueError: The model, the workload or a limit is invalid.
        EngineError: The engine cannot start, or died.
    """
    config = counted(config, talk)
    _check(config, talk)
    if preset_name(engine.model) is not None:
        engine = dataclasses.replace(engine, load_format="random")
    return run_loop(_with_engine(engine, config, talk, range(config.repeats) if repeats is None else repeats))


def run_served_rounds(load: LoadConfig, config: BenchConfig, talk: ConversationConfig) -> BenchRecord:
    """Warm up a server and measure every repeat.

    Raises:
        ValueError: The workload or a limit is invalid.
        ConnectionError: The server cannot be reached, or completes no request of the warm-up.
    """
    config = counted(config, talk)
    _check(config, talk)
    endpoint = ServedEndpoint(load, config)
    runs = run_loop(_measure_repeats(endpoint, config, talk, range(config.repeats)))
    book = served_book(served_metrics(load))
    return make_record(
        _BENCHMARK,
        model={"name": endpoint.model} if book is None else {"name": endpoint.model, "book": book},
        plan=None if book is None else str(book),
        workload=config,
        config={"conversations": talk, "load": portable_options(dataclasses.replace(load, api_key=None))},
        repeats=runs,
        processes=server_processes(load.url),
    )


def conversation_metrics(record: BenchRecord) -> list[ConversationMetrics]:
    """The repeats of a record of this benchmark."""
    return [run for run in record.repeats if isinstance(run, ConversationMetrics)]


def counted(config: BenchConfig, talk: ConversationConfig) -> BenchConfig:
    """The options of requests, with the number of requests that the conversations have."""
    return dataclasses.replace(config, num_requests=talk.num_conversations * talk.rounds)


def _check(config: BenchConfig, talk: ConversationConfig) -> None:
    """Find a wrong workload or limit before a model is loaded."""
    parse_limits(config.goodput)
    draw_conversations(config, dataclasses.replace(talk, num_conversations=1), vocab_size=1)


async def _with_engine(
    engine_config: EngineConfig, config: BenchConfig, talk: ConversationConfig, repeats: Sequence[int]
) -> BenchRecord:
    engine = await AsyncEngine.start(engine_config)
    try:
        runs = await _measure_repeats(EngineEndpoint(engine, config), config, talk, repeats)
        return make_record(
            _BENCHMARK,
            model={
                "name": engine_config.model,
                "weights": engine_config.load_format,
                **facts_of(engine.facts),
            },
            plan=engine.facts.plan,
            workload=config,
            config={"conversations": talk, "engine": portable_options(engine_config)},
            repeats=runs,
            settings=settings_of(engine_config, engine.facts),
            processes=processes_of([os.getpid()]),
        )
    finally:
        await engine.close()


async def _measure_repeats(
    endpoint: Endpoint, config: BenchConfig, talk: ConversationConfig, repeats: Sequence[int]
) -> list[ConversationMetrics]:
    if config.num_warmup:
        await _warm_up(endpoint, config, talk)
    return [await _measure_run(endpoint, config, talk, repeat) for repeat in repeats]


async def _warm_up(endpoint: Endpoint, config: BenchConfig, talk: ConversationConfig) -> None:
    """Ask first rounds that are not counted, of a repeat that is not measured.

    Raises:
        ConnectionError: None of them completed.
    """
    once = dataclasses.replace(talk, num_conversations=config.num_warmup, conversation_rate=float("inf"))
    drawn = draw_conversations(config, once, vocab_size=endpoint.vocab_size, repeat=config.repeats)
    firsts = [dataclasses.replace(each, turns=each.turns[:1]) for each in fitted(drawn, endpoint.max_model_len)]
    driven = await drive(endpoint, firsts, max_concurrency=talk.max_concurrency, is_shown=False)
    errors = [each.record.error for each in driven.asked if each.record.error is not None]
    if errors and len(errors) == len(driven.asked):
        raise ConnectionError(f"no request of the warm-up completes: {errors[0]}")


async def _measure_run(
    endpoint: Endpoint, config: BenchConfig, talk: ConversationConfig, repeat: int
) -> ConversationMetrics:
    drawn = draw_conversations(config, talk, vocab_size=endpoint.vocab_size, repeat=repeat)
    conversations = fitted(drawn, endpoint.max_model_len)
    before = await asyncio.to_thread(endpoint.tiers)
    driven = await drive(endpoint, conversations, max_concurrency=talk.max_concurrency, is_shown=sys.stderr.isatty())
    after = await asyncio.to_thread(endpoint.tiers)
    return measure_conversations(
        driven.asked,
        driven.duration_s,
        parse_limits(config.goodput),
        num_left_out=num_rounds(drawn) - num_rounds(conversations),
        tiers=in_between(before, after),
        completions=driven.completions,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Driven:
    """A run as it went.

    Attributes:
        asked: Every round, conversation by conversation.
        duration_s: From the start to the last end of a completion.
        completions: A digest of all completions of each conversation.
    """

    asked: Sequence[AskedRound]
    duration_s: float
    completions: Sequence[str]


async def drive(
    endpoint: Endpoint, conversations: Sequence[Conversation], *, max_concurrency: int | None, is_shown: bool
) -> Driven:
    """Ask all rounds of all conversations, and return when the last completion has ended.

    Args:
        endpoint: Who answers.
        conversations: In the order of their starts.
        max_concurrency: Most conversations under way; a later one begins when an earlier one has ended.
        is_shown: Show a progress bar.
    """
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None
    bar = tqdm(total=num_rounds(conversations), unit="round", dynamic_ncols=True, disable=not is_shown)
    start_s = time.monotonic()

    async def follow(number: int, conversation: Conversation) -> _Followed:
        await asyncio.sleep(max(start_s + conversation.start_s - time.monotonic(), 0.0))
        async with slots or nullcontext():
            return await _follow(endpoint, number, conversation, bar)

    with bar:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(follow(*each)) for each in enumerate(conversations) if each[1].turns]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    followed = [task.result() for task in tasks]
    asked = [each for one in followed for each in one.asked]
    ends_s = [each.record.finished_s for each in asked if each.record.error is None]
    return Driven(
        asked=asked,
        duration_s=max(ends_s, default=time.monotonic()) - start_s,
        completions=[one.digest for one in followed],
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Followed:
    """One conversation as it went."""

    asked: Sequence[AskedRound]
    digest: str


async def _follow(endpoint: Endpoint, number: int, conversation: Conversation, bar: Any) -> _Followed:
    """Ask the rounds of one conversation, each after the other."""
    history, asked, said = endpoint.history(), list[AskedRound](), hashlib.sha256()
    if conversation.system_token_ids:
        history.hear(conversation.system_token_ids, is_system=True)
    num_before, has_failed = 0, False
    for place, turn in enumerate(conversation.turns, start=1):
        reply = await _ask(endpoint, history, turn, has_failed=has_failed)
        record = reply.record
        asked.append(
            AskedRound(
                conversation=number,
                round=place,
                record=record,
                num_cached_tokens=reply.num_cached_tokens,
                num_repeated_tokens=num_before,
            )
        )
        has_failed = record.error is not None
        num_before = record.num_prompt_tokens + record.num_output_tokens
        said.update(repr(list(reply.token_ids) or reply.text).encode())
        history.say(reply)
        bar.update()
    return _Followed(asked=asked, digest=said.hexdigest()[:_DIGEST_LENGTH])


async def _ask(endpoint: Endpoint, history: History, turn: Turn, *, has_failed: bool) -> Reply:
    """Ask one round after its think time; in a conversation that has failed it fails at once."""
    history.hear(turn.new_token_ids)
    if has_failed:
        return Reply(
            record=RequestRecord(
                num_prompt_tokens=history.num_tokens,
                num_requested_tokens=turn.num_output_tokens,
                error=_AFTER_A_FAILURE,
            )
        )
    await asyncio.sleep(turn.think_s)
    return await endpoint.ask(history, turn.num_output_tokens)
