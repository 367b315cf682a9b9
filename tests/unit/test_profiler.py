"""Profiling a tiny model on a CPU: which points there are, and that each is the cost of one layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nanoflow.executor.buffers import Workspace
from nanoflow.models.config import parse
from nanoflow.models.registry import build_graph
from nanoflow.profiler import alone, site
from nanoflow.profiler.alone import Sizes, Task, measure_alone, tasks
from nanoflow.profiler.site import Site
from nanoflow.profiler.sustained import SPANS, Span, Sustained

SIZES = Sizes(
    max_tokens=48,
    step=16,
    decode_requests=(2, 40, 64),
    decode_contexts=(20, 500),
    prefill_tokens=(8,),
    prefill_before=(0, 24),
    max_cache_bytes=160_000,
)
SITE = Site(
    graph=build_graph(
        parse(
            {
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 23,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "rms_norm_eps": 1e-5,
            }
        ),
        None,
    ),
    device=torch.device("cpu"),
    dtype=torch.float32,
    page_size=16,
)


def test_every_operation_has_its_points() -> None:
    found = tasks(SITE, SIZES)
    assert {task.operation for task in found} == {op.name for op in SITE.graph.layer}
    of = {
        name: [(task.num_tokens, task.context) for task in found if task.operation == name]
        for name in ("qkv_proj", "decode_attention", "prefill_attention")
    }
    assert of["qkv_proj"] == [(16, 0), (32, 0), (48, 0)]
    # 64 requests exceed the budget, 40 of 500 keys (2 x 40 x 500 x 16 x 4 bytes) the memory.
    assert of["decode_attention"] == [(2, 20), (2, 500), (40, 20)]
    assert of["prefill_attention"] == [(8, 8), (8, 32)]


def test_all_points_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPANS, "cpu", Span(settle_s=0.0, measure_s=0.001))
    wanted = tasks(SITE, SIZES)
    measured = dict(measure_alone(SITE, wanted))
    assert set(measured) == set(wanted)
    assert all(point.time_s > 0 and point.energy_j is None for point in measured.values())


@pytest.mark.parametrize("min_data_bytes", [1, 1 << 40], ids=["one layer", "all layers"])
def test_a_point_is_of_one_layer(monkeypatch: pytest.MonkeyPatch, min_data_bytes: int) -> None:
    def microsecond_a_layer(work: Callable[[], None], _device: object) -> Sustained:
        calls.clear()
        work()
        return Sustained(time_s=len(calls) * 1e-6, energy_j=len(calls) * 2.0, spread=0.0, clock_mhz=None)

    calls: list[object] = []
    monkeypatch.setattr(alone, "sustained", microsecond_a_layer)
    monkeypatch.setattr(site, "_MIN_DATA_BYTES", min_data_bytes)
    monkeypatch.setattr(Workspace, "run_whole", lambda *args: calls.append(args))
    for _, point in measure_alone(
        SITE, [Task(operation="qkv_proj", num_tokens=16), Task(operation="decode_attention", num_tokens=2, context=20)]
    ):
        assert [point.time_s, point.energy_j] == pytest.approx([1e-6, 2.0])
