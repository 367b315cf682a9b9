"""Hypothesis strategies: random graphs, random dense batches, random valid plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st

from nanoflow.batch import DenseBatch, NewPages
from nanoflow.executor.buffers import DeviceModel, allocate_caches
from nanoflow.graph.graph import LayerKind, OpGraph, Parameter, ParameterPart, RopeSpec, TensorSpec
from nanoflow.graph.layers import sections_of
from nanoflow.graph.nanobatch import Access, depends, split
from nanoflow.graph.operation import (
    AttentionDims,
    LinearDims,
    NormDims,
    Operation,
    OpKind,
    Resource,
    RowDims,
    Scope,
)
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.models.weights import random_weights
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.plan.plan import Lane, NanoOperation, PipelinePlan

PAGE_SIZE = 4


@dataclass
class _Layer:
    """A layer while it is made."""

    operations: list[Operation]
    tensors: dict[str, TensorSpec]
    parameters: list[Parameter]

    def tensor(self, name: str, width: int) -> str:
        spec = TensorSpec(name=name, width=width)
        if self.tensors.setdefault(name, spec) != spec:
            return self.tensor(name + "_", width)
        return name

    def linear(self, name: str, source: str, target: str, sizes: tuple[int, int]) -> None:
        """A product of `source`; if it writes `hidden`, it adds to it."""
        is_added = target == "hidden"
        dims = LinearDims(in_features=sizes[0], out_features=sizes[1])
        part = ParameterPart(source=name, shape=(sizes[1], sizes[0]))
        self.parameters.append(Parameter(name=f"{name}.weight", parts=(part,)))
        self.operations.append(
            Operation(
                name=name,
                kind=OpKind.LINEAR_ADD if is_added else OpKind.LINEAR,
                resource=Resource.COMPUTE,
                reads=(source, target) if is_added else (source,),
                writes=(target,),
                weights=(f"{name}.weight",),
                dims=dims,
            )
        )

    def norm(self, name: str, width: int) -> None:
        self.parameters.append(Parameter(name=f"{name}.weight", parts=(ParameterPart(source=name, shape=(width,)),)))
        self.operations.append(
            Operation(
                name=name,
                kind=OpKind.RMS_NORM,
                resource=Resource.MEMORY,
                reads=("hidden",),
                writes=("normed",),
                weights=(f"{name}.weight",),
                dims=NormDims(width=width, eps=1e-5),
            )
        )


def _attention_block(layer: _Layer, at: str, width: int, dims: AttentionDims, suffix: str) -> None:
    qkv = layer.tensor(f"qkv{suffix}", dims.q_width + 2 * dims.kv_width)
    q, attn = layer.tensor(f"q{suffix}", dims.q_width), layer.tensor(f"attn{suffix}", dims.q_width)
    layer.norm(f"attn_norm{at}", width)
    layer.linear(f"qkv_proj{at}", "normed", qkv, (width, dims.q_width + 2 * dims.kv_width))
    memory = {"resource": Resource.MEMORY, "dims": dims}
    layer.operations.append(
        Operation(name=f"rope{at}", kind=OpKind.ROPE_APPEND, reads=(qkv,), writes=(q, "kv"), **memory)  # type: ignore[arg-type]
    )
    layer.operations.append(
        Operation(
            name=f"decode_attention{at}",
            kind=OpKind.DECODE_ATTENTION,
            scope=Scope.DECODE,
            reads=(q, "kv"),
            writes=(attn,),
            **memory,  # type: ignore[arg-type]
        )
    )
    layer.operations.append(
        Operation(
            name=f"prefill_attention{at}",
            kind=OpKind.PREFILL_ATTENTION,
            resource=Resource.COMPUTE,
            scope=Scope.PREFILL,
            reads=(q, "kv"),
            reads_before=("kv",),
            writes=(attn,),
            dims=dims,
        )
    )
    layer.linear(f"o_proj{at}", attn, "hidden", (dims.q_width, width))


def _ffn_block(layer: _Layer, at: str, width: int, inner: int, suffix: str) -> None:
    gate_up = layer.tensor(f"gate_up{suffix}", 2 * inner)
    activation = layer.tensor(f"activation{suffix}", inner)
    layer.norm(f"ffn_norm{at}", width)
    layer.linear(f"gate_up_proj{at}", "normed", gate_up, (width, 2 * inner))
    layer.operations.append(
        Operation(
            name=f"activation{at}",
            kind=OpKind.SWIGLU,
            resource=Resource.MEMORY,
            reads=(gate_up,),
            writes=(activation,),
            dims=RowDims(width=inner),
        )
    )
    layer.linear(f"down_proj{at}", activation, "hidden", (inner, width))


@st.composite
def graphs(draw: st.DrawFn) -> OpGraph:
    """Layers of one attention block and up to three FFN blocks in random order, which may share tensors.

    There are up to three kinds of layers, with their own windows and rotary embeddings, and some without some FFN
    blocks.
    """
    width, vocab = draw(st.sampled_from([8, 12])), 11
    num_layers, head_dim, num_kv = draw(st.integers(1, 4)), draw(st.sampled_from([2, 4])), draw(st.integers(1, 2))
    dims = AttentionDims(
        num_heads=num_kv * draw(st.integers(1, 3)),
        num_kv_heads=num_kv,
        head_dim=head_dim,
        scale=head_dim**-0.5,
    )
    names = {"hidden": width, "normed": width}
    layer = _Layer([], {name: TensorSpec(name=name, width=size) for name, size in names.items()}, [])
    layer.tensors["kv"] = TensorSpec(name="kv", width=0, is_per_layer=True)
    blocks = draw(st.permutations(["attention", *["ffn"] * draw(st.integers(0, 3))]))
    of_blocks: list[list[Operation]] = []
    for place, block in enumerate(blocks):
        suffix = draw(st.sampled_from(["", str(place)]))
        begin = len(layer.operations)
        if block == "attention":
            _attention_block(layer, str(place), width, dims, suffix)
        else:
            _ffn_block(layer, str(place), width, draw(st.sampled_from([6, 10])), suffix)
        of_blocks.append(layer.operations[begin:])
    kinds = [_kind(draw, str(number), layer, blocks, of_blocks) for number in range(draw(st.integers(1, 3)))]
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=num_layers))
    return _around(layer, chosen, width, vocab)


def _kind(
    draw: st.DrawFn, name: str, layer: _Layer, blocks: Sequence[str], of_blocks: Sequence[list[Operation]]
) -> LayerKind:
    """A kind of layer that may lack some of the FFN blocks."""
    window = draw(st.sampled_from([None, 3]))
    operations = []
    for block, ops in zip(blocks, of_blocks, strict=True):
        if block == "attention":
            operations += [
                replace(op, dims=replace(op.dims, window=window), variant=name)
                if isinstance(op.dims, AttentionDims)
                else op
                for op in ops
            ]
        elif draw(st.integers(0, 3)):
            operations += ops
    used = {weight for op in operations for weight in op.weights}
    head_dim = next(op.dims.head_dim for op in operations if isinstance(op.dims, AttentionDims))
    base = draw(st.sampled_from([1.0, 0.1]))
    return LayerKind(
        name=name,
        operations=tuple(operations),
        parameters=tuple(parameter for parameter in layer.parameters if parameter.name in used),
        rope=RopeSpec(inv_freq=tuple(base / (i + 1) for i in range(head_dim // 2))),
    )


def _around(layer: _Layer, layers: Sequence[LayerKind], width: int, vocab: int) -> OpGraph:
    """A graph with prologue and epilogue around the layers."""
    rows = RowDims(width=width)
    embed = Operation(
        name="embed",
        kind=OpKind.EMBED,
        resource=Resource.MEMORY,
        reads=("token_ids",),
        writes=("hidden",),
        weights=("embed.weight",),
        dims=rows,
    )
    gather = Operation(
        name="gather_sampled",
        kind=OpKind.GATHER_ROWS,
        resource=Resource.MEMORY,
        scope=Scope.SAMPLED,
        reads=("hidden",),
        writes=("sampled_hidden",),
        dims=rows,
    )
    norm = Operation(
        name="final_norm",
        kind=OpKind.RMS_NORM,
        resource=Resource.MEMORY,
        scope=Scope.SAMPLED,
        reads=("sampled_hidden",),
        writes=("sampled_normed",),
        weights=("final_norm.weight",),
        dims=NormDims(width=width, eps=1e-5),
    )
    head = Operation(
        name="lm_head",
        kind=OpKind.LINEAR,
        resource=Resource.COMPUTE,
        scope=Scope.SAMPLED,
        reads=("sampled_normed",),
        writes=("logits",),
        weights=("embed.weight",),
        dims=LinearDims(in_features=width, out_features=vocab),
    )
    sampled = tuple(
        TensorSpec(name=name, width=size, scope=Scope.SAMPLED)
        for name, size in (
            ("sampled_hidden", width),
            ("sampled_normed", width),
            ("logits", vocab),
        )
    )
    graph = OpGraph(
        name="random",
        vocab_size=vocab,
        prologue=(embed,),
        sections=sections_of(layers),
        epilogue=(gather, norm, head),
        tensors=(TensorSpec(name="token_ids", width=1), *layer.tensors.values(), *sampled),
        parameters=(
            Parameter(name="embed.weight", parts=(ParameterPart(source="embed", shape=(vocab, width)),)),
            Parameter(name="final_norm.weight", parts=(ParameterPart(source="norm", shape=(width,)),)),
        ),
    )
    graph.validate()
    return graph


@st.composite
def batches(draw: st.DrawFn, max_tokens: int, vocab: int) -> DenseBatch:
    """Decodes with random contexts, then prompt chunks that begin anywhere in their prompt."""
    num_decodes = draw(st.integers(0, 4))
    decodes = [(draw(st.integers(0, 9)), 1) for _ in range(num_decodes)]
    chunks: list[tuple[int, int]] = []
    left = max_tokens - num_decodes
    for _ in range(draw(st.integers(0 if decodes else 1, 3))):
        if left:
            chunks.append((draw(st.integers(0, 9)), draw(st.integers(1, left))))
            left -= chunks[-1][1]
    return batch_of(decodes + chunks, num_decodes, vocab, draw(st.integers(0, 2**31)))


def batch_of(
    requests: list[tuple[int, int]], num_decodes: int, vocab: int, seed: int, *, num_groups: int = 1, num_rows: int = 0
) -> DenseBatch:
    """A batch of requests (tokens computed before, tokens now), each with pages of its own at random places."""
    rng = np.random.default_rng(seed)
    before, taken = np.array(requests).T
    query_start = np.concatenate(([0], np.cumsum(taken)))
    row_of_token = np.repeat(np.arange(len(requests)), taken)
    positions = np.concatenate([np.arange(first, first + count) for first, count in requests])
    pages_per_request = int(-(-(before + taken).max() // PAGE_SIZE))
    page_tables = [
        rng.permutation(len(requests) * pages_per_request).reshape(len(requests), pages_per_request)
        for _ in range(num_groups)
    ]
    slots = [table[row_of_token, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE for table in page_tables]
    return DenseBatch(
        iteration=1,
        rows=np.arange(len(requests), dtype=np.int32),
        epochs=np.zeros(len(requests), np.int64),
        num_decodes=num_decodes,
        query_start=query_start.astype(np.int32),
        context_len=(before + taken).astype(np.int32),
        token_ids=rng.integers(0, vocab, len(positions), dtype=np.int32),
        is_fed_back=np.zeros(len(positions), np.bool_),
        positions=positions.astype(np.int32),
        slots=np.concatenate(slots).astype(np.int64),
        new_pages=NewPages.of_groups(
            [NewPages.of_tables(table.astype(np.int32)) for table in page_tables], num_rows=num_rows
        ),
        table_width=pages_per_request,
        sampled=np.arange(len(requests), dtype=np.int32),
    )


def drawing(batch: DenseBatch, draws: Sequence[int]) -> DenseBatch:
    """The batch, in which the requests at these places draw; one that is named n times has a draft of n - 1 tokens."""
    num_draws = Counter(draws)
    return replace(
        batch,
        sampled=np.array(draws, np.int32),
        num_drafted_requests=sum(count > 1 for count in num_draws.values()),
        num_draft_tokens=len(draws) - len(num_draws),
    )


def device_model(graph: OpGraph, num_pages: int | Sequence[int], seed: int = 0) -> DeviceModel:
    """A model with random weights and random keys and values in every page; see `allocate_caches`."""
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(seed)
    caches = allocate_caches(graph, num_pages=num_pages, page_size=PAGE_SIZE, dtype=torch.float32, device=cpu)
    for cache in caches:
        cache.keys.normal_(generator=generator)
        cache.values.normal_(generator=generator)
    weights = random_weights(graph, torch.float32, cpu, seed)
    for tensor in (*weights.shared.values(), *(t for layer in weights.layers for t in layer.values())):
        tensor.normal_(std=0.5, generator=generator)
    return DeviceModel(graph=graph, dtype=torch.float32, weights=weights, caches=caches, kernels=REFERENCE_KERNELS)


def with_fresh_caches(model: DeviceModel) -> DeviceModel:
    """The same model on a copy of its caches."""
    caches = tuple(replace(cache, keys=cache.keys.clone(), values=cache.values.clone()) for cache in model.caches)
    return replace(model, caches=caches)


@st.composite
def valid_plans(draw: st.DrawFn, graph: OpGraph, num_tokens: int) -> PipelinePlan:
    """A plan: every operation split at random, random lanes, stages 0 and 1, and a random valid order."""
    lanes = (
        Lane(name="whole"),
        Lane(name="gemm", mechanism=Mechanism.PARTITION, share=0.6),
        Lane(name="memory", mechanism=Mechanism.BESIDE, share=0.4),
    )
    nanos: list[NanoOperation] = []
    for op in graph.layer:
        cuts = sorted(draw(st.sets(st.integers(1, num_tokens - 1), max_size=3))) if num_tokens > 1 else []
        for tokens in split(num_tokens, cuts):
            lane = draw(st.sampled_from(lanes)).name
            nanos.append(NanoOperation(operation=op.name, start=tokens.start, stop=tokens.stop, lane=lane))
    stages = _random_stages(draw, graph, nanos)
    order = _random_order(draw, graph, nanos, stages) or _random_order(draw, graph, nanos, [0] * len(nanos))
    assert order is not None
    plan = PipelinePlan(name="random", num_tokens=num_tokens, lanes=lanes, nano_operations=tuple(order))
    plan.validate(graph)
    return plan


def with_operations(graph: OpGraph, operations: Sequence[Operation]) -> OpGraph:
    """The graph with these operations in each of its layers."""
    return graph.map_kinds(lambda kind: replace(kind, operations=tuple(operations)))


def _access(graph: OpGraph, nano: NanoOperation, layer: int = 0) -> Access:
    return Access(op=next(op for op in graph.layer if op.name == nano.operation), tokens=nano.tokens, layer=layer)


def _random_stages(draw: st.DrawFn, graph: OpGraph, nanos: list[NanoOperation]) -> list[int]:
    """Put random nano-operations, and all that depend on them within the layer, into stage 1."""
    stages: list[int] = []
    for place, nano in enumerate(nanos):
        before = [stages[i] for i in range(place) if depends(graph, _access(graph, nanos[i]), _access(graph, nano))]
        stages.append(max([*before, int(draw(st.integers(0, 7)) == 0)]))
    return stages


def _random_order(
    draw: st.DrawFn, graph: OpGraph, nanos: list[NanoOperation], stages: list[int]
) -> list[NanoOperation] | None:
    """A random order within the period that respects every dependency; None if the stages allow none."""
    place_in_graph = {op.name: place for place, op in enumerate(graph.layer)}
    after: dict[int, set[int]] = {i: set() for i in range(len(nanos))}
    for i, first in enumerate(nanos):
        for j, second in enumerate(nanos):
            is_before = place_in_graph[first.operation] < place_in_graph[second.operation]
            if is_before and stages[i] == stages[j] and depends(graph, _access(graph, first), _access(graph, second)):
                after[j].add(i)
            is_next_layer = graph.num_layers > 1 and stages[i] == stages[j] + 1
            if is_next_layer and depends(graph, _access(graph, first), _access(graph, second, layer=1)):
                after[j].add(i)
    order: list[NanoOperation] = []
    while after:
        ready = [j for j, waits in after.items() if not waits]
        if not ready:
            return None
        chosen = draw(st.sampled_from(ready))
        del after[chosen]
        for waits in after.values():
            waits.discard(chosen)
        nano = nanos[chosen]
        order.append(
            NanoOperation(
                operation=nano.operation, start=nano.start, stop=nano.stop, lane=nano.lane, stage=stages[chosen]
            )
        )
    return order
