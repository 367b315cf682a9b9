"""Conversations of several rounds: what is drawn, what is asked, and what is counted, without a model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from benchmarks.common.stub_facts import stub_facts
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.bench import rounds
from nanoflow.bench.endpoints import ChatHistory, EngineEndpoint, History, Reply, TextHistory, TokenHistory, tiers_of
from nanoflow.bench.options import BenchConfig, LoadConfig
from nanoflow.bench.rounds import Driven, drive
from nanoflow.bench.served import Samples
from nanoflow.cli.bench import read_target
from nanoflow.cli.main import build_parser, main
from nanoflow.config import ConfigError
from nanoflow.conversation_options import ConversationConfig
from nanoflow.conversations import (
    MAX_CALL_TOKENS,
    MIN_CALL_TOKENS,
    Conversation,
    draw_conversations,
    fitted,
    num_rounds,
)
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from nanoflow.request import RequestError, SamplingParams
from nanoflow.round_metrics import AskedRound, format_rounds, in_between, measure_conversations
from nanoflow.run_metrics import RequestRecord
from nanoflow.workload import Lengths, draw_lengths

VOCAB = 997
TALKS = st.builds(
    ConversationConfig,
    num_conversations=st.integers(1, 9),
    rounds=st.integers(1, 5),
    think_time=st.sampled_from((0.0, 0.5)),
    system_tokens=st.integers(1, 40),
    system_prompts=st.integers(1, 3),
    shared_system=st.sampled_from((0.0, 0.3, 0.5, 1.0)),
    agent_share=st.sampled_from((0.0, 0.4, 1.0)),
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    rows = [f"{place},{7 + 13 * place % 90},{3 + 29 * place % 200}" for place in range(60)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return f"trace:{path}"


def config(workload: str = "20/6", **fields: Any) -> BenchConfig:
    return BenchConfig(workload=workload, **fields)


def talk(**fields: Any) -> ConversationConfig:
    return ConversationConfig(**fields)


# --- what is drawn ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(asked=TALKS, seed=st.integers(0, 3))
def test_draws_have_the_lengths_of_the_workload(asked: ConversationConfig, seed: int, trace: str) -> None:
    bench = config(trace, seed=seed)
    drawn = draw_conversations(bench, asked, vocab_size=VOCAB)
    lengths = draw_lengths(trace, asked.num_conversations * asked.rounds, seed)
    turns = [turn for each in drawn for turn in each.turns]
    assert len(drawn) == asked.num_conversations and num_rounds(drawn) == len(lengths) == len(turns)
    assert [len(turn.new_token_ids) for turn in turns] == [length.num_prompt_tokens for length in lengths]
    for place, each in enumerate(drawn):
        own = lengths[place * asked.rounds : (place + 1) * asked.rounds]
        for number, (turn, length) in enumerate(zip(each.turns, own, strict=True)):
            check_completion(turn.num_output_tokens, length, is_call=each.is_agent and number < asked.rounds - 1)
        assert each.num_tokens == len(each.system_token_ids) + sum(
            len(turn.new_token_ids) + turn.num_output_tokens for turn in each.turns
        )
    tokens = [token for each in drawn for turn in each.turns for token in turn.new_token_ids]
    assert all(type(token) is int and 0 <= token < VOCAB for token in tokens)


def check_completion(num_tokens: int, length: Lengths, *, is_call: bool) -> None:
    if is_call:
        assert min(MIN_CALL_TOKENS, length.num_output_tokens) <= num_tokens
        assert num_tokens <= min(MAX_CALL_TOKENS, length.num_output_tokens)
    else:
        assert num_tokens == length.num_output_tokens


@settings(max_examples=30, deadline=None)
@given(asked=TALKS, seed=st.integers(0, 3))
def test_stated_parts_share_system_prompts_and_are_agents(asked: ConversationConfig, seed: int) -> None:
    drawn = draw_conversations(config(seed=seed), asked, vocab_size=VOCAB)
    count = asked.num_conversations
    assert sum(each.is_agent for each in drawn) == round(asked.agent_share * count)
    systems = [tuple(each.system_token_ids) for each in drawn if each.system_token_ids]
    assert len(systems) == round(asked.shared_system * count)
    assert all(len(system) == asked.system_tokens for system in systems)
    assert len(set(systems)) <= asked.system_prompts


def test_all_system_prompts_are_used() -> None:
    drawn = draw_conversations(config(), talk(num_conversations=60, shared_system=1.0, system_prompts=3), vocab_size=9)
    assert len({tuple(each.system_token_ids) for each in drawn}) == 3


@settings(max_examples=20, deadline=None)
@given(asked=TALKS, seed=st.integers(0, 3))
def test_draws_follow_the_seed_and_repeats_differ_in_tokens_alone(asked: ConversationConfig, seed: int) -> None:
    bench = config(seed=seed)
    first, again, other = (draw_conversations(bench, asked, vocab_size=VOCAB, repeat=each) for each in (1, 1, 2))
    assert first == again
    assert list(map(shape, first)) == list(map(shape, other))
    assert all(a.turns[0].new_token_ids != b.turns[0].new_token_ids for a, b in zip(first, other, strict=True))
    systems = [{tuple(each.system_token_ids) for each in drawn} - {()} for drawn in (first, other)]
    assert asked.system_tokens < 3 or not systems[0] & systems[1]
    elsewhere = draw_conversations(config(seed=seed + 9), asked, vocab_size=VOCAB, repeat=1)
    assert all(a.turns[0].new_token_ids != b.turns[0].new_token_ids for a, b in zip(first, elsewhere, strict=True))


def shape(each: Conversation) -> tuple[Any, ...]:
    turns = [(len(turn.new_token_ids), turn.num_output_tokens, turn.think_s) for turn in each.turns]
    return (each.start_s, each.is_agent, len(each.system_token_ids), turns)


def test_people_think_and_agents_do_not() -> None:
    drawn = draw_conversations(
        config("2/2"), talk(num_conversations=400, rounds=4, think_time=3.0, agent_share=0.25), vocab_size=9
    )
    assert all(each.turns[0].think_s == 0 for each in drawn)
    people = [turn.think_s for each in drawn if not each.is_agent for turn in each.turns[1:]]
    agents = [turn.think_s for each in drawn if each.is_agent for turn in each.turns]
    assert len(people) == 900 and set(agents) == {0.0}
    # Exponential: standard deviation equals the mean, and P(more than the mean) is 1/e.
    assert np.mean(people) == pytest.approx(3.0, rel=0.1) and np.std(people) == pytest.approx(3.0, rel=0.15)
    assert np.mean(np.array(people) > 3.0) == pytest.approx(math.exp(-1), abs=0.05)


def test_conversations_begin_at_once_or_by_a_rate() -> None:
    at_once = draw_conversations(config("2/2"), talk(num_conversations=300), vocab_size=9)
    spread = draw_conversations(config("2/2"), talk(num_conversations=300, conversation_rate=10.0), vocab_size=9)
    assert {each.start_s for each in at_once} == {0.0}
    starts_s = [each.start_s for each in spread]
    assert starts_s == sorted(starts_s) and starts_s[-1] == pytest.approx(30.0, rel=0.2)


@settings(max_examples=40, deadline=None)
@given(asked=TALKS, longest=st.integers(10, 200))
def test_what_does_not_fit_is_left_out_from_the_end(asked: ConversationConfig, longest: int) -> None:
    drawn = draw_conversations(config("11/5"), asked, vocab_size=VOCAB)
    if all(len(each.system_token_ids) + each.turns[0].num_tokens > longest for each in drawn):
        with pytest.raises(ConfigError, match=f"longer than the model's {longest} tokens"):
            fitted(drawn, longest)
        return
    kept = fitted(drawn, longest)
    assert [each.start_s for each in kept] == [each.start_s for each in drawn]
    for whole, cut in zip(drawn, kept, strict=True):
        assert cut.turns == whole.turns[: len(cut.turns)] and (not cut.turns or cut.num_tokens <= longest)
        if len(cut.turns) < len(whole.turns):
            assert cut.num_tokens + whole.turns[len(cut.turns)].num_tokens > longest
    assert fitted(drawn, None) == drawn


# --- what is asked ---------------------------------------------------------------------------------------------------


class FakeEndpoint:
    """Answers at once; every prompt and time is kept. A new token 0 at the end of a prompt fails."""

    vocab_size = VOCAB
    max_model_len: int | None = None

    def __init__(self, num_turns: int = 0, *, cached: int | None = 1) -> None:
        self.prompts: dict[int, list[list[int]]] = {}
        self.times_s: dict[int, list[float]] = {}
        self.completions: dict[int, list[list[int]]] = {}
        self.most_under_way = 0
        self.num_read = 0
        self._num_turns, self._cached = num_turns, cached
        self._histories: list[TokenHistory] = []

    def history(self) -> TokenHistory:
        history = TokenHistory()
        self._histories.append(history)
        self.prompts[id(history)], self.times_s[id(history)], self.completions[id(history)] = [], [], []
        self.most_under_way = max(
            self.most_under_way, sum(len(prompts) < self._num_turns for prompts in self.prompts.values())
        )
        return history

    async def ask(self, history: History, num_output_tokens: int) -> Reply:
        key, now_s = id(history), time.monotonic()
        prompt = list(history.fields()["prompt"])
        self.times_s[key].append(now_s)
        await asyncio.sleep(0.001)
        self.prompts[key].append(prompt)
        said = [len(prompt) * 7 + place for place in range(num_output_tokens)]
        self.completions[key].append(said)
        record = RequestRecord(num_prompt_tokens=len(prompt), num_requested_tokens=num_output_tokens)
        if prompt[-1] == 0:
            return Reply(record=dataclasses.replace(record, error="broken"))
        record = dataclasses.replace(
            record,
            num_output_tokens=num_output_tokens,
            arrival_s=now_s,
            first_token_s=now_s + len(prompt),
            finished_s=now_s + len(prompt) + 1,
        )
        return Reply(record=record, num_cached_tokens=self._cached, token_ids=said)

    def tiers(self) -> dict[str, dict[str, float]]:
        self.num_read += 1
        return {"host": {"hits": 5.0 * self.num_read, "used_bytes": 2.0**20 * self.num_read}}


def driven(endpoint: FakeEndpoint, conversations: Sequence[Conversation], most: int | None = None) -> Driven:
    return asyncio.run(drive(endpoint, conversations, max_concurrency=most, is_shown=False))


@settings(max_examples=25, deadline=None)
@given(asked=TALKS)
def test_each_prompt_begins_with_the_one_before_and_its_completion(asked: ConversationConfig) -> None:
    asked = dataclasses.replace(asked, think_time=0.0)
    drawn = draw_conversations(config(), asked, vocab_size=VOCAB)
    drawn = [
        dataclasses.replace(
            each,
            turns=tuple(dataclasses.replace(turn, new_token_ids=[*turn.new_token_ids, 5]) for turn in each.turns),
        )
        for each in drawn
    ]
    endpoint = FakeEndpoint()
    found = driven(endpoint, drawn)
    for each, prompts, said in zip(drawn, endpoint.prompts.values(), endpoint.completions.values(), strict=True):
        before = each.system_token_ids
        for turn, prompt, completion in zip(each.turns, prompts, said, strict=True):
            assert prompt == before + turn.new_token_ids and len(completion) == turn.num_output_tokens
            before = prompt + completion
        assert len(before) == each.num_tokens
    assert [(one.conversation, one.round) for one in found.asked] == [
        (place, number) for place, each in enumerate(drawn) for number in range(1, len(each.turns) + 1)
    ]
    for earlier, later in zip(found.asked, found.asked[1:], strict=False):
        if later.round > 1:
            expected = earlier.record.num_prompt_tokens + earlier.record.num_output_tokens
            assert later.num_repeated_tokens == expected
        else:
            assert later.num_repeated_tokens == 0


def test_a_round_waits_for_the_one_before_and_the_think_time() -> None:
    drawn = draw_conversations(config("3/2"), talk(num_conversations=3, rounds=3, think_time=0.02), vocab_size=VOCAB)
    endpoint = FakeEndpoint()
    driven(endpoint, drawn)
    for each, times_s in zip(drawn, endpoint.times_s.values(), strict=True):
        for turn, earlier_s, later_s in zip(each.turns[1:], times_s, times_s[1:], strict=False):
            assert later_s - earlier_s >= 0.001 + turn.think_s


def test_conversations_begin_at_their_times() -> None:
    drawn = draw_conversations(config("3/2"), talk(num_conversations=5, rounds=1, conversation_rate=50.0), vocab_size=9)
    endpoint, start_s = FakeEndpoint(), time.monotonic()
    driven(endpoint, drawn)
    for each, (asked_s,) in zip(drawn, endpoint.times_s.values(), strict=True):
        assert asked_s - start_s >= each.start_s > 0


@pytest.mark.parametrize("most", [1, 3])
def test_at_most_so_many_conversations_are_under_way(most: int) -> None:
    asked = talk(num_conversations=8, rounds=3, think_time=0.002, max_concurrency=most)
    drawn = draw_conversations(config("3/2"), asked, vocab_size=VOCAB)
    endpoint = FakeEndpoint(num_turns=3)
    driven(endpoint, drawn, most)
    assert endpoint.most_under_way == most and len(endpoint.prompts) == 8


def test_a_conversation_ends_with_its_first_failure_and_others_go_on() -> None:
    drawn = draw_conversations(config("3/2"), talk(num_conversations=3, rounds=4), vocab_size=VOCAB)
    turns = [dataclasses.replace(turn, new_token_ids=[9, 9]) for turn in drawn[1].turns]
    turns[1] = dataclasses.replace(turns[1], new_token_ids=[9, 0])
    drawn[1] = dataclasses.replace(drawn[1], turns=tuple(turns))
    endpoint = FakeEndpoint()
    found = driven(endpoint, drawn)
    errors = [[one.record.error for one in found.asked if one.conversation == place] for place in range(3)]
    assert errors[0] == errors[2] == [None] * 4
    assert errors[1] == [None, "broken", *["an earlier round of the conversation failed"] * 2]
    assert [len(prompts) for prompts in endpoint.prompts.values()] == [4, 2, 4]


def test_an_error_of_the_endpoint_is_raised_as_it_is() -> None:
    class Dying(FakeEndpoint):
        async def ask(self, history: History, num_output_tokens: int) -> Reply:
            raise ConnectionError("it died")

    drawn = draw_conversations(config("3/2"), talk(num_conversations=3), vocab_size=VOCAB)
    with pytest.raises(ConnectionError, match="it died"):
        driven(Dying(), drawn)


def test_digests_tell_completions_apart() -> None:
    class Other(FakeEndpoint):
        async def ask(self, history: History, num_output_tokens: int) -> Reply:
            reply = await super().ask(history, num_output_tokens)
            is_second = history.fields()["prompt"][0] == 2
            return dataclasses.replace(reply, token_ids=[1]) if is_second else reply

    first, second = (
        Conversation(start_s=0.0, is_agent=False, system_token_ids=[number], turns=turns)
        for number, turns in ((1, one_turn()), (2, one_turn()))
    )
    ours, theirs = (driven(endpoint, [first, second]).completions for endpoint in (FakeEndpoint(), Other()))
    assert ours[0] == theirs[0] and ours[1] != theirs[1] and len(ours) == 2


def one_turn() -> tuple[Any, ...]:
    return draw_conversations(config("3/2"), talk(num_conversations=1, rounds=1), vocab_size=VOCAB)[0].turns


def test_repeats_and_warm_up_ask_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEndpoint, "max_model_len", 60)
    asked, bench = talk(num_conversations=4, rounds=3), config("20/5", num_warmup=2, repeats=2)
    endpoint = FakeEndpoint()
    runs = asyncio.run(rounds._measure_repeats(endpoint, bench, asked, range(2)))
    prompts = list(endpoint.prompts.values())
    # Of three rounds of 25 tokens two fit; the warm-up asks the first alone.
    assert [len(own) for own in prompts] == [1, 1, *[2] * 8]
    firsts = [tuple(own[0]) for own in prompts]
    assert len(set(firsts)) == len(firsts) == 10
    for run in runs:
        assert (run.num_requests, run.num_conversations, run.num_left_out) == (8, 4, 4)
        assert run.tiers == {"host": {"hits": 5.0, "used_bytes": run.tiers["host"]["used_bytes"]}}
    assert [run.tiers["host"]["used_bytes"] for run in runs] == [2.0 * 2**20, 4.0 * 2**20]


def test_a_warm_up_that_fails_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEndpoint, "vocab_size", 1)
    with pytest.raises(ConnectionError, match="no request of the warm-up completes: broken"):
        asyncio.run(rounds._measure_repeats(FakeEndpoint(), config(), talk(), range(1)))


# --- an engine of ours -----------------------------------------------------------------------------------------------


class FakeEngine:
    """Answers with as many tokens as asked for, and refuses prompts of more than 9 tokens."""

    facts = stub_facts(vocab_size=50, max_model_len=99)

    def __init__(self) -> None:
        counts = [OneTier(hits=4, used_bytes=64), OneTier(hits=1, used_bytes=0)]
        self.stats: Any = SimpleNamespace(tiers=dict(zip(("device", "host"), counts, strict=True)))

    async def generate(
        self, prompt: list[int], params: SamplingParams, *, streams: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        assert not streams and params.ignore_eos and not params.detokenize and params.max_tokens is not None
        if len(prompt) > 9:
            raise RequestError("too long")
        times = RequestMetrics(arrival_s=1.0, first_token_s=1.5, last_token_s=3.0, finished_s=3.0)
        said = CompletionOutput(index=0, token_ids=[8] * params.max_tokens, finish_reason=FinishReason.LENGTH)
        yield RequestOutput(
            request_id="0",
            prompt=None,
            prompt_token_ids=prompt,
            outputs=[said],
            finished=True,
            metrics=times,
            num_cached_tokens=2,
        )


@dataclasses.dataclass(frozen=True)
class OneTier:
    hits: int
    used_bytes: int


def test_an_engine_is_asked_without_text_and_its_refusal_is_a_failure() -> None:
    endpoint = EngineEndpoint(cast(AsyncEngine, FakeEngine()), config())
    assert (endpoint.vocab_size, endpoint.max_model_len) == (50, 99)
    history = endpoint.history()
    history.hear([1, 2, 3])
    reply = asyncio.run(endpoint.ask(history, 4))
    assert (reply.num_cached_tokens, reply.token_ids) == (2, [8] * 4)
    assert (reply.record.num_prompt_tokens, reply.record.num_output_tokens, reply.record.first_token_s) == (3, 4, 1.5)
    history.hear(range(7))
    reply = asyncio.run(endpoint.ask(history, 4))
    assert (reply.record.error, reply.record.num_prompt_tokens, reply.num_cached_tokens) == ("too long", 10, None)


def test_an_engine_tells_of_its_tiers_where_it_has_any() -> None:
    engine = FakeEngine()
    endpoint = EngineEndpoint(cast(AsyncEngine, engine), config())
    assert endpoint.tiers() == {"device": {"hits": 4, "used_bytes": 64}, "host": {"hits": 1, "used_bytes": 0}}
    engine.stats = SimpleNamespace()
    assert endpoint.tiers() == {}


# --- forms of a conversation -----------------------------------------------------------------------------------------


def test_text_begins_with_the_text_before() -> None:
    history, reply = TextHistory(), Reply(record=record(3, 2), text=", x")
    history.hear([0, 1], is_system=True)
    history.hear([2])
    before = history.fields()["prompt"]
    assert before == "the of and" and history.num_tokens == 3
    history.say(reply)
    history.hear([3, 4])
    assert history.fields()["prompt"] == before + ", x to in" and history.num_tokens == 7


def test_messages_have_roles() -> None:
    history = ChatHistory()
    history.hear([0, 1], is_system=True)
    history.hear([2])
    history.say(Reply(record=record(3, 2), text="hi"))
    history.hear([3])
    roles = [(each["role"], each["content"]) for each in history.fields()["messages"]]
    assert roles == [("system", "the of"), ("user", "and"), ("assistant", "hi"), ("user", "to")]
    assert history.num_tokens == 6


def test_tokens_are_asked_back() -> None:
    history = TokenHistory()
    history.hear([4])
    history.say(Reply(record=record(1, 2), token_ids=[5, 6], text="ignored"))
    assert history.fields() == {"prompt": [4, 5, 6], "return_token_ids": True} and history.num_tokens == 3


# --- what is counted -------------------------------------------------------------------------------------------------


def record(num_prompt: int, num_output: int, ttft_s: float = 1.0, error: str | None = None) -> RequestRecord:
    return RequestRecord(
        num_prompt_tokens=num_prompt,
        num_requested_tokens=num_output,
        num_output_tokens=num_output,
        arrival_s=0.0,
        first_token_s=ttft_s,
        finished_s=ttft_s + 2.0,
        error=error,
    )


def went(place: int, number: int, request: RequestRecord, cached: int | None, repeated: int = 0) -> AskedRound:
    return AskedRound(
        conversation=place, round=number, record=request, num_cached_tokens=cached, num_repeated_tokens=repeated
    )


BY_HAND = [
    went(0, 1, record(100, 3, 1.0), 20),
    went(1, 1, record(60, 3, 3.0), 0),
    went(0, 2, record(150, 5, 0.5), 96, repeated=103),
    went(1, 2, record(999, 5, error="full"), None),
]


def counted(asked: Sequence[AskedRound], **changes: Any) -> Any:
    more = {"num_left_out": 2, "tiers": {"host": {"hits": 4.0, "loaded_bytes": 3.0 * 2**20, "load_seconds": 0.25}}}
    return measure_conversations(asked, 10.0, {}, completions=["a", "b"], **{**more, **changes})


def test_counts_by_hand() -> None:
    run = counted(BY_HAND)
    assert (run.num_requests, run.num_completed, run.num_failed, run.num_conversations) == (4, 3, 1, 2)
    assert (run.prompt.num_asked, run.prompt.num_cached, run.prompt.num_computed) == (310, 116, 194)
    assert run.prompt.num_repeated == 103 and run.prompt.hit_rate == pytest.approx(116 / 310)
    assert run.asked_over_computed == pytest.approx(310 / 194)
    assert run.total_tokens_per_s == pytest.approx((310 + 11) / 10)
    first, second = run.by_round
    assert (first.round, first.num_requests, first.num_completed) == (1, 2, 2)
    assert (first.prompt.num_asked, first.prompt.num_computed, first.num_output_tokens) == (160, 140, 6)
    assert first.ttft_s.p50 == 2.0 and first.tpot_s.p50 == 1.0
    assert (second.round, second.num_requests, second.num_completed) == (2, 2, 1)
    assert second.prompt.hit_rate == pytest.approx(96 / 150) and second.ttft_s.p99 == 0.5


def test_what_one_answer_does_not_say_is_unknown() -> None:
    run = counted([*BY_HAND, went(2, 1, record(10, 1), None)])
    assert run.prompt.num_asked == 320
    assert run.prompt.num_computed is run.prompt.hit_rate is run.asked_over_computed is None
    assert run.by_round[0].prompt.num_cached is None and run.by_round[1].prompt.num_cached == 96
    assert "unknown" in format_rounds([run])


def test_a_run_of_failures_has_no_rates() -> None:
    run = counted([went(0, 1, record(5, 1, error="full"), None)])
    assert run.prompt.num_asked == 0 and run.prompt.hit_rate is None and run.by_round[0].ttft_s is None
    assert "all" in format_rounds([run])


def test_the_table_has_rounds_tiers_and_remarks() -> None:
    lines = format_rounds([counted(BY_HAND)]).splitlines()
    assert lines[0].split()[:6] == ["round", "requests", "asked", "repeated", "computed", "hit"]
    first, second, whole = (line.split() for line in lines[1:4])
    assert first[:6] == ["1", "2", "160", "0", "140", "12.5%"] and first[6:8] == ["2,000.00", "2,980.00"]
    assert second[:6] == ["2", "2", "150", "103", "54", "64.0%"]
    assert whole[:6] == ["all", "4", "310", "103", "194", "37.4%"]
    assert lines[4] == "tier host: hits 4, loaded 3.0 MiB, load 0.250 s"
    assert lines[5] == "prompt tokens computed: 1 of 1.60"
    assert lines[6].startswith("2 rounds were left out") and len(lines) == 7


def test_the_table_is_of_the_median_repeat() -> None:
    slow, middle, fast = (counted([went(0, 1, record(size, 1), 0)]) for size in (10, 20, 30))
    assert "20" in format_rounds([fast, slow, middle]).splitlines()[1].split()


def test_tiers_count_from_the_start_of_the_run() -> None:
    metrics: Samples = {
        "kv_tier_hits_total": [({"tier": "host"}, 7.0), ({"tier": "disk"}, 2.0)],
        "kv_tier_hits_created": [({"tier": "host"}, 1e9)],
        "kv_tier_used_bytes": [({"tier": "host"}, 50.0)],
        "prefix_cache_hits_total": [({}, 3.0)],
    }
    after = tiers_of(metrics)
    assert after == {"host": {"hits": 7.0, "used_bytes": 50.0}, "disk": {"hits": 2.0}}
    before = {"host": {"hits": 3.0, "used_bytes": 40.0}}
    assert in_between(before, after) == {"host": {"hits": 4.0, "used_bytes": 50.0}, "disk": {"hits": 2.0}}
    assert tiers_of({}) == {}


# --- a server that is no nanoflow ------------------------------------------------------------------------------------


class PlainServer(BaseHTTPRequestHandler):
    """Streams words, sends neither token ids nor cached tokens, and does not say how long a prompt may be."""

    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        is_list = self.path.endswith("/models")
        self.send_response(200 if is_list else 404)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "plain"}]}' if is_list else b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).bodies.append(body)
        self.send_response(200)
        self.end_headers()
        is_chat = "messages" in body
        for _ in range(body["max_tokens"]):
            choice = {"delta": {"content": " w"}} if is_chat else {"text": " w", "finish_reason": None}
            self.wfile.write(b"data: %s\n\n" % json.dumps({"choices": [choice]}).encode())
        usage = {"prompt_tokens": 11, "completion_tokens": body["max_tokens"]}
        self.wfile.write(b"data: %s\n\n" % json.dumps({"choices": [], "usage": usage}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def plain_url() -> Iterator[str]:
    PlainServer.bodies = []
    with ThreadingHTTPServer(("127.0.0.1", 0), PlainServer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_any_server_takes_texts(api: Any, plain_url: str) -> None:
    load = LoadConfig(url=plain_url, api=api, prompts="text")
    found = rounds.run_served_rounds(load, config("4/2", num_warmup=0), talk(num_conversations=1, rounds=3))
    (run,) = rounds.conversation_metrics(found)
    assert run.num_completed == 3 and run.num_left_out == 0 and run.prompt.num_computed is None
    assert [each.num_repeated for each in (one.prompt for one in run.by_round)] == [0, 13, 13]
    assert "return_token_ids" not in PlainServer.bodies[0] and PlainServer.bodies[0]["ignore_eos"] is True
    if api == "completions":
        first, second, third = (body["prompt"] for body in PlainServer.bodies)
        assert second.startswith(first + " w w ") and third.startswith(second + " w w ")
    else:
        first, second, third = (body["messages"] for body in PlainServer.bodies)
        assert second[:1] == first and second[1] == {"role": "assistant", "content": " w w"}
        assert third[:3] == second and len(third) == 5


def test_a_server_without_token_ids_is_told_of(plain_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "rounds", "--url", plain_url, "--workload", "4/2", "--num-conversations", "2", "--rounds", "2"]
    assert main([*argv, "--num-warmup", "0"]) == 1
    shown = capsys.readouterr()
    assert "the server does not send the tokens of a completion: ask for --prompts text" in shown.out
    assert "an earlier round of the conversation failed" in shown.out
    assert "4 of 4 requests failed" in shown.err
    assert main(argv) == 1
    assert "no request of the warm-up completes: the server does not send" in capsys.readouterr().err


# --- options and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"rounds": 0},
        {"num_conversations": 0},
        {"system_prompts": 0},
        {"system_tokens": 0},
        {"max_concurrency": 0},
        {"shared_system": 1.1},
        {"shared_system": math.nan},
        {"agent_share": -0.1},
        {"think_time": -1.0},
        {"think_time": math.inf},
        {"conversation_rate": 0.0},
        {"conversation_rate": math.nan},
    ],
    ids=str,
)
def test_bad_options_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        talk(**fields)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompts text", "prompts: only with --url"),
        ("--api-key x --timeout-s 3", "api_key, timeout_s: only with --url"),
        ("--url http://x/v1 --num-pages 4", "num_pages: not with --url"),
        ("--url http://x/v1 --max-num-batched-tokens 64", "max_batch_tokens: not with --url"),
        ("--url http://x/v1 --api chat", "--prompts text"),
        ("--workload 4", "IN/OUT"),
        ("--workload trace:nowhere.csv", "cannot read trace nowhere.csv"),
        ("--goodput speed:1", "speed"),
        ("--url http://127.0.0.1:9/v1", "no OpenAI-compatible server at http://127.0.0.1:9/v1"),
        ("--url nowhere", "the address of a server is http://HOST:PORT/v1"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    flags: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "rounds", *flags.split()]) == 1
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_the_model_is_the_engines_or_the_servers() -> None:
    parse = build_parser().parse_args
    load, engine = read_target(parse(["bench", "rounds", "--model", "m", "--page-size", "32"]))
    assert load is None and (engine.model, engine.page_size, engine.goal) == ("m", 32, "balanced")
    load, _ = read_target(parse(["bench", "rounds", "--url", "http://x/v1", "--model", "m"]))
    assert load is not None and (load.model, load.url, load.stream) == ("m", "http://x/v1", True)
