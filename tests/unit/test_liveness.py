"""Tensors that share memory: never two that a plan may need at once, and as many others as can."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.executor.buffers import Workspace
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import Operation, Scope
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.liveness import ALIGNMENT, conflicts, place, shapes_of, workspace_bytes
from nanoflow.plan.plan import NanoOperation, PipelinePlan
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.search.carry import carry_plan
from tests.all_cases import num_examples
from tests.graphs import device_model, graphs, valid_plans, with_operations
from tests.plans import resource_plan

LLAMA = fuse_swiglu(build_graph(preset_config("llama-3-8b"), None))
SEQUENTIAL = sequential_plan(LLAMA, 2048)
OF_LAYER = {"normed", "qkv", "q", "attn", "activation"}


def sizes(graph: OpGraph, num_tokens: int, num_rows: int) -> dict[str, int]:
    return {
        spec.name: (num_rows if spec.scope is Scope.SAMPLED else num_tokens) * spec.width * 2
        for spec in graph.tensors
        if not spec.is_per_layer and spec.name not in graph.inputs
    }


def overlap(begins: dict[str, int], num_bytes: dict[str, int], one: str, other: str) -> bool:
    return begins[one] < begins[other] + num_bytes[other] and begins[other] < begins[one] + num_bytes[one]


@settings(max_examples=num_examples(60), deadline=None)
@given(data=st.data())
def test_what_a_plan_may_need_at_once_never_overlaps(data: st.DataObject) -> None:
    graph = data.draw(graphs())
    plans = [data.draw(valid_plans(graph, 12)) for _ in range(data.draw(st.integers(1, 3)))]
    # Of several alignments, as those of a model are: smaller tensors could not overlap the next aligned place.
    some_bytes = st.integers(1, 6 * ALIGNMENT)
    num_bytes = {name: data.draw(some_bytes) for name in sizes(graph, 12, 5)}
    begins = place(graph, plans, num_bytes)
    assert begins.keys() == num_bytes.keys() and all(begin % ALIGNMENT == 0 for begin in begins.values())
    conflicting = set(conflicts(graph, plans))
    for one, other in itertools.combinations(num_bytes, 2):
        if {one, other} in conflicting:
            assert not overlap(begins, num_bytes, one, other)


@pytest.mark.parametrize("plan", [SEQUENTIAL, nanobatch_plan(LLAMA, 2048, [1024])], ids=["sequential", "nano-batches"])
def test_on_one_lane_a_tensor_is_needed_from_its_first_touch_to_its_last(plan: PipelinePlan) -> None:
    found = set(conflicts(LLAMA, [plan]))
    # norm -> normed -> qkv_proj -> qkv -> rope_append -> q -> attentions -> attn -> o_proj; norm -> normed -> ...
    together = [{"normed", "qkv"}, {"qkv", "q"}, {"q", "attn"}, {"normed", "activation"}, {"sampled_normed", "logits"}]
    apart = [{"qkv", "attn"}, {"qkv", "activation"}, {"q", "activation"}, {"logits", "activation"}]
    assert all(pair in found for pair in map(frozenset, together))
    assert not any(pair in found for pair in map(frozenset, apart))


@pytest.mark.parametrize("num_tokens", [2047, 8192])
@pytest.mark.parametrize("num_rows", [1, 500])
def test_tensors_of_a_models_real_sizes_do_not_overlap(num_tokens: int, num_rows: int) -> None:
    plans = [SEQUENTIAL, nanobatch_plan(LLAMA, 2048, [1024]), carry_plan(LLAMA, 2048, 1024, 0.8)]
    num_bytes = sizes(LLAMA, num_tokens, num_rows)
    for several in ([plans[0]], plans[:2], plans):
        begins = place(LLAMA, several, num_bytes)
        together = [pair for pair in map(sorted, conflicts(LLAMA, several)) if num_bytes.keys() >= set(pair)]
        assert together and not any(overlap(begins, num_bytes, one, other) for one, other in together)


@pytest.mark.parametrize("num_tokens", [2048, 8192])
def test_less_memory_is_taken_than_by_each_alone(num_tokens: int) -> None:
    """The logits and what is needed throughout are a floor; a layer's tensors lie where the logits will be."""
    num_bytes = sizes(LLAMA, num_tokens, num_tokens // 4)
    for plans in ([SEQUENTIAL], [SEQUENTIAL, carry_plan(LLAMA, 2048, 1024, 0.8)]):
        begins = place(LLAMA, plans, num_bytes)
        total = max(begins[name] + num_bytes[name] for name in num_bytes)
        assert num_bytes["logits"] + num_bytes["hidden"] <= total < 0.7 * sum(num_bytes.values())
        assert any(overlap(begins, num_bytes, "logits", name) for name in OF_LAYER)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), num_tokens=st.integers(1, 12), num_logits=st.integers(1, 5))
def test_the_bytes_of_all_tensors_are_what_the_executor_allocates(
    data: st.DataObject, num_tokens: int, num_logits: int
) -> None:
    graph = data.draw(graphs())
    model, plans = device_model(graph, num_pages=1), [sequential_plan(graph, num_tokens)]
    workspace = Workspace.allocate(model, num_tokens=num_tokens, num_logits=num_logits, plans=plans)
    (num_bytes,) = {tensor.untyped_storage().nbytes() for tensor in workspace.tensors.values()}
    assert num_bytes == workspace_bytes(
        graph, plans, num_tokens=num_tokens, num_logits=num_logits, dtype_bytes=model.dtype.itemsize
    )


def test_on_parallel_lanes_everything_of_a_layer_is_needed_at_once() -> None:
    """Also where one of several plans has them; what comes after the layers still may lie there."""
    found = set(conflicts(LLAMA, [SEQUENTIAL, carry_plan(LLAMA, 2048, 1024, 0.8)]))
    assert all(frozenset(pair) in found for pair in itertools.combinations(OF_LAYER, 2))
    assert not any(frozenset((name, "logits")) in found for name in OF_LAYER)


def test_lanes_in_the_graphs_order_are_parallel_too() -> None:
    """What was issued first need not have ended."""
    found = set(conflicts(LLAMA, [resource_plan(LLAMA, 2048, 1024)]))
    assert frozenset(("qkv", "activation")) in found and frozenset(("q", "activation")) in found


def test_the_end_of_a_layer_may_be_issued_after_the_beginning_of_the_next() -> None:
    """On one lane: the second half's down_proj, a layer behind, reads while the first half's qkv_proj writes."""
    halves = [(0, 1024), (1024, 2048)]
    nanos = {
        (op.name, half): NanoOperation(operation=op.name, start=start, stop=stop, lane="whole")
        for op in LLAMA.layer
        for half, (start, stop) in enumerate(halves)
    }
    first, rest = ["attn_norm", "qkv_proj"], [op.name for op in LLAMA.layer[2:-1]]
    assert LLAMA.layer[-1].name == "down_proj" and [op.name for op in LLAMA.layer[:2]] == first
    order = [
        *(nanos[name, 0] for name in first),
        replace(nanos["down_proj", 1], stage=1),
        *(nanos[name, 1] for name in first),
        *(nanos[name, half] for name in rest for half in (0, 1)),
        nanos["down_proj", 0],
    ]
    plan = replace(SEQUENTIAL, nano_operations=tuple(order))
    plan.validate(LLAMA)
    assert frozenset(("qkv", "activation")) in set(conflicts(LLAMA, [plan]))


def test_what_two_sections_touch_is_needed_throughout() -> None:
    def reads_qkv(op: Operation) -> Operation:
        return replace(op, reads=tuple("qkv" if name == "hidden" else name for name in op.reads))

    graph = replace(LLAMA, epilogue=tuple(map(reads_qkv, LLAMA.epilogue)))
    assert frozenset(("qkv", "activation")) in set(conflicts(graph, [SEQUENTIAL]))


def test_what_a_layer_reads_before_it_writes_it_is_needed_throughout() -> None:
    """It comes from the layer before, so it is needed in the next one until it is read."""

    def changed(op: Operation) -> Operation:
        reads = (*op.reads, "carried") if op.name == "o_proj" else op.reads
        return replace(op, reads=reads, writes=(*op.writes, "carried") if op.name == "down_proj" else op.writes)

    graph = with_operations(LLAMA, [*map(changed, LLAMA.layer)])
    assert frozenset(("carried", "qkv")) in set(conflicts(graph, [SEQUENTIAL]))


def test_only_rows_with_logits_have_logits() -> None:
    shapes = shapes_of(LLAMA, num_tokens=10, num_logits=3)
    assert shapes["logits"] == (3, LLAMA.vocab_size) and shapes["hidden"][0] == 10


def test_what_goes_from_layer_to_layer_is_needed_throughout() -> None:
    found = set(conflicts(LLAMA, [SEQUENTIAL]))
    others = {spec.name for spec in LLAMA.tensors} - {"hidden"}
    assert all(frozenset(("hidden", name)) in found for name in others)
