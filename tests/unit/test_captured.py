"""Padding to a bucket changes nothing: what a CUDA graph relies on, here kernel by kernel in the interpreter."""

from __future__ import annotations

from tests.triton_interpreter import interpreter  # noqa: F401  (sets the interpreter up before Triton is imported)

# isort: split
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.executor.captured import Buckets
from nanoflow.executor.inputs import BatchSize, InputBuilder, RequestTables
from nanoflow.executor.layout import lay_out
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import triton_attention
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.triton_elementwise import ELEMENTWISE_KERNELS
from nanoflow.models.config import parse
from nanoflow.models.registry import build_graph
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from tests.graphs import batch_of, device_model, with_fresh_caches

CPU = torch.device("cpu")
MAX_TOKENS = 32
KERNELS = {
    **REFERENCE_KERNELS,
    **ELEMENTWISE_KERNELS,
    OpKind.DECODE_ATTENTION: triton_attention.decode_attention,
    OpKind.PREFILL_ATTENTION: triton_attention.prefill_attention,
}
GRAPH = build_graph(
    parse(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 23,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
        }
    ),
    None,
)


@pytest.mark.parametrize(
    ("requests", "num_decodes"),
    [([(5, 1), (11, 1), (0, 1)], 3), ([(4, 1), (9, 1), (0, 7), (6, 3)], 2), ([(0, 9), (3, 4)], 0)],
    ids=["decodes", "mixed", "prefills"],
)
@pytest.mark.parametrize("boundaries", [(), (2, 16)], ids=["sequential", "nano-batches"])
def test_a_padded_batch_gives_the_logits_of_the_exact_one(
    requests: list[tuple[int, int]], num_decodes: int, boundaries: tuple[int, ...]
) -> None:
    batch = batch_of(requests, num_decodes, GRAPH.vocab_size, seed=3)
    plan = nanobatch_plan(GRAPH, MAX_TOKENS, boundaries) if boundaries else sequential_plan(GRAPH, MAX_TOKENS)
    exact_model = device_model(GRAPH, int(batch.new_pages.pages.max()) + 1)
    exact_model = replace(exact_model, kernels=KERNELS)
    padded_model = with_fresh_caches(exact_model)
    builder = InputBuilder(GRAPH.rope, num_rows=8, device=CPU)

    exact = PipelinedExecutor(exact_model, (plan,), max_batch_tokens=MAX_TOKENS, max_logits=8)
    # Dealt over the nano-batches of the plan.
    layout = lay_out(batch, plan.cuts)
    inputs = builder.build(batch, layout)
    exact.forward(inputs, plan)
    padded = PipelinedExecutor(padded_model, (plan,), max_batch_tokens=MAX_TOKENS, max_logits=8)
    # What an earlier batch left in the padding must not matter.
    for tensor in padded.workspace.tensors.values():
        tensor.fill_(torch.nan)
    size = BatchSize(num_tokens=24, num_decodes=16, num_prefills=4)
    # As large as any batch needs; what an earlier batch left behind these tables must not matter either.
    places = RequestTables(decodes=torch.zeros(20, 9, dtype=torch.int32), prefills=torch.zeros(6, 9, dtype=torch.int32))
    loaded = builder.load(batch, layout, size, places)
    place = replace(
        loaded,
        tables=RequestTables(decodes=places.decodes[:16], prefills=places.prefills[:4]),
        first_prefill_token=0,
        host=None,
    )
    padded.forward(builder.derive(place), plan)

    torch.testing.assert_close(padded.logits(builder.derive(place)), exact.logits(inputs))
    for cache, exact_cache in zip(padded_model.caches, exact_model.caches, strict=True):
        torch.testing.assert_close(cache.keys, exact_cache.keys)
        torch.testing.assert_close(cache.values, exact_cache.values)


@given(
    num_decodes=st.integers(0, 1000), num_prefills=st.integers(0, 300), more=st.integers(0, 1000), plan=st.booleans()
)
def test_a_bucket_has_room_and_stays_within_the_limits(
    num_decodes: int, num_prefills: int, more: int, plan: bool
) -> None:
    num_tokens = min(num_decodes + 2 * num_prefills + (more if num_prefills else 0), 2000)
    exact = BatchSize(num_tokens=num_tokens, num_decodes=num_decodes, num_prefills=num_prefills)
    buckets = Buckets.of(2000, 1100)
    size = buckets.size_for(exact, 2000 if plan else 1 << 20)
    assert num_tokens <= size.num_tokens <= min(2000, max(16, 1.25 * num_tokens))
    assert num_decodes <= size.num_decodes <= min(1100, size.num_tokens)
    assert num_prefills <= size.num_prefills <= 1100
    assert buckets.size_for(size, 2000) == size


def test_the_buckets_of_a_budget_are_few() -> None:
    buckets = Buckets.of(2048, 1024)
    sizes = {
        buckets.size_for(BatchSize(num_tokens=n, num_decodes=min(n, 1024), num_prefills=0), 2048)
        for n in range(1, 2049)
    }
    assert len(sizes) <= 50
