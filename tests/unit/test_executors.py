"""Both executors agree: for random graphs, batches and valid plans."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow.executor.inputs import InputBuilder
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.graph.graph import OpGraph
from nanoflow.plan.plan import PlanError
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from tests.all_cases import num_examples
from tests.graphs import batch_of, batches, device_model, graphs, valid_plans, with_fresh_caches
from tests.reference_executor import ReferenceExecutor

MAX_TOKENS = 12


@settings(
    max_examples=num_examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_any_valid_plan_gives_what_the_reference_gives(data: st.DataObject) -> None:
    graph = data.draw(graphs())
    batch = data.draw(batches(MAX_TOKENS, graph.vocab_size))
    plan = data.draw(valid_plans(graph, MAX_TOKENS))
    num_pages = int(batch.new_pages.pages.max()) + 1
    expected_model = device_model(graph, num_pages)
    model = with_fresh_caches(expected_model)
    inputs = InputBuilder(graph.ropes, num_rows=batch.num_requests, device=torch.device("cpu")).build(batch)

    expected = ReferenceExecutor(expected_model).forward(inputs)
    executor = PipelinedExecutor(model, (plan,), max_batch_tokens=MAX_TOKENS, max_logits=batch.num_requests)
    # What an earlier batch left in the tensors must not matter.
    for tensor in executor.workspace.tensors.values():
        tensor.fill_(torch.nan)
    executor.forward(inputs, plan)

    torch.testing.assert_close(executor.logits(inputs), expected, rtol=1e-4, atol=1e-5)
    for cache, expected_cache in zip(model.caches, expected_model.caches, strict=True):
        torch.testing.assert_close(cache.keys, expected_cache.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.values, expected_cache.values, rtol=1e-4, atol=1e-5)


@settings(
    max_examples=num_examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_an_exchange_of_dependent_nano_operations_is_refused_and_named(data: st.DataObject) -> None:
    graph = data.draw(graphs())
    plan = data.draw(valid_plans(graph, MAX_TOKENS))
    nanos = list(plan.nano_operations)
    # o_proj of some tokens moved in front of everything: it needs attention of the same tokens in the same layer.
    moved = next(i for i, nano in enumerate(nanos) if nano.operation.startswith("o_proj"))
    early = dataclasses.replace(nanos.pop(moved), stage=0)
    wrong = dataclasses.replace(plan, nano_operations=(early, *nanos))
    with pytest.raises(PlanError, match=r"o_proj.* is issued before .* on which it depends"):
        wrong.validate(graph)


@given(graph=graphs())
@settings(max_examples=5, deadline=None)
def test_a_batch_larger_than_the_plan_is_refused(graph: OpGraph) -> None:
    plans = (sequential_plan(graph, 2), nanobatch_plan(graph, 2, [1]))
    executor = PipelinedExecutor(device_model(graph, num_pages=8), plans, max_batch_tokens=2, max_logits=4)
    batch = batch_of([(0, 3)], 0, graph.vocab_size, 0)
    inputs = InputBuilder(graph.ropes, num_rows=1, device=torch.device("cpu")).build(batch)
    with pytest.raises(PlanError, match="is for 2 tokens, the batch has 3"):
        executor.forward(inputs, plans[1])
