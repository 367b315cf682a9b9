"""A fused graph computes what the plain one does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nanoflow.executor.inputs import InputBuilder
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.graph.fp8 import in_fp8, with_fp8
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import Fp8, OpGraph, TensorSpec
from nanoflow.graph.layers import FP8_BLOCK
from nanoflow.graph.operation import BatchShape, LinearDims, Operation, OpKind, RowDims
from nanoflow.graph.shard import shard
from nanoflow.kernels import reference
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from tests.all_cases import num_examples
from tests.graphs import batches, device_model, graphs, valid_plans, with_fresh_caches, with_operations
from tests.reference_executor import ReferenceExecutor

MAX_TOKENS = 12
KERNELS = {**reference.REFERENCE_KERNELS, OpKind.LINEAR_SWIGLU: reference.linear_swiglu}


def _llama() -> OpGraph:
    return build_graph(preset_config("llama-3-8b"), None)


def _change(graph: OpGraph, name: str, **changes: object) -> OpGraph:
    layer = tuple(replace(op, **changes) if op.name == name else op for op in graph.layer)  # type: ignore[arg-type]
    return with_operations(graph, layer)


@settings(
    max_examples=num_examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_any_plan_of_a_fused_graph_gives_what_the_plain_graph_gives(data: st.DataObject) -> None:
    graph = data.draw(graphs())
    fused = fuse_swiglu(graph)
    event(f"{len(graph.layer) - len(fused.layer)} fused")
    batch = data.draw(batches(MAX_TOKENS, graph.vocab_size))
    plan = data.draw(valid_plans(fused, MAX_TOKENS))
    plain_model = device_model(graph, int(batch.new_pages.pages.max()) + 1)
    fused_model = replace(with_fresh_caches(plain_model), graph=fused, kernels=KERNELS)
    model = with_fresh_caches(fused_model)
    inputs = InputBuilder(graph.ropes, num_rows=batch.num_requests, device=torch.device("cpu")).build(batch)

    expected = ReferenceExecutor(plain_model).forward(inputs)
    torch.testing.assert_close(ReferenceExecutor(fused_model).forward(inputs), expected, rtol=1e-4, atol=1e-5)
    executor = PipelinedExecutor(model, (plan,), max_batch_tokens=MAX_TOKENS, max_logits=batch.num_requests)
    executor.forward(inputs, plan)
    torch.testing.assert_close(executor.logits(inputs), expected, rtol=1e-4, atol=1e-5)


def test_gate_up_and_swiglu_of_llama_become_one_operation() -> None:
    plain = _llama()
    fused = fuse_swiglu(plain)
    names = [op.name for op in plain.layer if op.name != "activation"]
    assert [op.name for op in fused.layer] == names
    gate_up = next(op for op in fused.layer if op.kind is OpKind.LINEAR_SWIGLU)
    assert (gate_up.name, gate_up.reads, gate_up.writes) == ("gate_up_proj", ("normed",), ("activation",))
    assert gate_up.weights == ("gate_up_proj.weight",)
    assert gate_up.dims == LinearDims(in_features=4096, out_features=2 * 14336)
    assert {spec.name for spec in plain.tensors} - {spec.name for spec in fused.tensors} == {"gate_up"}
    assert fuse_swiglu(fused) == fused


def test_in_fp8_rows_are_quantised_by_an_operation_of_their_own() -> None:
    plain = in_fp8(_llama())
    fused = fuse_swiglu(plain)
    names = {op.name: op for op in fused.layer}
    assert "activation" not in names and len(fused.layer) == len(plain.layer)
    gate_up, quantise, down = (names[name] for name in ("gate_up_proj", "down_proj_quantise", "down_proj"))
    assert (gate_up.kind, quantise.kind) == (OpKind.LINEAR_SWIGLU_FP8, OpKind.QUANTISE_FP8)
    assert gate_up.reads == ("normed_fp8", "normed_scale") and gate_up.writes == quantise.reads == ("activation",)
    assert quantise.writes == down.reads[:2] == ("activation_fp8", "activation_scale")
    assert fused.tensor("activation") == _llama().tensor("activation")
    assert {spec.name for spec in plain.tensors} - {spec.name for spec in fused.tensors} == {"gate_up"}
    assert fuse_swiglu(fused) == fused
    shape = BatchShape(num_tokens=2048, num_sampled=1)
    # [T, 2 I] written and read, but [T, I] too, in 16 bits.
    saved = plain.memory_bytes(shape, 2) - fused.memory_bytes(shape, 2)
    assert saved == 32 * 2048 * 2 * 14336 * 2
    # A GPU's part of it: what is quantised are its columns.
    part = {op.name: op.dims for op in shard(fused, 2).layer}
    assert part["down_proj_quantise"] == RowDims(width=7168)
    assert part["gate_up_proj"] == LinearDims(in_features=4096, out_features=14336)


def test_in_fp8_an_activation_that_is_not_quantised_is_fused_as_well() -> None:
    shared = fuse_swiglu(in_fp8(build_graph(preset_config("qwen1.5-moe-a2.7b"), None)))
    kinds = {op.name: op.kind for op in shared.layer}
    assert kinds["shared_gate_up_proj"] is OpKind.LINEAR_SWIGLU_FP8 and "shared_activation" not in kinds
    down_in_16_bits = fuse_swiglu(with_fp8(_llama(), {"gate_up_proj.weight": Fp8()}))
    kinds = {op.name: op.kind for op in down_in_16_bits.layer}
    assert kinds["gate_up_proj"] is OpKind.LINEAR_SWIGLU_FP8 and kinds["down_proj"] is OpKind.LINEAR_ADD
    assert "down_proj_quantise" not in kinds


def test_a_weight_with_scales_of_blocks_is_not_fused() -> None:
    kept = {"gate_up_proj.weight": Fp8(block=FP8_BLOCK), "down_proj.weight": Fp8()}
    graph = with_fp8(_llama(), kept)
    assert fuse_swiglu(graph) == graph
    rows = with_fp8(_llama(), {**kept, "gate_up_proj.weight": Fp8()})
    assert "down_proj_quantise" in {op.name for op in fuse_swiglu(rows).layer}


def test_fusing_saves_the_traffic_between_the_two() -> None:
    plain, shape = _llama(), BatchShape(num_tokens=2048, num_sampled=1)
    saved = plain.memory_bytes(shape, 2) - fuse_swiglu(plain).memory_bytes(shape, 2)
    # [T, 2 I] written and, as swiglu counts it, read.
    assert saved == 32 * 2048 * 4 * 14336 * 2


def _read_elsewhere(graph: OpGraph) -> OpGraph:
    return _change(graph, "down_proj", reads=("activation", "hidden", "gate_up"))


def _read_by_the_epilogue(graph: OpGraph) -> OpGraph:
    first, *rest = graph.epilogue
    return replace(graph, epilogue=(replace(first, reads=(*first.reads, "gate_up")), *rest))


def _with_bias(graph: OpGraph) -> OpGraph:
    bias = replace(graph.kinds[0].parameters[0], name="gate_up_proj.bias")
    graph = graph.map_kinds(lambda kind: replace(kind, parameters=(*kind.parameters, bias)))
    return _change(graph, "gate_up_proj", weights=("gate_up_proj.weight", "gate_up_proj.bias"))


def _with_one_between(graph: OpGraph) -> OpGraph:
    place = next(i for i, op in enumerate(graph.layer) if op.name == "activation")
    norm: Operation = replace(graph.layer[0], name="between", writes=("other",))
    layer = (*graph.layer[:place], norm, *graph.layer[place:])
    return replace(with_operations(graph, layer), tensors=(*graph.tensors, TensorSpec(name="other", width=4096)))


@pytest.mark.parametrize("change", [_read_elsewhere, _read_by_the_epilogue, _with_bias, _with_one_between])
def test_what_cannot_be_joined_stays_as_it_is(change: object) -> None:
    assert callable(change)
    graph = change(_llama())
    graph.validate()
    assert fuse_swiglu(graph) == graph
