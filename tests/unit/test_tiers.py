"""Counts of the tiers of the KV cache: how they are added up, and as which metrics they are shown."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.messages import EngineStats, Prefetch
from nanoflow.kvcache.keys import page_keys, root_key
from nanoflow.kvcache.tier_counts import COUNTERS, TIERS, TierCounts, total
from nanoflow.request import Request, SamplingParams
from nanoflow.server.lasting import LastingEngine
from nanoflow.server.metrics import ServerMetrics
from tests.fake_async_engine import FakeAsyncEngine
from tests.toy_models import ENGINE_OPTIONS, write_toy_model

DEVICE = TierCounts(queries=100, hits=60, evictions=5, capacity_bytes=4000, used_bytes=1000)
HOST = TierCounts(
    queries=40, hits=30, stored_bytes=700, loaded_bytes=300, load_seconds=0.5, evictions=2, capacity_bytes=9000
)
DISK = TierCounts(queries=10, hits=1, stored_bytes=50, loaded_bytes=20, load_seconds=0.25)


def shown(engine: Any, prefix: str = "nanoflow") -> dict[str, float]:
    """The metrics of tiers, by name and tier."""
    text = ServerMetrics(engine, prefix=prefix, model_name="toy").render().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix(f"{prefix}:")
            if name.startswith(("kv_tier", "kv_offload", "external")):
                assert sample.labels["model_name"] == "toy"
                found[" ".join(filter(None, (name, sample.labels.get("tier"))))] = sample.value
    return found


def engine_with(**tiers: TierCounts) -> Any:
    return SimpleNamespace(observer=None, is_alive=True, facts=FakeAsyncEngine().facts, stats=EngineStats(tiers=tiers))


def test_tiers_are_shown_one_by_one_and_below_the_device_together() -> None:
    found = shown(engine_with(device=DEVICE, host=HOST, disk=DISK), "vllm")
    for tier, counts in {"device": DEVICE, "host": HOST, "disk": DISK}.items():
        for name in COUNTERS:
            assert found[f"kv_tier_{name}_total {tier}"] == getattr(counts, name)
        for name in ("used_bytes", "capacity_bytes"):
            assert found[f"kv_tier_{name} {tier}"] == getattr(counts, name)
    assert {name: value for name, value in found.items() if not name.startswith("kv_tier")} == {
        "external_prefix_cache_queries_total": 50,
        "external_prefix_cache_hits_total": 31,
        "kv_offload_store_bytes_total": 750,
        "kv_offload_load_bytes_total": 320,
        "kv_offload_load_time_total": 0.75,
    }


def test_without_lower_tiers_there_are_the_device_and_zeros() -> None:
    found = shown(engine_with(device=DEVICE))
    assert {name.partition(" ")[2] for name in found} == {"device", ""}
    assert found["external_prefix_cache_hits_total"] == found["kv_offload_load_time_total"] == 0
    assert {name for name in shown(engine_with()) if name.startswith("kv_tier")} == set()


def test_every_field_is_shown_and_added() -> None:
    ones = TierCounts(**{field.name: 1 for field in fields(TierCounts)})
    assert total([ones, ones, ones]) == TierCounts(**{field.name: 3 for field in fields(TierCounts)})
    assert total([]) == TierCounts()
    assert {name for name in TierCounts.__slots__ if getattr(ones.counters, name)} == set(COUNTERS)
    assert sum(1 for name in shown(engine_with(host=ones)) if name.startswith("kv_tier")) == len(fields(TierCounts))


def test_an_engine_that_is_started_again_counts_on() -> None:
    first, second = engine_with(device=DEVICE, host=HOST), engine_with(device=DEVICE, disk=DISK)
    lasting = LastingEngine(first)
    assert lasting.stats.tiers == {"device": DEVICE, "host": HOST}
    first.is_alive = False
    assert lasting.stats.tiers["device"] == DEVICE.counters, "a dead engine uses no memory"
    lasting.replace(second)
    tiers = lasting.stats.tiers
    assert tiers["device"] == DEVICE.counters + DEVICE and tiers["device"].used_bytes == 1000
    assert tiers["host"] == HOST.counters and tiers["disk"] == DISK
    assert tiers["device"].hits == 120
    lasting.replace(engine_with())
    assert lasting.stats.tiers["device"] == (DEVICE + DEVICE).counters


def test_the_device_counts_tokens_pages_and_bytes(tmp_path: Path) -> None:
    """A toy model with few pages, so that some are taken for others."""
    config = EngineConfig(
        model=str(write_toy_model(tmp_path)), **{**ENGINE_OPTIONS, "num_pages": 12, "max_model_len": 64, "page_size": 8}
    )
    engine = build_engine(config)
    page_bytes = sum(engine.facts.page_bytes)
    assert engine.stats().tiers == {"device": TierCounts(capacity_bytes=12 * page_bytes)} and page_bytes > 0
    assert set(engine.stats().tiers) < set(TIERS)

    def complete(number: int, prompt: list[int]) -> bytes:
        keys = b"".join((root_key(), *page_keys(prompt, 8, root_key())))
        request = Request(
            request_id=number,
            prompt_token_ids=prompt,
            params=SamplingParams(ignore_eos=True),
            seed=0,
            max_tokens=1,
            page_keys=keys,
            session="only" if number == 0 else None,
        )
        engine.add(request)
        while engine.has_work:
            engine.step()
        return keys

    prompts = [[first, *range(39)] for first in (1, 1, 2, 3)]
    keys = [complete(number, prompt) for number, prompt in enumerate(prompts[:2])]
    device = engine.stats().tiers["device"]
    assert (device.queries, device.hits, device.evictions, device.used_bytes) == (80, 32, 0, 5 * page_bytes)
    asked = engine.prefetch(Prefetch(number=5, page_keys=keys[0], num_tokens=40))
    named = engine.prefetch(Prefetch(number=6, session="only"))
    assert asked.number == 5 and asked.found is not None and named.found is not None
    assert (asked.found.num_tokens, asked.found.num_cached_tokens, asked.found.num_prefetched_tokens) == (40, 40, 0)
    assert (named.found.num_tokens, named.found.num_cached_tokens) == (41, 40)
    assert engine.prefetch(Prefetch(number=7, session="other")).found is None
    assert engine.stats().tiers["device"] == device, "advice is not a query"
    for number, prompt in enumerate(prompts[2:], 2):
        complete(number, prompt)
    device = engine.stats().tiers["device"]
    assert (device.queries, device.hits, device.evictions, device.used_bytes) == (160, 32, 3, 12 * page_bytes)
    engine.check_integrity()
    engine.close()
