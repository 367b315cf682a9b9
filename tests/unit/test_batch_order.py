"""The order of a batch: each request once, like beginnings together, both resources in even parts."""

from __future__ import annotations

import random
from itertools import accumulate, groupby

import pytest
from benchmarks.predictions import batch_order
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.batch_files.order import RequestCost, order_requests
from nanoflow.cost.model import costed_model
from nanoflow.cost.requests import request_cost
from nanoflow.hardware import parse_gpus
from nanoflow.models.presets import preset_config
from nanoflow.workload import Lengths

COST = request_cost(costed_model(preset_config("llama-3-8b")), parse_gpus("h200").sustained_rates())


def length(num_prompt: int, num_output: int) -> Lengths:
    return Lengths(num_prompt_tokens=num_prompt, num_output_tokens=num_output)


def test_costs_are_those_of_the_model() -> None:
    rates = parse_gpus("h200").sustained_rates()
    one = RequestCost(token_s=2.0, key_s=3.0)
    assert one.compute_s(length(10, 4)) == 28.0
    assert one.memory_s(length(10, 4)) == 3.0 * 4 * 12
    assert COST.token_s == pytest.approx(2 * 8.03e9 / rates.compute_flops_per_s, rel=0.01)
    assert COST.key_s == pytest.approx(131_072 / rates.memory_bytes_per_s)  # 32 layers, 8 heads of 128, keys and values


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 3000), st.sampled_from([b"", b"aa", b"ab", b"b"]))),
    st.integers(1, 3),
)
def test_every_request_is_sent_once(asked: list[tuple[int, int, bytes]], min_shared: int) -> None:
    lengths = [length(prompt, output) for prompt, output, _ in asked]
    order = order_requests(lengths, [prefix for _, _, prefix in asked], COST, min_shared=min_shared)
    assert sorted(order) == list(range(len(asked)))


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_both_resources_are_used_in_even_parts(is_shuffled: bool) -> None:
    lengths = [length(8000, 100)] * 50 + [length(200, 1000)] * 300 + [length(1000, 300)] * 50
    if is_shuffled:
        random.Random(1).shuffle(lengths)
    order = order_requests(lengths, [b""] * len(lengths), COST)
    compute = list(accumulate(COST.compute_s(lengths[place]) for place in order))
    memory = list(accumulate(COST.memory_s(lengths[place]) for place in order))
    largest = COST.compute_s(length(8000, 100)) / compute[-1]
    assert all(
        abs(one / compute[-1] - other / memory[-1]) <= 2 * largest for one, other in zip(compute, memory, strict=True)
    )
    # As they came, one resource was far ahead.
    if not is_shuffled:
        came = sum(COST.compute_s(each) for each in lengths[:50]) / compute[-1]
        assert came - sum(COST.memory_s(each) for each in lengths[:50]) / memory[-1] > 0.3


def test_requests_that_begin_alike_are_sent_together() -> None:
    systems = [bytes([65 + kind]) * 300 for kind in range(12)]
    asked = [(kind, number) for kind in range(12) for number in range(20)]
    random.Random(0).shuffle(asked)
    # Half of the kinds are heavy in compute, half in memory.
    lengths = [length(6000, 50) if kind % 2 else length(400, 900) for kind, _ in asked]
    order = order_requests(lengths, [systems[kind] + b"%d" % number for kind, number in asked], COST)
    for parity in (0, 1):
        kinds = [asked[place][0] for place in order if asked[place][0] % 2 == parity]
        assert len(list(groupby(kinds))) == 6


def test_what_begins_alike_by_chance_only_is_no_group() -> None:
    lengths = [length(8000, 100), length(200, 1000)] * 20
    short = order_requests(lengths, [b"ab"[place // 2 % 2 :] for place in range(40)], COST)
    assert short == order_requests(lengths, [b""] * 40, COST)


def test_a_common_beginning_of_all_does_not_keep_kinds_apart() -> None:
    lengths = [length(8000, 100)] * 20 + [length(200, 1000)] * 160
    order = order_requests(lengths, [b"x" * 300] * 180, COST)
    kinds = [lengths[place].num_prompt_tokens for place in order]
    assert 5 <= kinds[:90].count(8000) <= 15


def test_token_ids_are_prefixes_too() -> None:
    prefixes = [[1, 2, 3], [4, 5, 6], [1, 2, 9], [4, 5, 7]]
    order = order_requests([length(10, 10)] * 4, prefixes, COST, min_shared=2)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def test_the_benchmark_orders_what_came() -> None:
    mix = "8000/100x3,200/1000x9"
    first, last, mixed = (batch_order.arrived(mix, arrival, 0) for arrival in batch_order.ARRIVALS)
    assert first[0].num_prompt_tokens == last[-1].num_prompt_tokens == 8000 and sorted(map(str, mixed)) == sorted(
        map(str, first)
    )
    ordered = batch_order.ordered(first, COST, 4)
    assert sorted(map(str, ordered[:4])) == sorted(map(str, first[:4]))
