"""Layers of several kinds: sections, what a plan does with them, what they are predicted to take.

A model of one kind is the same as one whose layers are called by two names; the general case is in
`tests/graphs.py`, whose random graphs have several kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.executor.steps import bind
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import GraphError, LayerKind, OpGraph
from nanoflow.graph.layers import sections_of, union_of
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, BatchShape, LinearDims, Operation, OpKind
from nanoflow.graph.shard import shard
from nanoflow.hardware import parse_gpus
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.liveness import conflicts, workspace_bytes
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import PipelinePlan, PlanError
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.interference import Interference
from nanoflow.profile.operation_cost import operation_cost
from nanoflow.profile.table import CostTable, Point, Profile, Setup
from nanoflow.search.problem import make_problem
from nanoflow.simulate.iteration import IterationModel, predict_timeline
from nanoflow.simulate.layer import PlanSimulator
from tests.plans import ping_pong_plan

LLAMA = build_graph(preset_config("llama-3-8b"), None)
GEMMA = build_graph(preset_config("gemma-3-1b"), None)
OSS_MODEL = IterationModel(estimated_profile("preset:gpt-oss-20b", PRESETS["gpt-oss-20b"], parse_gpus("H200"), 512))
SHAPE = BatchShape(
    num_tokens=512,
    num_decode_tokens=256,
    decode_context=256 * 2048,
    prefill_context=256 * 128,
    prefill_kv_tokens=256,
    num_sampled=256,
)


def _kinds(count: int) -> list[LayerKind]:
    kind = LLAMA.kinds[0]
    return [replace(kind, name=f"kind {number}") for number in range(count)]


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(st.integers(0, 2), min_size=1, max_size=24))
def test_sections_are_the_layers(numbers: list[int]) -> None:
    kinds = _kinds(3)
    graph = LLAMA.with_layers([kinds[number] for number in numbers])
    assert [kind.name for kind in graph.layers] == [f"kind {number}" for number in numbers]
    assert graph.num_layers == len(numbers) and len(graph.kinds) == len(set(numbers))
    assert sum(count for _, count in graph.kind_counts) == len(numbers)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("a" * 32, [("a", 32)]),
        ("sssssf" * 4 + "ss", [("sssssf", 4), ("s", 2)]),
        ("dddeeeeee", [("d", 3), ("e", 6)]),
        ("ab", [("a", 1), ("b", 1)]),
        ("ababab", [("ab", 3)]),
        ("ffss", [("f", 2), ("s", 2)]),
    ],
)
def test_the_pattern_that_covers_most_comes_first(layers: str, expected: list[tuple[str, int]]) -> None:
    named = {name: replace(LLAMA.kinds[0], name=name) for name in set(layers)}
    sections = sections_of([named[name] for name in layers])
    assert [("".join(kind.name for kind in each.pattern), each.repeats) for each in sections] == expected


def test_gemma_has_five_windows_for_each_layer_without_and_a_rest() -> None:
    assert [(len(section.pattern), section.repeats) for section in GEMMA.sections] == [(6, 4), (1, 2)]
    assert GEMMA.windows == tuple(None if layer % 6 == 5 else 512 for layer in range(26))
    assert len(GEMMA.ropes) == 2 and {kind.name: kind.rope == GEMMA.ropes[0] for kind in GEMMA.kinds} == {
        "sliding": True,
        "layer": False,
    }


def _by_two_names(graph: OpGraph) -> OpGraph:
    """The same layers, every third of them called otherwise."""
    kind, other = graph.kinds[0], replace(graph.kinds[0], name="other")
    return graph.with_layers([other if layer % 3 == 2 else kind for layer in range(graph.num_layers)])


@pytest.mark.parametrize("graph", [LLAMA, fuse_swiglu(LLAMA), shard(LLAMA, 4)], ids=["plain", "fused", "shared"])
def test_two_names_of_one_kind_change_nothing(graph: OpGraph) -> None:
    twice = _by_two_names(graph)
    twice.validate()
    assert len(twice.kinds) == 2 and twice.layer == graph.layer and twice.ropes == graph.ropes
    assert (twice.num_parameters, twice.kv_bytes_per_token(2)) == (graph.num_parameters, graph.kv_bytes_per_token(2))
    assert (twice.flops(SHAPE), twice.memory_bytes(SHAPE, 2)) == (graph.flops(SHAPE), graph.memory_bytes(SHAPE, 2))
    sizes = {"num_tokens": 512, "num_logits": 256, "dtype_bytes": 2}
    for plan, same in zip(_plans(graph), _plans(twice), strict=True):
        assert plan.digest == same.digest
        assert bind(plan, graph) == bind(same, twice)
        assert set(conflicts(graph, (plan,))) == set(conflicts(twice, (plan,)))
        assert workspace_bytes(graph, (plan,), **sizes) == workspace_bytes(twice, (plan,), **sizes)
    assert fuse_swiglu(twice).layer == fuse_swiglu(graph).layer


def _plans(graph: OpGraph) -> list[PipelinePlan]:
    return [sequential_plan(graph, 512), nanobatch_plan(graph, 512, (128, 300))]


def test_two_names_of_one_kind_are_predicted_alike() -> None:
    profile = estimated_profile("preset:llama-3-8b", PRESETS["llama-3-8b"], parse_gpus("H200"), 512)
    twice = _by_two_names(LLAMA)
    for plan in (*_plans(LLAMA), ping_pong_plan(LLAMA, 512, 256, Mechanism.PARTITION)):
        one, other = (_simulator(plan, graph, profile) for graph in (LLAMA, twice))
        assert other.run(SHAPE).period_s == pytest.approx(one.run(SHAPE).period_s)
        assert other.layer_in_sequence(SHAPE).time_s == pytest.approx(one.layer_in_sequence(SHAPE).time_s)
    costs = [
        [task.cost.time_s for task in make_problem(graph, CostTable(profile, graph), SHAPE, {}).tasks]
        for graph in (LLAMA, twice)
    ]
    assert costs[1] == pytest.approx(costs[0])


def _simulator(plan: PipelinePlan, graph: OpGraph, profile: Profile) -> PlanSimulator:
    return PlanSimulator(plan, graph, CostTable(profile, graph), Interference(profile, graph))


def _without(kind: LayerKind, names: Sequence[str]) -> LayerKind:
    return replace(kind, operations=tuple(op for op in kind.operations if op.name not in names))


def test_a_layer_skips_the_operations_that_its_kind_does_not_have() -> None:
    kind = LLAMA.kinds[0]
    short = replace(_without(kind, ["gate_up_proj", "activation", "down_proj", "ffn_norm"]), name="short")
    graph = LLAMA.with_layers([kind, short, kind, short])
    graph.validate()
    plan = nanobatch_plan(graph, 512, (256,))
    steps = bind(plan, graph)
    for layer, expected in enumerate(graph.layers):
        assert [step.op.name for step in steps if step.layer == layer][::2] == list(expected.operation_names)
    assert plan.digest == nanobatch_plan(LLAMA, 512, (256,)).digest, "one plan for the operations of both"


def test_a_kind_that_lacks_what_the_first_one_has_not_comes_in_between() -> None:
    kind = LLAMA.kinds[0]
    first = replace(_without(kind, ["ffn_norm", "gate_up_proj", "activation", "down_proj"]), name="first")
    graph = LLAMA.with_layers([first, kind])
    graph.validate()
    assert [op.name for op in graph.layer] == list(kind.operation_names)


def test_the_order_of_a_plan_suits_every_kind() -> None:
    kind = LLAMA.kinds[0]
    names = [set(chosen) for chosen in (["attn_norm", "ffn_norm"], ["attn_norm", "qkv_proj"], [*kind.operation_names])]
    kinds = [
        replace(_without(kind, [name for name in kind.operation_names if name not in chosen]), name=str(at))
        for at, chosen in enumerate(names)
    ]
    assert [op.name for op in union_of(kinds)] == list(kind.operation_names)


def _with_own_ffn(kind: LayerKind) -> LayerKind:
    """The kind with other names for what it does after the attention."""
    names = kind.operation_names
    first = names.index("ffn_norm")
    others = [replace(op, name=f"own_{op.name}") if at >= first else op for at, op in enumerate(kind.operations)]
    return replace(kind, name="own", operations=tuple(others))


def test_a_plan_must_suit_every_run_of_kinds() -> None:
    """What layers of one kind do last may not come after the next layer has begun; others do not have it."""
    kind = LLAMA.kinds[0]
    own = _with_own_ffn(kind)
    graph = LLAMA.with_layers([own, own, own, own, kind, own])
    graph.validate()
    plan = sequential_plan(graph, 512)
    late = tuple(replace(nano, stage=1) if nano.operation == "down_proj" else nano for nano in plan.nano_operations)
    plan.validate(graph)
    with pytest.raises(PlanError, match="is issued before"):
        replace(plan, nano_operations=late).validate(graph)
    replace(plan, nano_operations=late).validate(LLAMA.with_layers([own, own, own, own, kind]))


def test_tensors_of_any_kind_are_kept_apart() -> None:
    """Those of a kind that does not come first too."""
    kind = LLAMA.kinds[0]
    without = replace(_without(kind, ["ffn_norm", "gate_up_proj", "activation", "down_proj"]), name="without")
    graph = LLAMA.with_layers([without, without, without, kind])
    plan = sequential_plan(graph, 512)
    assert frozenset({"gate_up", "activation"}) in set(conflicts(graph, (plan,)))


def _reading_other(kind: LayerKind) -> LayerKind:
    changed = [replace(op, reads=("hidden",)) if op.name == "qkv_proj" else op for op in kind.operations]
    return replace(kind, operations=tuple(changed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_reading_other, "'qkv_proj' differs in layers of kind 'other'"),
        (
            lambda kind: replace(kind, name="layer", parameters=kind.parameters[::-1]),
            "layer kind 'layer' is there twice",
        ),
        (lambda kind: replace(kind, parameters=kind.parameters[:-1]), "takes parameter 'down_proj.weight'"),
    ],
)
def test_kinds_that_contradict_each_other_are_refused(change: object, message: str) -> None:
    assert callable(change)
    kind = LLAMA.kinds[0]
    with pytest.raises(GraphError, match=message):
        LLAMA.with_layers([kind, change(replace(kind, name="other"))]).validate()


def test_kinds_that_order_operations_differently_are_refused() -> None:
    kind = LLAMA.kinds[0]
    first, second = kind.operations[:2]
    independent = replace(second, name="one", reads=("hidden",)), replace(second, name="two", reads=("hidden",))
    kinds = [
        replace(kind, name=str(at), operations=(first, *pair, *kind.operations[1:]))
        for at, pair in enumerate((independent, independent[::-1]))
    ]
    with pytest.raises(GraphError, match="kind '1' order operations otherwise"):
        LLAMA.with_layers(kinds).validate()


# Of the kind without a window attention takes 4 s at 2,048 keys, of the other one 1 s at its window of 512.
def _profile() -> Profile:
    def point(op: Operation) -> Point:
        time_s = {OpKind.DECODE_ATTENTION: 1.0 if op.variant else 4.0}.get(op.kind, 0.0)
        time_s = 1.0 if isinstance(op.dims, LinearDims) and op.name != "lm_head" else time_s
        return Point(operation=op.key, num_tokens=512 if isinstance(op.dims, LinearDims) else 256, time_s=time_s)

    return Profile(
        model="preset:gemma-3-1b",
        config=dict(PRESETS["gemma-3-1b"]),
        setup=Setup(gpu="none", memory_bytes=1.0),
        points=tuple(point(op) for op in GEMMA.operations()),
    )


def test_each_layer_takes_what_its_own_kind_takes() -> None:
    """Four products and an attention: 5 s in 22 layers, 8 s in 4."""
    profile = _profile()
    simulator = _simulator(sequential_plan(GEMMA, 512), GEMMA, profile)
    assert simulator.layer_in_sequence(SHAPE).time_s == pytest.approx((22 * 5.0 + 4 * 8.0) / 26)
    assert simulator.run(SHAPE).period_s == pytest.approx((5 * 5.0 + 8.0) / 6), "of the pattern"
    model = IterationModel(profile)
    whole_s = 22 * 5.0 + 4 * 8.0
    assert model.cost(SHAPE).time_s == pytest.approx(whole_s)
    ends = simulator.run(SHAPE)
    assert ends.mix == pytest.approx(whole_s / 26 / ends.period_s)
    assert sum(model.busy_s(SHAPE).values()) == pytest.approx(whole_s)
    planned = model.predict(SHAPE, sequential_plan(GEMMA, 512))
    assert planned.iteration_s == pytest.approx(whole_s)


@pytest.mark.parametrize("num_layers", [None, 1, 3, 7])
def test_however_many_layers_are_simulated_kinds_have_the_proportions_of_the_model(num_layers: int | None) -> None:
    """Of a gpt-oss, whose layers have a window and none in turn. Both kinds are above the power limit."""
    graph, plan = OSS_MODEL.graph, sequential_plan(OSS_MODEL.graph, 512)
    simulator = _simulator(plan, graph, OSS_MODEL.profile)
    expected, run = simulator.layer_in_sequence(SHAPE), simulator.run(SHAPE, num_layers)
    assert (run.period_s, run.layer_energy_j) == pytest.approx((expected.time_s, expected.energy_j))


def test_the_first_layer_that_is_shown_is_the_first_of_the_pattern() -> None:
    shown = predict_timeline(sequential_plan(OSS_MODEL.graph, 512), OSS_MODEL.profile, SHAPE, 3)
    taken_s = [span.stop_s - span.start_s for span in shown.spans if span.operation == "decode_attention"]
    assert taken_s[0] == pytest.approx(taken_s[2]) and taken_s[1] > 5 * taken_s[0]
    assert shown.period_s == pytest.approx(OSS_MODEL.predict(SHAPE).makespan_s)


def test_search_weighs_operations_by_their_layers() -> None:
    table = CostTable(_profile(), GEMMA)
    tasks = {task.group.name: task.cost.time_s for task in make_problem(GEMMA, table, SHAPE, {}).tasks}
    assert tasks["decode_attention"] == pytest.approx((22 * 1.0 + 4 * 4.0) / 26)
    assert tasks["qkv_proj"] == pytest.approx(1.0)


def test_an_estimate_knows_windows() -> None:
    profile = estimated_profile("preset:gemma-3-1b", PRESETS["gemma-3-1b"], parse_gpus("H200"), 512)
    table = CostTable(profile, GEMMA)
    at = {context: table.cost("decode_attention.sliding", 256, context).time_s for context in (256.0, 1024.0, 4096.0)}
    assert at[256.0] < at[1024.0] == at[4096.0] < table.cost("decode_attention", 256, 4096.0).time_s
    without = {**PRESETS["gemma-3-1b"], "layer_types": ["full_attention"] * 26}
    full = IterationModel(estimated_profile("full", without, parse_gpus("H200"), 512))
    assert IterationModel(profile).cost(SHAPE).time_s < full.cost(SHAPE).time_s


def test_under_a_window_no_more_keys_count_than_it_has() -> None:
    """Measured at 128 and 256 keys alone, from which longer contexts are extrapolated: to the window, of 512."""
    points = tuple(
        Point(operation=op.key, num_tokens=256, context=context, time_s=context)
        for op in GEMMA.operations()
        for context in (128.0, 256.0)
    )
    table = CostTable(replace(_profile(), points=points), GEMMA)
    costs = {
        op.key: operation_cost(op, TokenRange(start=0, stop=512), SHAPE, table).time_s
        for op in GEMMA.layer_operations
        if op.kind is OpKind.DECODE_ATTENTION
    }
    assert costs == {"decode_attention": pytest.approx(2048.0), "decode_attention.sliding": pytest.approx(512.0)}


def test_only_attention_differs_between_kinds_of_gemma() -> None:
    keys = [op.key for op in GEMMA.layer_operations]
    assert len(keys) == len(set(keys)) and sum(key.endswith(".sliding") for key in keys) == 2
    windows = {op.key: op.dims.window for op in GEMMA.layer_operations if isinstance(op.dims, AttentionDims)}
    assert windows == {
        "rope_append": None,
        "decode_attention": None,
        "prefill_attention": None,
        "decode_attention.sliding": 512,
        "prefill_attention.sliding": 512,
    }


def test_gemma_on_several_gpus_reduces_before_the_norm_after_a_block() -> None:
    graph = build_graph(replace(preset_config("gemma-3-1b"), num_kv_heads=4), None)
    names = [op.name for op in shard(graph, 4).layer]
    for product in ("o_proj", "down_proj"):
        assert names[names.index(product) + 1] == f"{product}_all_reduce"
        assert names[names.index(product) + 2].endswith("_post_norm")
