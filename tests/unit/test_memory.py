"""What fits is computed from numbers alone, and what does not is said with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine import memory
from nanoflow.models.config import parse
from nanoflow.models.registry import build_graph
from tests.unit.test_plan import LLAMA

# 2 (keys, values) x 3 layers x 2 KV heads x 16 x 4 bytes x 16 tokens a page
PAGE_BYTES = 2 * 3 * 2 * 16 * 4 * 16
MODEL = parse(LLAMA)
GRAPH = build_graph(MODEL, None)


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    def run(
        device: str, free_pages: float, total_pages: float = 0, sampling_pages: float = 0, **options: Any
    ) -> tuple[int, int]:
        monkeypatch.setattr(memory, "free_memory_bytes", lambda _: int(free_pages * PAGE_BYTES))
        monkeypatch.setattr(memory, "sampling_bytes", lambda *_: int(sampling_pages * PAGE_BYTES))
        monkeypatch.setattr(memory, "total_memory_bytes", lambda _: int(total_pages * PAGE_BYTES))
        return memory.size_cache(EngineConfig(**options), MODEL, GRAPH, torch.float32, torch.device(device))

    return run


Size = Callable[..., tuple[int, int]]


def test_pages_take_what_utilization_leaves_on_a_gpu(size: Size) -> None:
    assert size("cuda", 700, 1000, gpu_memory_utilization=0.9) == (600, 256)
    assert size("cuda", 700, 1000, gpu_memory_utilization=0.5) == (200, 256)


def test_what_sampling_takes_on_a_gpu_is_no_room_for_pages(size: Size) -> None:
    assert size("cuda", 700, 1000, sampling_pages=50, gpu_memory_utilization=0.9) == (550, 256)
    assert size("cpu", 100, sampling_pages=50) == (40, 256)


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


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    needed, cpu = GRAPH.num_parameters * 4, torch.device("cpu")
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: needed)
    memory.require_room_for_weights(GRAPH, torch.float32, cpu)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: needed - 1)
    with pytest.raises(ConfigError, match=r"the weights of .* take 0\.0 GiB in float32, cpu has 0\.0 GiB free"):
        memory.require_room_for_weights(GRAPH, torch.float32, cpu)
