"""Padding to a bucket changes nothing: what a CUDA graph relies on, here kernel by kernel in the interpreter."""

from __future__ import annotations

from tests.triton_interpreter import interpreter  # noqa: F401  (sets the interpreter up before Triton is imported)

# isort: split
from dataclasses import replace

import pytest
import torch

from nanoflow.executor.inputs import BatchSize, InputBuilder, LoadedBatch, RequestTables, padding
from nanoflow.executor.layout import lay_out
from nanoflow.executor.pipelined import PipelinedExecutor
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import OpKind
from nanoflow.kernels import triton_attention
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.triton_elementwise import ELEMENTWISE_KERNELS
from nanoflow.models.config_json import parse
from nanoflow.models.registry import build_graph
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from tests.all_cases import part
from tests.graphs import batch_of, device_model, drawing, with_fresh_caches

CPU = torch.device("cpu")
MAX_TOKENS = 32
KERNELS = {
    **REFERENCE_KERNELS,
    **ELEMENTWISE_KERNELS,
    OpKind.DECODE_ATTENTION: triton_attention.decode_attention,
    OpKind.PREFILL_ATTENTION: triton_attention.prefill_attention,
}


def graph_of(num_layers: int) -> OpGraph:
    fields = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 23,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    return build_graph(parse(fields), None)


GRAPH = graph_of(2)
# Layers of two KV groups in turn.
WINDOWS = build_graph(
    parse(
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": 23,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "query_pre_attn_scalar": 16,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "hidden_activation": "gelu_pytorch_tanh",
        }
    ),
    None,
)


# Rows of a batch (cached and new tokens), decodes among them, and rows that draw.
BATCHES: dict[str, tuple[list[tuple[int, int]], int, tuple[int, ...]]] = {
    "decodes": ([(5, 1), (11, 1), (0, 1)], 3, (0, 1, 2)),
    "mixed": ([(4, 1), (9, 1), (0, 7), (6, 3)], 2, (0, 1, 2, 3)),
    "prefills": ([(0, 9), (3, 4)], 0, (0, 1)),
    "drafts": ([(5, 1), (11, 3), (7, 2)], 1, (0, 1, 1, 1, 2, 2)),
}
MODELS: dict[str, tuple[OpGraph, tuple[int, ...]]] = {
    "sequential": (GRAPH, ()),
    "nano-batches": (GRAPH, (2, 16)),
    "windows": (WINDOWS, ()),
}
# Mixed batches have a kernel of every kind; drafts have rows of several tokens among decodes.
PADDED = part(
    [
        ("sequential", "decodes"),
        ("sequential", "prefills"),
        ("nano-batches", "mixed"),
        ("nano-batches", "drafts"),
        ("windows", "mixed"),
    ],
    of=[(model, batch) for model in MODELS for batch in BATCHES],
)


@pytest.mark.parametrize(("model_name", "batch_name"), PADDED)
def test_a_padded_batch_gives_the_logits_of_the_exact_one(model_name: str, batch_name: str) -> None:
    (graph, boundaries), (requests, num_decodes, draws) = MODELS[model_name], BATCHES[batch_name]
    num_groups = len(graph.kv_groups)
    batch = batch_of(requests, num_decodes, graph.vocab_size, seed=3, num_groups=num_groups, num_rows=8)
    batch = drawing(batch, draws)
    plan = nanobatch_plan(graph, MAX_TOKENS, boundaries) if boundaries else sequential_plan(graph, MAX_TOKENS)
    exact_model = device_model(graph, [int(batch.new_pages.pages.max()) + 1] * num_groups)
    exact_model = replace(exact_model, kernels=KERNELS)
    padded_model = with_fresh_caches(exact_model)
    builder = InputBuilder(graph.ropes, num_rows=8, device=CPU, num_groups=num_groups)

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
    places = RequestTables(
        decodes=torch.zeros(num_groups, 20, 9, dtype=torch.int32),
        prefills=torch.zeros(num_groups, 6, 9, dtype=torch.int32),
    )
    loaded = builder.load(batch, layout, size, places)
    place = replace(
        loaded,
        tables=RequestTables(decodes=places.decodes[:, :16], prefills=places.prefills[:, :4]),
        first_prefill_token=0,
        host=None,
    )
    padded.forward(builder.derive(place), plan)

    torch.testing.assert_close(padded.logits(builder.derive(place)), exact.logits(inputs))
    for cache, exact_cache in zip(padded_model.caches, exact_model.caches, strict=True):
        torch.testing.assert_close(cache.keys, exact_cache.keys)
        torch.testing.assert_close(cache.values, exact_cache.values)


@pytest.mark.parametrize("graph", [GRAPH, WINDOWS], ids=["one group", "two groups"])
def test_a_batch_of_padding_changes_nothing(graph: OpGraph) -> None:
    num_groups = len(graph.kv_groups)
    plan, model = sequential_plan(graph, MAX_TOKENS), device_model(graph, [3] * num_groups)
    model = replace(model, kernels=KERNELS)
    executor = PipelinedExecutor(model, (plan,), max_batch_tokens=MAX_TOKENS, max_logits=8)
    before = [(cache.keys.clone(), cache.values.clone()) for cache in model.caches]
    size = BatchSize(num_tokens=16, num_decodes=8, num_prefills=4)
    loaded = LoadedBatch(
        size=size,
        numbers=torch.from_numpy(padding(size, num_groups)),
        tables=RequestTables(
            decodes=torch.zeros(num_groups, 8, 2, dtype=torch.int32),
            prefills=torch.zeros(num_groups, 4, 2, dtype=torch.int32),
        ),
        logit_tokens=torch.zeros(0, dtype=torch.int32),
        first_prefill_token=0,
        host=None,
    )
    builder = InputBuilder(graph.ropes, num_rows=8, device=CPU, num_groups=num_groups)
    executor.forward(builder.derive(loaded), plan)
    for cache, (keys, values) in zip(model.caches, before, strict=True):
        assert torch.equal(cache.keys, keys) and torch.equal(cache.values, values)


def test_a_few_layers_run_every_kernel_and_leave_the_next_pass_as_it_is() -> None:
    graph = graph_of(5)
    batch = batch_of([(4, 1), (9, 1), (0, 7)], 2, graph.vocab_size, seed=5)
    plan = sequential_plan(graph, MAX_TOKENS)
    model = replace(device_model(graph, 8), kernels=KERNELS)
    inputs = InputBuilder(graph.ropes, num_rows=8, device=CPU).build(batch)
    expected = PipelinedExecutor(with_fresh_caches(model), (plan,), max_batch_tokens=MAX_TOKENS, max_logits=8)
    expected.forward(inputs, plan)
    launched: list[tuple[OpKind, int]] = []

    def noted(kind: OpKind, kernel: Kernel) -> Kernel:
        def run(launch: Launch) -> None:
            launched.append((kind, launch.layer))
            kernel(launch)

        return run

    noting = replace(model, kernels={kind: noted(kind, kernel) for kind, kernel in KERNELS.items()})
    executor = PipelinedExecutor(noting, (plan,), max_batch_tokens=MAX_TOKENS, max_logits=8)
    executor.forward_typical(inputs, plan)
    assert {layer for _, layer in launched} == {0, 1}
    assert {kind for kind, _ in launched} == {op.kind for op in (*graph.prologue, *graph.layer)}
    executor.forward(inputs, plan)
    torch.testing.assert_close(executor.logits(inputs), expected.logits(inputs), rtol=0, atol=0)
