"""What a KV cache in 8 bits changes around the kernels: which of them are chosen, sizes, costs, options."""

from __future__ import annotations

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.cli.main import main
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.cost.model import costed_model
from nanoflow.engine.tier_memory import fingerprint_of
from nanoflow.executor.buffers import allocate_caches, draw_keys
from nanoflow.graph.operation import BatchShape, KvType, OpKind
from nanoflow.hardware import parse_gpus
from nanoflow.kernels import triton_attention
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.kernels.hopper import attention, can_carry
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.option_names import from_kwargs
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.table import CostTable, Profile
from nanoflow.simulate.iteration import graphs_of

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
PLAIN = build_graph(preset_config("llama-3-8b"), None)
SMALL = PLAIN.with_kv_type(KvType.FP8)
SHAPE = BatchShape(num_tokens=100, num_decode_tokens=60, decode_context=6000, prefill_context=800, prefill_kv_tokens=40)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))


def test_decode_attention_of_8_bits_runs_in_gluon_on_hopper(hopper: None) -> None:
    plain, small = (kernels_for(GPU, torch.bfloat16, graph.layer) for graph in (PLAIN, SMALL))
    assert small == plain and small[OpKind.DECODE_ATTENTION] is attention.decode_attention


def test_it_runs_in_triton_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (8, 9))
    kernels = kernels_for(GPU, torch.bfloat16, SMALL.layer)
    assert kernels[OpKind.DECODE_ATTENTION] is triton_attention.decode_attention


def test_products_do_not_carry_attention_of_8_bits(hopper: None) -> None:
    plain, small = PLAIN.kinds[0].attention, SMALL.kinds[0].attention
    assert can_carry(GPU, torch.bfloat16, plain) and not can_carry(GPU, torch.bfloat16, small)


def test_a_gpu_without_8_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (8, 6))
    assert kernels_for(GPU, torch.bfloat16, PLAIN.layer)
    with pytest.raises(ValueError, match=r"kv_cache_dtype fp8_e4m3 needs .* 8\.9 or more, this one has 8\.6: use auto"):
        kernels_for(GPU, torch.bfloat16, SMALL.layer)


def test_bytes_follow_from_the_type() -> None:
    """A vector of 128 elements takes 130 bytes: 128 numbers and a scale."""
    assert PLAIN.kv_bytes_per_token(2) == 32 * 2 * 8 * 256
    assert SMALL.kv_bytes_per_token(2) == SMALL.kv_bytes_per_token(4) == 32 * 2 * 8 * 130
    assert [group.bytes_per_token(2) for group in SMALL.kv_groups] == [SMALL.kv_bytes_per_token(2)]
    caches = allocate_caches(SMALL, num_pages=3, page_size=16, dtype=torch.bfloat16, device=CPU)
    held = sum(part.nbytes for cache in caches for part in cache.parts)
    assert held == 3 * 16 * SMALL.kv_bytes_per_token(2)
    for plain, small in zip(PLAIN.layer, SMALL.layer, strict=True):
        keys = {OpKind.ROPE_APPEND: 100, OpKind.DECODE_ATTENTION: 6000, OpKind.PREFILL_ATTENTION: 40}.get(plain.kind, 0)
        assert plain.memory_bytes(SHAPE, 2) - small.memory_bytes(SHAPE, 2) == keys * 2 * 8 * (256 - 130)
        assert plain.flops(SHAPE) == small.flops(SHAPE)


def test_costs_count_the_keys_of_the_type() -> None:
    config = preset_config("llama-3-8b")
    plain, small = costed_model(config), costed_model(config, kv_type=KvType.FP8)
    assert small.kv_bytes(1000) / plain.kv_bytes(1000) == 130 / 256
    assert small.weight_bytes == plain.weight_bytes


def test_random_keys_in_8_bits_are_numbers() -> None:
    graph = SMALL.with_layers(SMALL.layers[:1])
    (cache,) = allocate_caches(graph, num_pages=5, page_size=4, dtype=torch.bfloat16, device=CPU)
    draw_keys([cache], seed=1)
    assert cache.scales is not None and (cache.scales > 0).all() and cache.scales.isfinite().all()
    assert cache.keys.float().abs().amax(-1).min() == 448 and cache.values.float().isfinite().all()


@pytest.mark.parametrize(("given", "stored"), [("auto", "auto"), ("fp8", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3")])
def test_names_of_the_type(given: str, stored: str) -> None:
    assert from_kwargs(EngineConfig, {"kv_cache_dtype": given}).kv_cache_dtype == stored
    assert KvType(stored)


@pytest.mark.parametrize("given", ["fp8_e5m2", "int4"])
def test_other_types_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=f"kv_cache_dtype.*fp8_e4m3|'{given}' is not possible"):
        from_kwargs(EngineConfig, {"kv_cache_dtype": given})


def test_a_store_on_disk_is_of_one_type() -> None:
    texts = {
        fingerprint_of(None, EngineConfig(kv_cache_dtype=kv_type), name="m", device="cpu", dtype="float32")
        for kv_type in ("auto", "fp8_e4m3")
    }
    assert len(texts) == 2


def test_a_profile_knows_its_type() -> None:
    """What is simulated or searched from it has pages of that type, and attention that reads fewer bytes."""
    gpus = parse_gpus("h200")
    plain, small = (
        estimated_profile("preset:llama-3-8b", PRESETS["llama-3-8b"], gpus, 256, kv_type=kv_type) for kv_type in KvType
    )
    read = Profile.from_json(small.to_json())
    assert read.kv_cache_dtype is KvType.FP8 and plain.kv_cache_dtype is KvType.MODEL
    (graph,) = graphs_of(read)
    assert graph.kv_bytes_per_token(2) == SMALL.kv_bytes_per_token(2)
    times = {
        profile.kv_cache_dtype: CostTable(profile, graphs_of(profile)[0]).cost("decode_attention", 256, 4096).time_s
        for profile in (plain, read)
    }
    assert times[KvType.FP8] / times[KvType.MODEL] == pytest.approx(130 / 256, rel=0.01)


def test_analyze_tells_the_bytes_of_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    for given, num_bytes in (("auto", "131,072"), ("fp8", "66,560")):
        assert main(["analyze", "preset:llama-3-8b", "--kv-cache-dtype", given]) == 0
        assert f"KV cache    {num_bytes} bytes a token\n" in capsys.readouterr().out
