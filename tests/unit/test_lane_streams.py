"""Forks, waits and joins of GPU lanes: on stand-ins for streams, what has surely ended when each step begins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from nanoflow.executor import lanes as executor_lanes
from nanoflow.executor.buffers import Workspace
from nanoflow.executor.lanes import GpuLanes, Partitions
from nanoflow.executor.steps import Step, bind
from nanoflow.executor.streams import LaneStream
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import Access, depends
from nanoflow.graph.shard import shard
from nanoflow.models.config_json import parse
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import PipelinePlan
from tests.graphs import device_model
from tests.plans import ping_pong_plan, resource_plan
from tests.recorded_streams import RecordedStream, RecordedStreams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GRAPH = build_graph(parse(CONFIG), None)
ON_TWO_GPUS = shard(GRAPH, 2)
NUM_TOKENS = 8
PLANS = pytest.mark.parametrize(
    ("graph", "plan"),
    [
        (GRAPH, ping_pong_plan(GRAPH, NUM_TOKENS, 4, Mechanism.STREAM)),
        (ON_TWO_GPUS, ping_pong_plan(ON_TWO_GPUS, NUM_TOKENS, 4, Mechanism.STREAM)),
        (ON_TWO_GPUS, resource_plan(ON_TWO_GPUS, NUM_TOKENS, 4)),
    ],
    ids=["two lanes", "with a network lane", "a lane for each resource"],
)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> RecordedStreams:
    """Every lane has a stream of its own, none of which exists."""

    def plain_stream(_device: object) -> LaneStream:
        return LaneStream(mechanism=Mechanism.STREAM, stream=RecordedStream(), num_sms=132, share=1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(executor_lanes, "plain_stream", plain_stream)
    return RecordedStreams(monkeypatch)


def open_lanes(graph: OpGraph, plan: PipelinePlan) -> tuple[GpuLanes, tuple[Step, ...]]:
    steps = bind(plan, graph)
    model = device_model(GRAPH, 1)
    workspace = Workspace.allocate(model, num_tokens=NUM_TOKENS, num_logits=1)
    return GpuLanes(plan, steps, workspace, Partitions(model.device, model.kernels)), steps


def run(lanes: GpuLanes, places: Sequence[int], streams: RecordedStreams, batch: str = "") -> None:
    """A forward pass as the executor makes it."""
    with lanes.running():
        for place in places:
            with lanes.on(place):
                streams.queue((batch, place))


@PLANS
def test_a_step_begins_when_all_that_it_depends_on_has_ended(
    graph: OpGraph, plan: PipelinePlan, streams: RecordedStreams
) -> None:
    lanes, steps = open_lanes(graph, plan)
    run(lanes, range(len(steps)), streams)
    order = {op.name: place for place, op in enumerate(graph.layer)}
    accesses = [Access(op=step.op, tokens=step.tokens, layer=step.layer) for step in steps]
    pairs = [
        (early, late)
        for early, late in itertools.permutations(range(len(steps)), 2)
        if (steps[early].layer, order[steps[early].op.name]) < (steps[late].layer, order[steps[late].op.name])
        and depends(graph, accesses[early], accesses[late])
    ]
    across = [pair for pair in pairs if steps[pair[0]].lane != steps[pair[1]].lane]
    assert across and all(("", early) in streams.before["", late] for early, late in pairs)


@PLANS
def test_lanes_run_beside_each_other(graph: OpGraph, plan: PipelinePlan, streams: RecordedStreams) -> None:
    """Otherwise waiting for everything would pass for right."""
    lanes, steps = open_lanes(graph, plan)
    run(lanes, range(len(steps)), streams)
    assert any(
        ("", early) not in streams.before["", late] and ("", late) not in streams.before["", early]
        for early, late in itertools.combinations(range(len(steps)), 2)
    )


@PLANS
def test_all_lanes_begin_after_what_came_before_and_end_before_what_comes_after(
    graph: OpGraph, plan: PipelinePlan, streams: RecordedStreams
) -> None:
    """Twice, as the events of the first pass are used again in the second."""
    lanes, steps = open_lanes(graph, plan)
    places = range(len(steps))
    for batch in ("first", "second"):
        streams.queue((batch, "prologue"))
        run(lanes, places, streams, batch)
        streams.queue((batch, "epilogue"))
    for batch in ("first", "second"):
        assert all((batch, "prologue") in streams.before[batch, place] for place in places)
        assert {(batch, place) for place in places} <= streams.before[batch, "epilogue"]
    assert all(("first", "epilogue") in streams.before["second", place] for place in places)
