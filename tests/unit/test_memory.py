"""What fits is computed from numbers alone, and what does not is said with them."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow.cli.generate import for_so_many
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine import limits, memory
from nanoflow.engine.limits import choose_limits
from nanoflow.executor.buffers import allocate_caches
from nanoflow.hardware import LocalDevice
from nanoflow.kvcache import PoolSize
from nanoflow.models.config_json import parse
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from tests.unit.test_plan import LLAMA

# 2 (keys, values) x 3 layers x 2 KV heads x 16 x 4 bytes x 16 tokens a page
PAGE_BYTES = 2 * 3 * 2 * 16 * 4 * 16
MODEL = parse(LLAMA)
GRAPH = build_graph(MODEL, None)


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    def run(
        device: str, free_pages: float, total_pages: float = 0, taken_pages: float = 0, **options: Any
    ) -> tuple[int, int]:
        monkeypatch.setattr(memory, "free_memory_bytes", lambda _: int(free_pages * PAGE_BYTES))
        monkeypatch.setattr(memory, "total_memory_bytes", lambda _: int(total_pages * PAGE_BYTES))
        config = EngineConfig(**{"max_batch_tokens": 2048, "max_num_seqs": 256, **options})
        somewhere = LocalDevice(name=device, is_gpu=device == "cuda", memory_bytes=1, free_bytes=1, flops_per_s=1.0)
        limits = choose_limits(config, GRAPH, somewhere, max_model_len=256, dtype_bytes=4)
        (pool,), longest = memory.size_cache(
            config,
            limits,
            MODEL,
            GRAPH,
            torch.float32,
            torch.device(device),
            taken_bytes=int(taken_pages * PAGE_BYTES),
        )
        assert pool.window is None
        return pool.num_pages, longest

    return run


Size = Callable[..., tuple[int, int]]


def test_pages_take_what_utilization_leaves_on_a_gpu(size: Size) -> None:
    assert size("cuda", 700, 1000, gpu_memory_utilization=0.9) == (600, 256)
    assert size("cuda", 700, 1000, gpu_memory_utilization=0.5) == (200, 256)


def test_all_of_a_gpu_may_be_used(size: Size) -> None:
    assert size("cuda", 700, 1000, gpu_memory_utilization=1.0) == (700, 256)


@pytest.mark.parametrize("part", [1.0001, 90.0, 0.0, -0.5, float("nan"), float("inf")])
def test_what_is_no_part_of_the_memory_is_refused(part: float) -> None:
    with pytest.raises(ConfigError, match=rf"gpu_memory_utilization must be in \(0, 1\], got {part}"):
        EngineConfig(gpu_memory_utilization=part)


def test_what_is_allocated_later_stays_free_on_a_gpu(size: Size) -> None:
    assert size("cuda", 700, 1000, 50, gpu_memory_utilization=0.9) == (550, 256)
    assert size("cpu", 1000, 0, 50) == (400, 256)


def test_no_more_pages_than_all_requests_can_use(size: Size) -> None:
    assert size("cuda", 10**6, 10**6, max_num_seqs=3) == (3 * 16, 256)
    assert size("cpu", 10**6, max_num_seqs=3, max_model_len=100) == (3 * 7, 100)


def test_a_part_of_the_free_memory_on_a_cpu(size: Size) -> None:
    assert size("cpu", 100) == (40, 256)


def test_the_context_is_cut_to_the_pages_unless_it_was_asked_for(size: Size) -> None:
    assert size("cpu", 10) == (4, 64)
    with pytest.raises(ConfigError, match=r"4 KV pages of 16 tokens .* hold 64 tokens, fewer than the 65 of max_mod"):
        size("cpu", 10, max_model_len=65)


@pytest.mark.parametrize(
    ("device", "options", "named"),
    [
        ("cpu", {}, "kv_cache_gib"),
        ("cuda", {}, "gpu_memory_utilization"),
        ("cuda", {"kv_cache_gib": 1e-9}, "kv_cache_gib"),
        ("cuda", {"num_pages": 1}, "num_pages"),
    ],
)
def test_what_to_raise_is_named(size: Size, device: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"lower max_model_len, or raise {named}"):
        size(device, 0.1, 100, max_model_len=200, **options)


def test_a_length_beyond_the_models_is_refused(size: Size) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 257, the model was made for at most 256 tokens"):
        size("cpu", 1000, max_model_len=257)


@pytest.mark.parametrize(
    ("rope", "by_default", "longest"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256, 256),
        ({"rope_type": "yarn", "factor": 4.0}, 256, 256),
        ({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 64, 64),
        # Beyond 64 it changes the frequencies of all positions: not by default, and then to any length.
        ({"rope_type": "dynamic", "factor": 4.0}, 64, None),
    ],
)
def test_the_length_that_a_rotary_embedding_stretches_to(
    rope: dict[str, Any], by_default: int, longest: int | None
) -> None:
    model = parse({**LLAMA, "max_position_embeddings": 64, "rope_scaling": rope})
    assert memory.wanted_model_len(EngineConfig(), model) == by_default
    for length in (longest or 1000, by_default - 1):
        assert memory.wanted_model_len(EngineConfig(max_model_len=length), model) == length
    if longest is not None:
        with pytest.raises(ConfigError, match=f"the model was made for at most {longest} tokens"):
            memory.wanted_model_len(EngineConfig(max_model_len=longest + 1), model)


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    needed, cpu = GRAPH.num_parameters * 4, torch.device("cpu")
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: needed)
    memory.require_room_for_weights(GRAPH, torch.float32, cpu)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: needed - 1)
    with pytest.raises(ConfigError, match=r"the weights of .* take 0\.0 GiB in float32, cpu has 0\.0 GiB free"):
        memory.require_room_for_weights(GRAPH, torch.float32, cpu)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to be told of memory")
def test_caches_of_a_cpu_take_memory_only_where_something_is_written() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    num_pages = 2**30 // PAGE_BYTES
    caches = allocate_caches(GRAPH, num_pages=num_pages, page_size=16, dtype=torch.bfloat16, device=torch.device("cpu"))
    num_bytes = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
    assert num_bytes > 2**28
    # Threads of other tests may take some memory at the same time.
    assert resident_bytes() - before < num_bytes / 2
    keys = caches[1].keys
    assert keys.dtype == torch.bfloat16 and keys.is_contiguous() and not keys[7].any()
    keys[7] += 1
    assert not keys[8].any() and not caches[1].values.any()


def test_pages_of_a_cpu_are_few_unless_one_request_needs_more(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_CPU_CACHE_BYTES", 100 * PAGE_BYTES)
    assert size("cpu", 1000) == (100, 256)
    assert size("cpu", 1000, kv_cache_gib=500 * PAGE_BYTES / 2**30) == (500, 256)
    # Not more than a part of what is free, and not more than all requests can use.
    assert size("cpu", 50) == (20, 256)
    assert size("cpu", 1000, max_num_seqs=2) == (32, 256)
    monkeypatch.setattr(limits, "_CPU_CACHE_BYTES", 10 * PAGE_BYTES)
    assert size("cpu", 1000) == (16, 256)


def test_layers_with_a_window_leave_their_share_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four requests of 4,000 tokens in a window of 512: 22 layers have fewer pages, 4 have what that saves."""
    model = preset_config("gemma-3-1b")
    graph = build_graph(model, None)
    full, windowed = graph.kv_groups
    assert (full.window, windowed.window) == (None, 512)
    assert (len(full.layers), len(windowed.layers)) == (4, 22) and set(full.layers) == {5, 11, 17, 23}
    assert full.bytes_per_token(2) + windowed.bytes_per_token(2) == graph.kv_bytes_per_token(2)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: 2**40)
    monkeypatch.setattr(memory, "total_memory_bytes", lambda _: 2**40)
    somewhere = LocalDevice(name="cuda", is_gpu=True, memory_bytes=1, free_bytes=1, flops_per_s=1.0)

    def sizes(**options: Any) -> tuple[list[int], int]:
        config = EngineConfig(**{"max_batch_tokens": 256, "max_num_seqs": 4, "max_model_len": 4000, **options})
        chosen = choose_limits(config, graph, somewhere, max_model_len=4000, dtype_bytes=2)
        pools, longest = memory.size_cache(config, chosen, model, graph, torch.bfloat16, torch.device("cuda"))
        assert [pool.window for pool in pools] == [None, 512]
        return [pool.num_pages for pool in pools], longest

    most_windowed = 4 * 34 + 16
    assert sizes() == ([4 * 250, most_windowed], 4000)
    page_bytes = [2 * 16 * 2 * 256 * len(group.layers) for group in graph.kv_groups]
    gib = (most_windowed * page_bytes[1] + 700 * page_bytes[0]) / 2**30
    assert sizes(kv_cache_gib=gib) == ([700, most_windowed], 4000)
    assert sizes(num_pages=300) == ([300, most_windowed], 4000)
    with pytest.raises(ConfigError, match=r"200 \(152 in layers with a window of 512\) KV pages .* hold 3200 tokens"):
        sizes(num_pages=200)
    assert sizes(num_pages=300, max_num_seqs=100) == ([300, 300], 4000)


def test_pages_that_the_system_refuses_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(memory, "allocate_caches", refuse)
    with pytest.raises(
        ConfigError, match=r"does not let this process reserve 0\.01 GiB for KV pages: lower kv_cache_gib"
    ):
        memory.reserve_caches(
            GRAPH, [PoolSize(num_pages=1000)], page_size=16, dtype=torch.float32, device=torch.device("cpu")
        )


def test_one_off_commands_have_rows_for_their_requests_alone() -> None:
    assert for_so_many(EngineConfig(), 3).max_num_seqs == 3
    assert for_so_many(EngineConfig(max_num_seqs=9), 3).max_num_seqs == 9
    assert for_so_many(EngineConfig(plan="book.json"), 3).max_num_seqs is None
    assert for_so_many(EngineConfig(), 1000).max_num_seqs is None
