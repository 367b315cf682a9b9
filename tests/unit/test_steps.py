"""Steps of a plan: lane order and waits together respect every dependency, and nothing is waited for twice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow.executor.steps import Step, bind
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import Access, depends
from nanoflow.graph.shard import shard
from nanoflow.hardware import parse_gpus
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import PipelinePlan, PlanError
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.estimate import estimated_profile
from nanoflow.search.search import Search
from nanoflow.search.shapes import batch_of
from tests.graphs import with_operations
from tests.plans import ping_pong_plan

_WHOLE = build_graph(preset_config("llama-3-8b"), None)
GRAPH = _WHOLE.with_layers(_WHOLE.layers[:5])
ON_TWO_GPUS = shard(GRAPH, 2)


@functools.cache
def searched() -> PipelinePlan:
    """A plan with many lanes: on A100 by the data sheet, overlap pays."""
    profile = estimated_profile("m", dict(PRESETS["llama-3-8b"]), parse_gpus("a100-80"), max_tokens=2048)
    plan = Search(profile, batch_of(2048, 1024, 1024.0, 512.0)).run().plan
    assert len(plan.lanes) > 2
    return plan


def happens_before(steps: tuple[Step, ...]) -> list[set[int]]:
    """For every step all that have surely ended when it begins."""
    before: list[set[int]] = []
    last: dict[str, int] = {}
    for place, step in enumerate(steps):
        direct = [*step.waits, *([last[step.lane]] if step.lane in last else [])]
        before.append(set().union(*(before[other] | {other} for other in direct)) if direct else set())
        last[step.lane] = place
    return before


def missing(graph: OpGraph, steps: tuple[Step, ...]) -> list[str]:
    order = {op.name: place for place, op in enumerate(graph.layer)}
    before = happens_before(steps)
    return [
        f"{early.op.name} of layer {early.layer} before {late.op.name} of layer {late.layer}"
        for place, late in enumerate(steps)
        for other, early in enumerate(steps)
        if (early.layer, order[early.op.name]) < (late.layer, order[late.op.name])
        and other not in before[place]
        and depends(
            graph,
            Access(op=early.op, tokens=early.tokens, layer=early.layer),
            Access(op=late.op, tokens=late.tokens, layer=late.layer),
        )
    ]


@pytest.mark.parametrize(
    ("graph", "make_plan"),
    [
        (GRAPH, searched),
        (GRAPH, lambda: ping_pong_plan(GRAPH, 256, 96, Mechanism.STREAM)),
        (ON_TWO_GPUS, lambda: ping_pong_plan(ON_TWO_GPUS, 256, 96, Mechanism.STREAM)),
    ],
    ids=["searched", "ping-pong", "ping-pong with a network lane"],
)
def test_every_dependency_is_waited_for(graph: OpGraph, make_plan: Callable[[], PipelinePlan]) -> None:
    plan = make_plan()
    steps = bind(plan, graph)
    assert len(steps) == len(plan.nano_operations) * graph.num_layers
    assert missing(graph, steps) == []


def test_a_layer_waits_for_the_collective_at_the_end_of_the_one_before() -> None:
    steps = bind(ping_pong_plan(ON_TWO_GPUS, 256, 96, Mechanism.STREAM), ON_TWO_GPUS)
    waited_for = {
        (steps[before].op.name, step.op.name, step.layer - steps[before].layer)
        for step in steps
        for before in step.waits
        if steps[before].lane == "network"
    }
    assert ("down_proj_all_reduce", ON_TWO_GPUS.layer[0].name, 1) in waited_for


def test_without_its_waits_a_plan_would_be_wrong() -> None:
    """The check above can fail."""
    steps = bind(ping_pong_plan(GRAPH, 256, 96, Mechanism.STREAM), GRAPH)
    assert missing(GRAPH, tuple(replace(step, waits=()) for step in steps))


def test_one_lane_waits_for_nothing() -> None:
    assert not any(step.waits or step.is_waited_for for step in bind(sequential_plan(GRAPH, 64), GRAPH))


def test_waits_are_between_lanes_and_not_repeated() -> None:
    steps = bind(searched(), GRAPH)
    reached: dict[tuple[str, str], int] = {}
    for step in steps:
        for other in step.waits:
            early = steps[other]
            assert early.lane != step.lane and early.is_waited_for
            assert other > reached.get((step.lane, early.lane), -1)
            reached[step.lane, early.lane] = other


def test_a_plan_for_another_graph_is_refused() -> None:
    plan = ping_pong_plan(GRAPH, 256, 96, Mechanism.STREAM)
    other = build_graph(preset_config("llama-3-8b"), None)
    with pytest.raises(PlanError, match="no operation 'gate_up_proj'"):
        bind(plan, with_operations(other, [op for op in other.layer if op.name != "gate_up_proj"]))


def test_plans_survive_a_file(tmp_path: Path) -> None:
    plan = searched()
    (tmp_path / "plan.json").write_bytes(plan.to_json())
    assert bind(PipelinePlan.load(tmp_path / "plan.json"), GRAPH) == bind(plan, GRAPH)
