"""The limits of an engine: which are chosen where, what wins over what, and that what is chosen fits."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.config import EngineConfig, Goal
from nanoflow.device.rough_rates import rough_cpu_flops_per_s, rough_gpu_flops_per_s
from nanoflow.engine import limits
from nanoflow.engine.limits import EngineLimits, choose_limits, row_bytes
from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.graph import OpGraph
from nanoflow.hardware import LocalDevice
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import BookLimits, PlanEntry, StoredBook
from nanoflow.plan.liveness import workspace_bytes
from nanoflow.plan.sequential import sequential_plan

GIB = 2**30
GOALS: tuple[Goal, ...] = ("throughput", "balanced", "latency")


def gpu(name: str, capability: tuple[int, int], num_sms: int, gib: float, free_gib: float | None = None) -> LocalDevice:
    return LocalDevice(
        name=name,
        is_gpu=True,
        memory_bytes=int(gib * GIB),
        free_bytes=int((gib if free_gib is None else free_gib) * GIB),
        flops_per_s=rough_gpu_flops_per_s(capability, num_sms),
    )


def cpu(cores: int, gib: float) -> LocalDevice:
    flops_per_s = rough_cpu_flops_per_s(cores)
    return LocalDevice(
        name="the CPU", is_gpu=False, memory_bytes=int(gib * GIB), free_bytes=int(gib * GIB), flops_per_s=flops_per_s
    )


H200 = gpu("H200", (9, 0), 132, 139.8)
B200 = gpu("B200", (10, 0), 148, 180)
L4 = gpu("L4", (8, 9), 58, 22)
CARD_24 = gpu("a card", (8, 9), 128, 24)
LAPTOP = cpu(8, 32)


def graph_of(preset: str) -> OpGraph:
    return build_graph(preset_config(preset), None)


def chosen(
    preset: str,
    device: LocalDevice,
    goal: Goal = "balanced",
    book: StoredBook | None = None,
    max_model_len: int = 8192,
    **options: Any,
) -> EngineLimits:
    return choose_limits(
        EngineConfig(goal=goal, **options),
        graph_of(preset),
        device,
        max_model_len=max_model_len,
        dtype_bytes=2 if device.is_gpu else 4,
        book=book,
    )


def numbers(found: EngineLimits) -> tuple[int, int, float | None]:
    return found.max_batch_tokens, found.max_num_seqs, found.max_itl_ms


# --- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "device", "goal", "expected"),
    [
        ("llama-3-8b", H200, "throughput", (2048, 2048, None)),
        ("llama-3-8b", H200, "balanced", (2048, 2048, 75.0)),
        ("llama-3-8b", H200, "latency", (1024, 256, 25.0)),
        # A small model: more tokens in the same time.
        ("llama-3.2-1b", H200, "throughput", (8192, 2048, None)),
        ("llama-3.2-1b", H200, "balanced", (8192, 2048, 75.0)),
        # Few pages: 6.6 GiB hold 50,000 tokens.
        ("llama-3-8b", CARD_24, "throughput", (2048, 208, None)),
        # A slow card: fewer than 1,024 tokens would use it badly, and those take 325 ms.
        ("llama-3-8b", L4, "balanced", (1024, 152, 325.0)),
        # A large model: the same.
        ("llama-3-70b", B200, "balanced", (1024, 384, 94.0)),
        # The KV pages of a CPU are 1 GiB if nothing else is asked for.
        ("qwen2.5-0.5b", LAPTOP, "throughput", (2048, 168, None)),
        ("qwen2.5-0.5b", LAPTOP, "balanced", (512, 168, None)),
        ("qwen2.5-0.5b", LAPTOP, "latency", (128, 64, None)),
    ],
)
def test_what_is_chosen(preset: str, device: LocalDevice, goal: Goal, expected: tuple[int, int, float | None]) -> None:
    found = chosen(preset, device, goal)
    assert numbers(found) == expected and found.goal == goal
    assert (found.max_batch_tokens_origin, found.max_num_seqs_origin, found.max_itl_ms_origin) == ("chosen",) * 3


def test_a_model_in_fp8_takes_more_tokens_in_the_same_time_and_leaves_more_pages() -> None:
    graph = in_fp8(graph_of("llama-3-8b"))
    large, small = (
        choose_limits(EngineConfig(goal="throughput"), graph, card, max_model_len=8192, dtype_bytes=2)
        for card in (H200, CARD_24)
    )
    assert large.max_batch_tokens > 1.5 * chosen("llama-3-8b", H200, "throughput").max_batch_tokens
    assert small.max_num_seqs > 1.5 * chosen("llama-3-8b", CARD_24, "throughput").max_num_seqs


def test_a_token_of_a_mixture_of_experts_takes_the_time_of_those_that_it_passes() -> None:
    """Two of eight: 12.9e9 of 46.7e9 parameters, and half of that time in FP8."""
    graphs = graph_of("mixtral-8x7b"), in_fp8(graph_of("mixtral-8x7b"))
    plain, quantised = (
        choose_limits(EngineConfig(goal="balanced"), graph, H200, max_model_len=8192, dtype_bytes=2) for graph in graphs
    )
    assert plain.max_batch_tokens >= 1024 and quantised.max_batch_tokens == 2 * plain.max_batch_tokens


def test_long_contexts_and_large_vocabularies_have_room() -> None:
    """Page tables and logits of each row count, so rows are fewer on a card with less memory."""
    small = gpu("a card", (9, 0), 132, 24)
    plain = chosen("llama-3.2-1b", small, "throughput").max_num_seqs
    assert chosen("llama-3.2-1b", small, "throughput", max_model_len=131072).max_num_seqs < plain < 2048
    graph = dataclasses.replace(graph_of("llama-3.2-1b"), vocab_size=512000)
    wide = choose_limits(EngineConfig(goal="throughput"), graph, small, max_model_len=8192, dtype_bytes=2)
    assert wide.max_num_seqs < plain / 3 and "2% of the memory" in wide.reason


# --- what wins -----------------------------------------------------------------------------------------------------


def book_of(max_tokens: int, own: BookLimits | None = None) -> StoredBook:
    plan = sequential_plan(graph_of("llama-3-8b"), max_tokens)
    return StoredBook(entries=(PlanEntry(plan=plan, min_tokens=1, max_tokens=max_tokens),), limits=own)


BOOK = book_of(4096, BookLimits(max_batch_tokens=4096, max_num_seqs=1536))


@pytest.mark.parametrize("goal", GOALS)
def test_a_book_wins_over_the_goal(goal: Goal) -> None:
    found = chosen("llama-3-8b", H200, goal, BOOK)
    assert numbers(found)[:2] == (4096, 1536)
    assert (found.max_batch_tokens_origin, found.max_num_seqs_origin) == ("book", "book")
    assert found.max_itl_ms_origin == "chosen" and found.reason.count("the plan book was made for it") == 2


def test_a_book_without_limits_sets_the_budget_to_its_largest_batch() -> None:
    found = chosen("llama-3-8b", H200, "throughput", book_of(2048))
    assert numbers(found)[:2] == (2048, 2048)
    assert (found.max_batch_tokens_origin, found.max_num_seqs_origin) == ("book", "chosen")
    # Not to less than is fast: what is larger than the book runs sequentially.
    assert chosen("llama-3-8b", H200, "throughput", book_of(64)).max_batch_tokens == 2048
    assert chosen("llama-3-8b", H200, "throughput", StoredBook(entries=())).max_batch_tokens == 2048


def test_numbers_that_are_given_win_over_all() -> None:
    found = chosen("llama-3-8b", H200, "latency", BOOK, max_batch_tokens=600, max_num_seqs=7, max_itl_ms=33.0)
    assert numbers(found) == (600, 7, 33.0)
    assert (found.max_batch_tokens_origin, found.max_num_seqs_origin, found.max_itl_ms_origin) == ("given",) * 3
    alone = chosen("llama-3-8b", H200, "throughput", BOOK, max_num_seqs=7)
    assert numbers(alone)[:2] == (4096, 7)


def test_what_is_chosen_goes_with_what_is_given() -> None:
    assert chosen("llama-3-8b", H200, max_batch_tokens=32).max_num_seqs == 32
    assert chosen("llama-3-8b", H200, max_num_seqs=5000).max_batch_tokens == 5000
    assert chosen("llama-3-8b", H200, num_pages=100).max_num_seqs == 8
    assert chosen("llama-3-8b", H200, kv_cache_gib=4.0).max_num_seqs == 128
    assert chosen("llama-3-8b", H200, max_batch_tokens=8192).max_itl_ms == 195.0


# --- what holds everywhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("preset", ["llama-3.2-1b", "llama-3-8b", "qwen2.5-7b", "llama-3-70b"])
def test_more_memory_never_gives_smaller_limits(preset: str, goal: Goal) -> None:
    sizes = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192, 288)
    found = [chosen(preset, gpu("a card", (9, 0), 132, gib), goal) for gib in sizes]
    for less, more in itertools.pairwise(found):
        assert less.max_batch_tokens <= more.max_batch_tokens and less.max_num_seqs <= more.max_num_seqs


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from(["llama-3.2-1b", "llama-3-8b", "qwen2.5-0.5b"]),
    goal=st.sampled_from(GOALS),
    gib=st.floats(18, 200),
    part_free=st.floats(0.5, 1),
    max_model_len=st.sampled_from([128, 4096, 131072]),
)
def test_what_is_chosen_fits(preset: str, goal: Goal, gib: float, part_free: float, max_model_len: int) -> None:
    device = gpu("a card", (9, 0), 132, gib, gib * part_free)
    found, graph = chosen(preset, device, goal, max_model_len=max_model_len), graph_of(preset)
    tensors = workspace_bytes(
        graph,
        [sequential_plan(graph, found.max_batch_tokens)],
        num_tokens=found.max_batch_tokens,
        num_logits=found.max_num_seqs,
        dtype_bytes=2,
    )
    a_row = row_bytes(graph, max_model_len=max_model_len, page_size=16, dtype_bytes=2)
    counted = a_row - graph.vocab_size * 2
    assert tensors + found.max_num_seqs * counted <= 0.06 * device.memory_bytes
    room = device.free_bytes - graph.num_parameters * 2 - 0.1 * device.memory_bytes
    held = max(room, 0) / graph.kv_bytes_per_token(2)
    assert found.max_num_seqs <= max(held / min(max_model_len, 256), 8)
    assert found.max_num_seqs <= found.max_batch_tokens


def test_goals_are_in_order() -> None:
    for device in (H200, B200, L4, CARD_24, LAPTOP):
        most, middle, least = (chosen("qwen2.5-0.5b", device, goal) for goal in GOALS)
        assert most.max_batch_tokens >= middle.max_batch_tokens >= least.max_batch_tokens
        assert most.max_num_seqs >= middle.max_num_seqs >= least.max_num_seqs


def test_every_goal_is_in_the_tables() -> None:
    assert set(limits.ON_GPU) == set(limits.ON_CPU) == set(GOALS)


def test_the_reason_is_one_line_that_says_all_of_it() -> None:
    found = chosen("llama-3-8b", H200, "balanced", max_num_seqs=100)
    assert found.reason == (
        "limits for balanced: max_batch_tokens 2,048 (about 50 ms an iteration on H200), "
        "max_num_seqs 100 (given), gaps of at most 75 ms between tokens (goal balanced)"
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=EngineLimits) == found


@pytest.mark.parametrize(
    ("capability", "num_sms", "low", "high"),
    [
        ((9, 0), 132, 650e12, 700e12),
        ((8, 0), 108, 250e12, 270e12),
        ((7, 5), 40, 10e12, 65e12),
        ((12, 0), 170, 1e14, 2e15),
    ],
)
def test_the_speed_of_a_gpu_is_that_of_one_like_it(
    capability: tuple[int, int], num_sms: int, low: float, high: float
) -> None:
    assert low <= rough_gpu_flops_per_s(capability, num_sms) <= high
