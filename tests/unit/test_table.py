"""The profile as a file and as a table; interference curves; estimates from data sheets; sharded graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.graph.graph import GraphError
from nanoflow.graph.operation import BatchShape, CollectiveDims, LinearDims, OpKind, Resource
from nanoflow.graph.shard import Exchange, shard
from nanoflow.hardware import parse_gpus
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.estimate import PAPER_MEMORY_CURVE, estimated_profile
from nanoflow.profile.interference import Interference, lane_of
from nanoflow.profile.power import dynamic_energy_j, dynamic_power_w
from nanoflow.profile.table import (
    SAMPLING,
    Cost,
    CostTable,
    PairPoint,
    Point,
    Profile,
    ProfileError,
    Setup,
    merged,
)

CONFIG = dict(PRESETS["llama-3-8b"])
GRAPH = build_graph(preset_config("llama-3-8b"), None)
SETUP = Setup(gpu="g", memory_bytes=1e9)


def table(*points: Point) -> CostTable:
    named = {point.operation for point in points}
    others = tuple(
        Point(operation=op.name, num_tokens=128, time_s=0.0) for op in GRAPH.operations() if op.name not in named
    )
    return CostTable(Profile(model="m", config=CONFIG, setup=SETUP, points=(*points, *others)), GRAPH)


def at(operation: str, num_tokens: int, time_s: float, context: float = 0.0, energy_j: float | None = None) -> Point:
    return Point(operation=operation, num_tokens=num_tokens, context=context, time_s=time_s, energy_j=energy_j)


def test_a_product_costs_what_the_next_larger_size_costs() -> None:
    known = table(at("o_proj", 128, 1.0, energy_j=5.0), at("o_proj", 256, 3.0, energy_j=6.0))
    assert [known.cost("o_proj", n).time_s for n in (0, 1, 128, 129, 255, 256)] == [0.0, 1.0, 1.0, 3.0, 3.0, 3.0]
    assert known.cost("o_proj", 129).energy_j == 6.0


def test_beyond_the_largest_size_it_repeats() -> None:
    known = table(at("o_proj", 128, 1.0), at("o_proj", 256, 3.0))
    assert [known.cost("o_proj", n).time_s for n in (257, 384, 385, 512)] == [4.0, 4.0, 6.0, 6.0]


def test_row_wise_operations_are_interpolated() -> None:
    known = table(at("attn_norm", 100, 1.0), at("attn_norm", 200, 2.0))
    assert known.cost("attn_norm", 150).time_s == pytest.approx(1.5)
    assert known.cost("attn_norm", 10).time_s == 1.0, "a kernel has a least time"
    assert known.cost("attn_norm", 300).time_s == pytest.approx(3.0)


def test_attention_is_interpolated_over_tokens_and_contexts() -> None:
    points = [
        at("decode_attention", size, size * context / 100, context) for size in (10, 20) for context in (100.0, 200.0)
    ]
    known = table(*points)
    for size, context in ((10, 100), (15, 150), (20, 400), (40, 150)):
        assert known.cost("decode_attention", size, context).time_s == pytest.approx(size * context / 100)


def test_energy_is_unknown_as_soon_as_one_part_is() -> None:
    assert (Cost(time_s=1, energy_j=2) + Cost(time_s=1)).energy_j is None
    assert (Cost(time_s=1, energy_j=2) + Cost(time_s=1, energy_j=3)) == Cost(time_s=2, energy_j=5)
    assert Cost(time_s=1).times(3) == Cost(time_s=3)


def test_an_unmeasured_operation_is_named() -> None:
    with pytest.raises(ProfileError, match="no point of embed, attn_norm"):
        CostTable(Profile(model="m", config=CONFIG, setup=SETUP), GRAPH)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = Profile(
        model="m", config=CONFIG, setup=SETUP, points=(at("o_proj", 1, 2.0),), pairs=(pair(0.5, 0.6, 0.7),)
    )
    path = tmp_path / "profile.json"
    path.write_bytes(profile.to_json())
    assert Profile.load(path) == profile


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"{", "not a profile"),
        (b"\xff", "not a profile"),
        (b'{"model": 3}', "not a profile: .*model"),
        (b'{"model": "m", "config": {}, "setup": {"gpu": "g", "memory_bytes": 1}, "version": 9}', "version 9"),
    ],
)
def test_a_file_that_is_none_is_refused(document: bytes, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        Profile.from_json(document)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"cannot read profile .*none\.json: No such file"):
        Profile.load(tmp_path / "none.json")


def test_a_newer_point_replaces_the_older() -> None:
    profile = Profile(model="m", config=CONFIG, setup=SETUP, points=(at("o_proj", 1, 2.0), at("o_proj", 2, 3.0)))
    assert [p.time_s for p in merged(profile, [at("o_proj", 1, 9.0)]).points] == [9.0, 3.0]


def pair(share: float, first: float, second: float, ratio: float | None = None) -> PairPoint:
    return PairPoint(
        first="gate_up_proj",
        second="decode_attention",
        first_tokens=1,
        second_tokens=1,
        mechanism=Mechanism.PARTITION,
        share=share,
        first_performance=first,
        second_performance=second,
        energy_ratio=ratio,
    )


def test_curves_of_the_operation_then_of_its_resource_then_the_share() -> None:
    ops = {op.name: op for op in GRAPH.layer}
    pairs = (pair(0.6, 0.5, 0.8, 0.9), pair(0.2, 0.1, 0.9, 0.7))
    curves = Interference(Profile(model="m", config=CONFIG, setup=SETUP, pairs=pairs), GRAPH)
    assert curves.mechanisms == (Mechanism.PARTITION,)
    for name in ("gate_up_proj", "o_proj", "attn_norm"):
        assert curves.performance(Mechanism.PARTITION, ops[name], 0.6, 1) == pytest.approx(0.5)
        assert curves.performance(Mechanism.PARTITION, ops[name], 0.4, 1) == pytest.approx(0.3)
    assert curves.performance(Mechanism.PARTITION, ops["decode_attention"], 0.4, 1) == pytest.approx(0.8)
    assert curves.performance(Mechanism.PARTITION, ops["decode_attention"], 1.0, 1) == 1.0
    assert curves.performance(Mechanism.STREAM, ops["o_proj"], 0.25, 1) == 0.25
    assert curves.shares(Mechanism.PARTITION, Resource.MEMORY) == (0.4, 0.8, 1.0)
    assert curves.shares(Mechanism.PARTITION, Resource.NETWORK) == (1.0,)
    assert curves.energy_ratio(Mechanism.PARTITION, 0.4, 1) == pytest.approx(0.8)
    assert curves.energy_ratio(Mechanism.STREAM, 0.4, 1) == 1.0


def test_pairs_of_each_size_have_a_curve() -> None:
    ops = {op.name: op for op in GRAPH.layer}
    small = replace(pair(0.5, 0.5, 0.25, 1.2), first_tokens=256)
    large = replace(pair(0.5, 0.75, 0.5, 0.9), first_tokens=1024)
    curves = Interference(Profile(model="m", config=CONFIG, setup=SETUP, pairs=(large, small)), GRAPH)
    for num_tokens, product, attention, ratio in (
        (1, 0.5, 0.25, 1.2),
        (256, 0.5, 0.25, 1.2),
        (257, 0.5, 0.25, 1.2),
        (1024, 0.75, 0.5, 0.9),
    ):
        for name, expected in (("gate_up_proj", product), ("o_proj", product), ("decode_attention", attention)):
            assert curves.performance(Mechanism.PARTITION, ops[name], 0.5, num_tokens) == expected
        assert curves.energy_ratio(Mechanism.PARTITION, 0.5, num_tokens) == ratio
    assert curves.performance(Mechanism.PARTITION, ops["o_proj"], 0.5, 4096) == 0.75


def part(operation: str, num_tokens: int, share: float, time_s: float) -> Point:
    return Point(operation=operation, num_tokens=num_tokens, mechanism=Mechanism.PARTITION, share=share, time_s=time_s)


def test_curves_are_corrected_by_what_an_operation_keeps_alone_at_its_size() -> None:
    """The pair has one token; alone on 0.6 it keeps 0.75 of its speed with one, with up to eight half of it."""
    ops = {op.name: op for op in GRAPH.layer}
    whole = [
        Point(operation=op.name, num_tokens=size, time_s=1.0 * size) for op in GRAPH.operations() for size in (1, 8)
    ]
    parts = [part("gate_up_proj", 1, 0.6, 4 / 3), part("gate_up_proj", 8, 0.6, 16.0)]
    profile = Profile(
        model="m", config=CONFIG, setup=SETUP, points=(*whole, *parts), pairs=(pair(0.6, 0.5, 0.8), pair(0.2, 0.1, 0.9))
    )
    curves = Interference(profile, GRAPH)
    op = ops["gate_up_proj"]
    assert curves.performance(Mechanism.PARTITION, op, 0.6, 1) == pytest.approx(0.5)
    for num_tokens in (2, 8, 100):
        assert curves.performance(Mechanism.PARTITION, op, 0.6, num_tokens) == pytest.approx(0.5 * 0.5 / 0.75)
        assert curves.performance_alone(Mechanism.PARTITION, op, 0.6, num_tokens) == pytest.approx(0.5)
    assert curves.performance_alone(Mechanism.PARTITION, op, 0.6, 1) == pytest.approx(0.75)
    # A pair of another mechanism has another size.
    beside = replace(pair(0.5, 0.5, 0.5), mechanism=Mechanism.BESIDE, first_tokens=8)
    with_beside = Interference(replace(profile, pairs=(*profile.pairs, beside)), GRAPH)
    assert with_beside.performance(Mechanism.PARTITION, op, 0.6, 1) == pytest.approx(0.5)
    # Not measured alone on a share: as beside another.
    assert curves.performance_alone(Mechanism.PARTITION, ops["decode_attention"], 0.4, 1) == pytest.approx(0.8)
    assert curves.performance(Mechanism.PARTITION, ops["o_proj"], 0.6, 8) == pytest.approx(0.5)


def test_row_wise_operations_run_in_the_lane_of_products() -> None:
    lanes = {op.name: lane_of(op) for op in GRAPH.layer}
    assert {name for name, lane in lanes.items() if lane is Resource.MEMORY} == {"decode_attention"}


def test_dynamic_energy_leaves_static_power_out_and_keeps_to_the_limit() -> None:
    setup = Setup(gpu="g", memory_bytes=1, power_limit_w=700.0, static_power_w=100.0)
    assert dynamic_power_w(setup) == 600.0
    assert dynamic_energy_j(Cost(time_s=2.0, energy_j=1000.0), setup) == 800.0
    assert dynamic_energy_j(Cost(time_s=2.0, energy_j=9000.0), setup) == 1200.0
    assert dynamic_energy_j(Cost(time_s=2.0), setup) is None
    assert dynamic_power_w(SETUP) is None


def test_an_estimate_has_everything_and_follows_the_data_sheet() -> None:
    profile = estimated_profile("preset:llama-3-8b", CONFIG, parse_gpus("h200"), max_tokens=4096)
    known = CostTable(profile, GRAPH)
    assert not profile.setup.is_measured and profile.setup.num_sms == 132
    # 2 x 4,096 x 14,336 x 2 FLOP a token at 673 TFLOP/s, in whole waves.
    ideal_s = 2048 * 2 * 4096 * 28672 / 673e12
    assert ideal_s <= known.cost("gate_up_proj", 2048).time_s < 1.1 * ideal_s
    # 1,000 x 1,024 keys of 4,096 bytes at 4.45 TB/s.
    assert known.cost("decode_attention", 1000, 1024).time_s == pytest.approx(1000 * 1024 * 4096 / 4.45e12, rel=0.02)
    assert known.has(SAMPLING)
    assert {pair.second_performance for pair in profile.pairs} == set(PAPER_MEMORY_CURVE.values())


def test_a_sharded_graph_does_its_part_and_sends_what_equation_3_says() -> None:
    whole = build_graph(preset_config("llama-2-70b"), None)
    shape = BatchShape(num_tokens=2048, num_decode_tokens=1000, decode_context=1000 * 512, prefill_context=1048 * 256)
    sent = 0.0
    for exchange in Exchange:
        part = shard(whole, 8, exchange)
        part.validate()
        for kind in (OpKind.LINEAR, OpKind.LINEAR_ADD, OpKind.DECODE_ATTENTION, OpKind.PREFILL_ATTENTION):
            flops = [sum(op.flops(shape) for op in graph.layer if op.kind is kind) for graph in (whole, part)]
            assert flops[0] == 8 * flops[1], kind
        sent = sum(op.network_bytes(shape, 2) for op in part.layer)
        assert sent == 4 * 7 / 8 * 2048 * 8192 * 2
        assert all(isinstance(op.dims, CollectiveDims) == (op.resource is Resource.NETWORK) for op in part.layer)
    assert shard(whole, 1) is whole


def test_heads_that_cannot_be_dealt_out_are_an_error() -> None:
    with pytest.raises(GraphError, match="32 heads, 8 of keys, on 3 GPUs"):
        shard(GRAPH, 3)


def test_fewer_key_heads_than_gpus_are_repeated() -> None:
    part = shard(GRAPH, 16)
    attention = part.kinds[0].attention
    assert attention.num_heads == 2 and attention.num_kv_heads == 1
    (qkv,) = (op.dims for op in part.layer if op.name == "qkv_proj")
    assert isinstance(qkv, LinearDims) and qkv.out_features == 4 * 128
