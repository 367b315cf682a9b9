"""Prompt look-up and what counts of a draft, each against a twin that says it token by token; the option's text."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.batch import DenseBatch
from nanoflow.config import ConfigError, EngineConfig, from_kwargs
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.scheduler.gain import HOST_GAP_S, Draft, pays, with_drafts
from nanoflow.scheduler.ngram import continuation
from nanoflow.scheduler.verify import counting_draws
from nanoflow.speculation import NgramSpeculation, read_speculation, speculation_of
from tests.graphs import batch_of


def slow_continuation(tokens: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """Longest match first, latest first; what follows may run into what is proposed."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        tail = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tail:
                grown = list(tokens)
                for place in range(start + length, start + length + count):
                    grown.append(grown[place])
                return grown[len(tokens) :]
    return []


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 4),
)
def test_look_up_finds_what_a_search_finds(tokens: list[int], count: int, shortest: int, more: int) -> None:
    found = continuation(np.array(tokens, np.int32), count, longest=shortest + more, shortest=shortest)
    assert found.tolist() == slow_continuation(tokens, count, shortest + more, shortest)
    assert found.dtype == np.int32


def drafted_batch(lengths: list[int], num_draws: list[int], token_ids: list[int]) -> DenseBatch:
    """Parts of prompts, each of which draws behind so many of its last tokens."""
    batch = batch_of([(3, length) for length in lengths], 0, 9, seed=0)
    return dataclasses.replace(
        batch,
        token_ids=np.array(token_ids, np.int32),
        sampled=np.repeat(np.arange(len(lengths)), num_draws).astype(np.int32),
    )


@given(st.data())
def test_draws_count_as_long_as_guesses_are_right(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    num_draws = [data.draw(st.integers(0, length)) for length in lengths]
    num_tokens, num_drawn = sum(lengths), sum(num_draws)
    ids = st.integers(0, 1)
    batch = drafted_batch(lengths, num_draws, data.draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens)))
    drawn = data.draw(st.lists(ids, min_size=num_drawn, max_size=num_drawn))
    is_last = data.draw(st.lists(st.sampled_from([False, False, True]), min_size=num_drawn, max_size=num_drawn))
    counting, logit_tokens, positions = [], [], []
    for index, count in enumerate(num_draws):
        stop, counts = sum(lengths[: index + 1]), True
        for before in range(count):
            place = stop - count + before
            counting.append(counts)
            logit_tokens.append(place)
            positions.append(int(batch.positions[place]) + 1)
            at = len(counting) - 1
            is_right = before + 1 < count and drawn[at] == batch.token_ids[place + 1]
            counts = counts and is_right and not is_last[at]
    assert batch.logit_tokens.tolist() == logit_tokens
    assert batch.drawn_positions.tolist() == positions
    assert counting_draws(batch, np.array(drawn, np.int32), np.array(is_last, np.bool_)).tolist() == counting
    assert batch.num_draft_tokens == sum(max(count - 1, 0) for count in num_draws)
    assert batch.num_drafted_requests == sum(count > 1 for count in num_draws)


def test_the_shape_with_drafts_is_that_of_the_batch() -> None:
    decodes = batch_of([(9, 1), (4, 1), (20, 1)], 3, 9, seed=0)
    drafted = batch_of([(9, 1), (4, 4), (20, 3)], 1, 9, seed=0)
    drafted = dataclasses.replace(drafted, sampled=np.array([0, 1, 1, 1, 1, 2, 2, 2], np.int32))
    drafts = [Draft(num_tokens=3, context=5, expected=1.0), Draft(num_tokens=2, context=21, expected=1.0)]
    assert with_drafts(decodes.shape, drafts) == drafted.shape


def test_drafts_pay_if_they_bring_more_than_they_take() -> None:
    shape = BatchShape(num_tokens=2, num_decode_tokens=2, decode_context=20, num_sampled=2)
    drafts = [Draft(num_tokens=4, context=10, expected=2.0)]
    # Two tokens in 1 s without; four in 2 s at most with.
    rest_s = 1.0 - HOST_GAP_S
    assert pays(shape, drafts, IterationTime(fixed_s=1 - 0.2, token_s=0.1, floor_tokens=2))
    for more_s, expected in ((0.99, True), (1.01, False)):
        token_s = more_s * rest_s / 4
        times = IterationTime(fixed_s=1.0 - 2 * token_s, token_s=token_s)
        assert pays(shape, drafts, times) is expected


GOOD = {
    "ngram:4": (4, 4, 2),
    "NGRAM:1": (1, 4, 2),
    "ngram:4:1": (4, 1, 1),
    "ngram:4:3": (4, 3, 2),
    " ngram:32:64:64 ": (32, 64, 64),
    "ngram:2:5:1": (2, 5, 1),
}


@pytest.mark.parametrize("text", GOOD)
def test_the_option_is_read(text: str) -> None:
    num_tokens, longest, shortest = GOOD[text]
    expected = NgramSpeculation(num_draft_tokens=num_tokens, longest_match=longest, shortest_match=shortest)
    assert speculation_of(text) == expected == read_speculation(str(expected))
    assert EngineConfig(speculative=text).speculative == text


def test_none_is_none() -> None:
    assert EngineConfig().speculative is None
    assert speculation_of(None) is speculation_of("none") is None


BAD = [
    "",
    "ngram",
    "ngram:",
    "ngram:0",
    "ngram:33",
    "ngram:4:2:3",
    "ngram:4:65",
    "ngram:-1",
    "ngram:1.5",
    "ngram:4:4:4:4",
]
BAD += ["eagle:4", "ngram:٤", "ngram:99999999999999999999", "ngram 4"]


@pytest.mark.parametrize("value", [*BAD, 4, True, ["ngram:4"], b"ngram:4"], ids=repr)
def test_what_cannot_be_read_ends_in_one_line(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^speculative: ") as problem:
        EngineConfig(speculative=value)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 200


VLLM = [
    ({"method": "ngram", "num_speculative_tokens": 4}, "ngram:4"),
    ({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 5}, "ngram:3:5:5"),
    ({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2}, "ngram:3:2:2"),
    ({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}, "ngram:3:4:2"),
    ({"model": "[ngram]", "num_speculative_tokens": 5, "disable_by_batch_size": 8}, "ngram:5"),
    ({"model": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": None}, "ngram:5"),
    ('{"method": "ngram", "num_speculative_tokens": 4}', "ngram:4"),
    ({}, None),
    (None, None),
]


@pytest.mark.parametrize(("given_config", "expected"), VLLM, ids=str)
def test_the_mapping_of_vllm_is_read(given_config: Any, expected: str | None) -> None:
    config = from_kwargs(EngineConfig, {"speculative_config": given_config})
    assert config == dataclasses.replace(EngineConfig(), speculative=expected)


REFUSED = [
    ({"method": "ngram"}, "num_speculative_tokens is missing"),
    ({"method": "eagle", "num_speculative_tokens": 4}, "method must be ngram"),
    ({"model": "some/draft", "num_speculative_tokens": 4}, "no draft models"),
    ({"method": "ngram", "model": "some/draft", "num_speculative_tokens": 4}, "takes no model"),
    ({"method": "ngram", "num_speculative_tokens": "four"}, "whole number"),
    ({"method": "ngram", "num_speculative_tokens": True}, "whole number"),
    ({"method": "ngram", "num_speculative_tokens": 0}, "1 to 32"),
    ({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 1, "prompt_lookup_min": 2}, "shortest"),
    ({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_mx": 1}, "prompt_lookup_max"),
    ([4], "must be a mapping"),
    ("ngram", "must be a mapping"),
]


@pytest.mark.parametrize(("given_config", "reason"), REFUSED, ids=str)
def test_what_the_mapping_cannot_have_is_told(given_config: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"^speculative") as problem:
        from_kwargs(EngineConfig, {"speculative_config": given_config})
    assert reason in str(problem.value) and "\n" not in str(problem.value)
