"""The event simulator and what stands on it: hand-made profiles whose outcome can be computed in the head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.predictions.paper import compare

from nanoflow.graph.operation import BatchShape, Resource
from nanoflow.hardware import parse_gpus
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.interference import Interference
from nanoflow.profile.table import SAMPLING, CostTable, PairPoint, Point, Profile, ProfileError, Setup
from nanoflow.search import search as search_module
from nanoflow.search.problem import groups_of, make_problem
from nanoflow.search.search import Search, SearchResult
from nanoflow.search.shapes import batch_of
from nanoflow.simulate.iteration import IterationModel, graphs_of, predict, predict_timeline
from nanoflow.simulate.layer import PlanSimulator
from tests.plans import alternating_plan, ping_pong_plan

CONFIG = dict(PRESETS["llama-3-8b"])
GRAPH = build_graph(preset_config("llama-3-8b"), None)
SHAPE = BatchShape(num_tokens=512, num_decode_tokens=512, decode_context=512 * 100, num_sampled=512)
PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# Seconds for 512 tokens; every product is in proportion, all else is free.
TIMES = {"qkv_proj": 1.0, "decode_attention": 4.0, "o_proj": 1.0, "gate_up_proj": 2.0, "down_proj": 1.0}

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def profile(*, pairs: tuple[PairPoint, ...] = (), energy_w: float | None = None, setup: Setup | None = None) -> Profile:
    points = [
        Point(
            operation=op.name,
            num_tokens=size,
            context=100.0 if op.name == "decode_attention" else 0.0,
            time_s=TIMES.get(op.name, 0.0) * size / 512,
            energy_j=None if energy_w is None else TIMES.get(op.name, 0.0) * size / 512 * energy_w,
        )
        for op in GRAPH.operations()
        for size in (128, 256, 384, 512)
    ]
    return Profile(
        model="m", config=CONFIG, setup=setup or Setup(gpu="g", memory_bytes=1e9), points=tuple(points), pairs=pairs
    )


def pair(share: float, first: float, second: float, **others: float) -> PairPoint:
    return PairPoint(
        first="gate_up_proj",
        second="decode_attention",
        first_tokens=512,
        second_tokens=512,
        mechanism=Mechanism.PARTITION,
        share=share,
        first_performance=first,
        second_performance=second,
        **others,
    )


FREE = (pair(0.5, 1.0, 1.0),)
HALF = (pair(0.5, 0.5, 0.5),)


def search(of: Profile, time_limit_s: float = 30.0) -> SearchResult:
    return Search(of, SHAPE, time_limit_s=time_limit_s).run()


def test_a_sequential_layer_takes_the_sum() -> None:
    prediction = predict(None, profile(), SHAPE)
    assert prediction.makespan_s == pytest.approx(9.0)
    assert prediction.iteration_s == pytest.approx(9.0 * GRAPH.num_layers)
    assert prediction.tokens_per_s_per_gpu == pytest.approx(512 / (9.0 * 32))
    assert prediction.energy_per_token_j is None


def test_gaps_count_for_every_operation_that_runs() -> None:
    with_gaps = replace(profile(), launch_gap_s=0.1, iteration_gap_s=7.0)
    prediction = predict(None, with_gaps, SHAPE)
    assert prediction.makespan_s == pytest.approx(9.0 + 5 * 0.1)
    assert prediction.iteration_s == pytest.approx(9.5 * 32 + 7.0)


def test_nano_batches_on_one_lane_gain_nothing() -> None:
    plan = nanobatch_plan(GRAPH, 512, (128, 256))
    assert predict(plan, profile(), SHAPE).makespan_s == pytest.approx(9.0)


def test_free_overlap_takes_as_long_as_the_products() -> None:
    """Products 5 s, attention 4 s: with two halves the attention of one hides behind the products of the other."""
    found = search(profile(pairs=FREE))
    assert found.sequential_s == pytest.approx(9.0)
    assert found.makespan_s == pytest.approx(5.0, rel=0.02)
    assert found.least_period_s == pytest.approx(5.0, rel=0.02)
    assert found.attempts[0].makespan_s == pytest.approx(found.attempts[0].period_s, rel=0.01), "planned is predicted"
    found.plan.validate(GRAPH)


def test_overlap_that_only_shares_the_device_does_not_pay() -> None:
    found = search(profile(pairs=HALF))
    assert len(found.plan.lanes) == 1 and found.reason.startswith("sequential")
    assert found.makespan_s == found.sequential_s


def test_without_pairs_the_plan_is_sequential() -> None:
    found = search(profile())
    assert len(found.plan.lanes) == 1 and "no pair" in found.reason


def test_a_power_limit_forbids_what_time_alone_would_choose() -> None:
    """Everything draws 100 W of a limit of 100 W, and overlapping saves no energy: no plan can be faster."""
    limited = Setup(gpu="g", memory_bytes=1e9, power_limit_w=100.0, static_power_w=0.0)
    found = search(profile(pairs=FREE, energy_w=100.0, setup=limited))
    assert len(found.plan.lanes) == 1
    saving = (pair(0.5, 1.0, 1.0, energy_ratio=0.75),)
    better = search(profile(pairs=saving, energy_w=100.0, setup=limited))
    # What overlaps takes three quarters of its energy; at most all but nothing overlaps.
    assert 9.0 * 0.75 - 1e-6 <= better.makespan_s < 9.0
    assert len(better.plan.lanes) > 1


def test_never_worse_than_sequential_and_repeatable() -> None:
    for share, first, second in ((0.5, 0.6, 0.7), (0.75, 0.8, 0.4), (0.25, 0.3, 0.9)):
        of = profile(pairs=(pair(share, first, second),))
        found, again = search(of), search(of)
        assert found.makespan_s <= found.sequential_s * (1 + 1e-9)
        assert found.plan.digest == again.plan.digest
        assert predict(found.plan, of, SHAPE).makespan_s == pytest.approx(found.makespan_s)


def test_a_time_limit_still_gives_a_valid_plan() -> None:
    found = search(profile(pairs=FREE), time_limit_s=0.01)
    found.plan.validate(GRAPH)
    assert found.makespan_s <= found.sequential_s


def test_waits_keep_lanes_to_the_schedule() -> None:
    """Under the simulator no two lanes whose shares exceed the device run at once, in any layer."""
    plan = search(profile(pairs=(pair(0.6, 0.8, 0.7), pair(0.3, 0.5, 0.95)))).plan
    assert len(plan.lanes) > 2
    share = {lane.name: lane.share for lane in plan.lanes}
    spans = predict_timeline(plan, profile(pairs=FREE), SHAPE, 8).spans
    for span in spans:
        beside = {other.lane for other in spans if other.start_s <= span.start_s + 1e-9 < other.stop_s - 1e-9}
        assert sum(share[lane] for lane in beside) <= 1 + 1e-6
        resources = [other.resource for other in spans if other.start_s <= span.start_s + 1e-9 < other.stop_s - 1e-9]
        assert len(resources) == len(set(resources))


def test_a_timeline_has_every_operation_of_every_layer() -> None:
    spans = predict_timeline(sequential_plan(GRAPH, 512), profile(), SHAPE, 3).spans
    assert [(span.layer, span.operation) for span in spans] == [
        (layer, name) for layer in range(3) for name in ("qkv_proj", "decode_attention", *PRODUCTS[1:])
    ]
    assert spans[1].resource is Resource.MEMORY and spans[-1].stop_s == pytest.approx(27.0)


def test_groups_keep_row_wise_operations_with_their_products() -> None:
    groups = {group.name: [op.name for op in group.operations] for group in groups_of(GRAPH)}
    assert groups == {
        "qkv_proj": ["attn_norm", "qkv_proj", "rope_append"],
        "decode_attention": ["decode_attention"],
        "prefill_attention": ["prefill_attention"],
        "o_proj": ["o_proj"],
        "gate_up_proj": ["ffn_norm", "gate_up_proj", "activation"],
        "down_proj": ["down_proj"],
    }


def test_edges_follow_tokens() -> None:
    case = make_problem(
        GRAPH, CostTable(profile(), GRAPH), SHAPE, dict.fromkeys((g.name for g in groups_of(GRAPH)), (256,))
    )
    names = [str(task) for task in case.tasks]
    edges = {(names[edge.first], names[edge.second], edge.distance) for edge in case.edges}
    assert ("qkv_proj[0:256]", "decode_attention[0:256]", 0) in edges
    assert ("qkv_proj[0:256]", "decode_attention[256:512]", 0) not in edges
    assert ("qkv_proj[0:256]", "prefill_attention[256:512]", 0) in edges, "it reads the keys before its range"
    assert ("down_proj[0:256]", "qkv_proj[0:256]", 1) in edges
    assert ("down_proj[256:512]", "qkv_proj[0:256]", 1) not in edges


def test_iterations_follow_the_book() -> None:
    of = profile(pairs=FREE)
    entry = PlanBook(fallback=sequential_plan(GRAPH, 512))
    assert IterationModel(of, entry).cost(SHAPE).time_s == pytest.approx(IterationModel(of).cost(SHAPE).time_s)
    assert sampled_cost(of) == pytest.approx(9.0 * 32 + 5.0)


def sampled_cost(of: Profile) -> float:
    point = Point(operation=SAMPLING, num_tokens=512, time_s=5.0)
    return IterationModel(replace(of, points=(*of.points, point))).cost(SHAPE).time_s


@pytest.mark.parametrize("limit_w", [None, 250.0], ids=["no limit", "at the power limit"])
@pytest.mark.parametrize("shape", [(2048, 683), (300, 300), (8192, 0), (1, 1)])
def test_a_sequential_layer_without_events_takes_what_it_takes_with_them(
    shape: tuple[int, int], limit_w: float | None
) -> None:
    of = Profile.load(RESULTS / "profile_llama-3-8b_h200.json")
    of = replace(of, setup=replace(of.setup, power_limit_w=limit_w))
    batch = batch_of(*shape, 1280.0, 512.0)
    graph = graphs_of(of)[0]
    plan = sequential_plan(graph, batch.num_tokens)
    simulator = PlanSimulator(plan, graph, CostTable(of, graph), Interference(of, graph))
    fast, slow = simulator.layer_in_sequence(batch), simulator.run(batch)
    assert fast.time_s == pytest.approx(slow.period_s, rel=1e-9)
    assert fast.energy_j == pytest.approx(slow.layer_energy_j, rel=1e-9)
    ends_s = slow.layer_ends_s
    assert fast.time_s * len(ends_s) == pytest.approx(ends_s[-1], rel=1e-9)


def test_a_part_of_the_device_stays_a_part_while_nothing_runs_beside_it() -> None:
    """Operations on streams have the whole device then. Here each waits for the one before."""
    makespans_s = [
        predict(ping_pong_plan(GRAPH, 512, 256, mechanism), profile(), SHAPE).makespan_s
        for mechanism in (Mechanism.STREAM, Mechanism.PARTITION)
    ]
    assert makespans_s == pytest.approx([sum(TIMES.values()), 2 * sum(TIMES.values())])


def test_more_than_the_whole_device_cannot_be_shared() -> None:
    """Where nothing was measured, lanes of 0.8 and 0.8 get half of it each, as those of 0.5 and 0.5 do."""
    plans = [alternating_plan(GRAPH, 512, 256, share) for share in (0.5, 0.8)]
    for plan in plans:
        plan.validate(GRAPH)
    half, more = (predict(plan, profile(), SHAPE).makespan_s for plan in plans)
    assert half == pytest.approx(more) == pytest.approx(sum(TIMES.values()), rel=0.2)


def test_a_profile_without_an_operation_is_refused() -> None:
    of = profile()
    lame = replace(of, points=tuple(point for point in of.points if point.operation != "o_proj"))
    with pytest.raises(ProfileError, match="no point of o_proj"):
        predict(None, lame, SHAPE)


def test_several_gpus_have_a_graph_for_each_exchange() -> None:
    of = estimated_profile("preset:llama-3-8b", CONFIG, parse_gpus("a100-80x2"), max_tokens=256)
    names = [[op.name for op in graph.layer if op.resource is Resource.NETWORK] for graph in graphs_of(of)]
    assert names == [
        ["o_proj_all_reduce", "down_proj_all_reduce"],
        ["o_proj_input_all_gather", "o_proj_all_gather", "down_proj_all_reduce"],
    ]


def test_the_paper_within_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA-2-70B on 8 A100 at 512/512; assumptions stand in benchmarks/predictions/paper.py.

    The search is a short one, of one candidate and only for plans that win much; a whole one finds better (2 % more).
    """
    monkeypatch.setattr(search_module, "_MAX_SHARED", 1)
    monkeypatch.setattr(search_module, "_ALLOCATION_NODES", 400)
    monkeypatch.setattr(search_module, "_LEAST_GAIN", 0.07)
    rows = {row.name: row for row in compare()}
    for row in rows.values():
        assert abs(row.error) < 0.1, row
    sequential, cut, overlapped = (rows[name] for name in ("non-overlap", "nano-batches only", "overlapped"))
    assert sequential.at_once == pytest.approx(1.0) and cut.at_once == pytest.approx(1.0)
    assert overlapped.at_once > 1.2, "what was found does overlap"
    # Measured: 1.20 and 1.35 times.
    assert overlapped.predicted > 1.05 * sequential.predicted and overlapped.predicted > 1.2 * cut.predicted
