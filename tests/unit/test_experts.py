"""Mixtures of experts: their costs against numbers by hand, their kernels against loops, and what plans may cut."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanoflow.executor.buffers import DeviceModel, Workspace, allocate_caches
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.experts import ExpertDims, RouterDims, Routing
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.graph import Element, GraphError, OpGraph
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import BatchShape, Operation, OpKind, Resource
from nanoflow.graph.shard import Exchange, shard
from nanoflow.hardware import parse_gpus
from nanoflow.kernels import cpu, dispatch, reference
from nanoflow.kernels.dispatch import Kernels, are_capturable, kernels_for
from nanoflow.kernels.launch import Launch
from nanoflow.models.config_json import parse
from nanoflow.models.moe import with_skew
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import random_weights
from nanoflow.plan.liveness import bytes_of
from nanoflow.plan.plan import PlanError
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.table import CostTable
from nanoflow.profiler.site import Site, equal_requests, over_layers, random_workspace
from nanoflow.search.cuts import _until_attention, candidates
from nanoflow.search.problem import groups_of
from nanoflow.search.structure import Deadline

CPU = torch.device("cpu")
MIXTRAL = build_graph(preset_config("mixtral-8x7b"), None)
QWEN2 = build_graph(preset_config("qwen1.5-moe-a2.7b"), None)
QWEN3 = build_graph(preset_config("qwen3-30b-a3b"), None)
TINY = build_graph(
    parse(
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [1],
            "max_position_embeddings": 256,
            "eos_token_id": 1,
        }
    ),
    None,
)
EXPERT_KINDS = (OpKind.EXPERT_ORDER, OpKind.EXPERTS_IN, OpKind.EXPERTS_OUT)


def _named(graph: OpGraph, name: str) -> Operation:
    return next(op for op in graph.layer if op.name == name)


# --- costs ---------------------------------------------------------------------------------------------------------


def test_costs_of_mixtral_by_hand() -> None:
    """One token passes 2 of 8 experts of 3 x 4096 x 14336; two pass 8 (1 - 0.75^2) = 3.5 of them on average."""
    router, order, into, out, combine = (
        _named(MIXTRAL, name) for name in ("router", "expert_order", "experts_in", "experts_out", "combine")
    )
    expert = 4096 * 14336
    one, two, many = (BatchShape(num_tokens=count) for count in (1, 2, 1000))
    assert into.flops(one) == 2 * 2 * 2 * expert and out.flops(one) == 2 * 2 * expert
    assert into.flops(many) == 1000 * into.flops(one)
    assert into.memory_bytes(one, 2) == 2 * (2 * 2 * expert + 4096 + 2 * 14336)
    assert into.memory_bytes(two, 2) == 2 * (7 * expert + 2 * (4096 + 2 * 14336))
    assert out.memory_bytes(two, 2) == 2 * (7 * expert // 2 + 2 * 2 * (14336 + 4096))
    assert out.memory_bytes(many, 2) == 2 * (8 * expert + 1000 * 2 * (14336 + 4096))
    assert (router.flops(many), router.memory_bytes(one, 2)) == (2 * 1000 * 4096 * 8, 2 * (8 * 4096 + 4096 + 4))
    assert (order.flops(many), order.memory_bytes(two, 2)) == (0, 2 * (2 * 2 * 2 + 8))
    assert combine.flops(one) == 2 * 2 * 4096 and combine.memory_bytes(one, 2) == 2 * (2 * 4097 + 2 * 4096)
    gate = _named(QWEN2, "shared_gate")
    assert (gate.flops(two), gate.memory_bytes(two, 2)) == (
        2 * (2 * 2048 + 5632),
        2 * (2048 + 2 * (2048 + 2 * 5632)),
    )


def test_decode_batches_read_many_experts() -> None:
    """A hundredth of the tokens of a prefill reads all but a few experts: that is why they are bound by memory."""
    into = _named(QWEN3, "experts_in")
    weights = 128 * 2 * 768 * 2048 * 2
    moved = into.memory_bytes(BatchShape(num_tokens=64), 2)
    assert 0.98 * weights < moved < 1.01 * weights
    assert into.flops(BatchShape(num_tokens=64)) / moved < 20 < into.flops(BatchShape(num_tokens=4096)) / moved


routings = st.integers(1, 40).flatmap(
    lambda experts: st.builds(
        Routing,
        num_experts=st.just(experts),
        num_per_token=st.integers(1, experts),
        skew=st.floats(0.0, 3.0),
    )
)


@settings(max_examples=80, deadline=None)
@given(routing=routings, num_tokens=st.integers(0, 500))
def test_loads_add_up_and_skew_touches_fewer(routing: Routing, num_tokens: int) -> None:
    popularity = routing.popularity
    assert sum(popularity) == pytest.approx(routing.num_per_token)
    assert all(0 <= part <= 1 + 1e-9 for part in popularity) and list(popularity) == sorted(popularity, reverse=True)
    assert sum(routing.load(num_tokens)) == pytest.approx(routing.num_per_token * num_tokens)
    balanced = replace(routing, skew=0.0)
    assert routing.num_touched(num_tokens) <= balanced.num_touched(num_tokens) + 1e-6
    assert balanced.num_touched(num_tokens) <= min(routing.num_experts, routing.num_per_token * num_tokens) + 1e-6
    assert balanced.num_touched(1) == pytest.approx(routing.num_per_token)
    # The formula is the sum over experts of equal popularity.
    by_load = sum(1 - (1 - part) ** num_tokens for part in balanced.popularity)
    assert balanced.num_touched(num_tokens) == pytest.approx(by_load, abs=1e-6)


def test_expected_experts_are_those_that_random_choices_touch() -> None:
    generator = torch.Generator().manual_seed(0)
    routing = Routing(num_experts=16, num_per_token=4)
    chosen = torch.rand(2000, 5, 16, generator=generator).topk(4).indices.flatten(1)
    touched = sum(len(set(row)) for row in chosen.tolist()) / len(chosen)
    assert touched == pytest.approx(routing.num_touched(5), rel=0.01)


def test_skew_changes_the_bytes_of_experts_alone() -> None:
    shape = BatchShape(num_tokens=64, num_decode_tokens=64, decode_context=640, num_sampled=64)
    skewed = with_skew(QWEN3, 1.0)
    assert skewed.flops(shape) == QWEN3.flops(shape) and skewed.num_parameters == QWEN3.num_parameters
    for plain, uneven in zip(QWEN3.operations(), skewed.operations(), strict=True):
        is_less = uneven.memory_bytes(shape, 2) < plain.memory_bytes(shape, 2)
        assert is_less is isinstance(plain.dims, ExpertDims)


# --- kernels -------------------------------------------------------------------------------------------------------


def _launch(kernels: Kernels, op: Operation, reads: tuple[Tensor, ...], writes: tuple[Tensor, ...], *weights: Tensor):  # type: ignore[no-untyped-def]
    count = len(writes[0])
    inputs = InputBuilder(TINY.ropes, num_rows=1, device=CPU).build(equal_requests(1, 0, count, 4))
    tokens = TokenRange(start=0, stop=count)
    kernels[op.kind](
        Launch(op=op, layer=0, tokens=tokens, reads=reads, writes=writes, weights=weights, inputs=inputs, cache=None)
    )


def _poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else -77, dtype=dtype)


KERNELS = pytest.mark.parametrize("kernels", [cpu.CPU_KERNELS, reference.REFERENCE_KERNELS], ids=["cpu", "reference"])


@KERNELS
@pytest.mark.parametrize("is_normalised", [True, False])
def test_the_router_takes_the_largest_probabilities(kernels: Kernels, is_normalised: bool) -> None:
    dims = RouterDims(in_features=32, routing=Routing(num_experts=6, num_per_token=3), is_normalised=is_normalised)
    op = replace(_named(TINY, "router"), dims=dims)
    x, weight = torch.randn(50, 32), torch.randn(6, 32)
    weights, ids = _poisoned(50, 3), _poisoned(50, 3, dtype=torch.int32)
    _launch(kernels, op, (x,), (weights, ids), weight)
    for token, row in enumerate((x.double() @ weight.double().t()).tolist()):
        total = sum(map(math.exp, row))
        best = sorted(range(6), key=lambda expert: -row[expert])[:3]
        expected = [math.exp(row[expert]) / total for expert in best]
        expected = [each / sum(expected) for each in expected] if is_normalised else expected
        assert ids[token].tolist() == best
        assert weights[token].tolist() == pytest.approx(expected, rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.permutations(range(6)), min_size=1, max_size=16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_grouped_products_are_those_of_each_row(ids: list[list[int]], dtype: torch.dtype, seed: int) -> None:
    """Order, both products and the sum against one product for each row; experts without rows are among them."""
    generator = torch.Generator().manual_seed(seed)
    chosen, count = torch.tensor(ids)[:, :3].int(), len(ids)
    x, into, down, shares = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((count, 32), (6, 48, 32), (6, 32, 24), (count, 3))
    )
    hidden = torch.randn(count, 32, generator=generator).to(dtype)
    expected, before = hidden.double(), hidden.clone()
    for token, choice in itertools.product(range(count), range(3)):
        expert = chosen[token, choice]
        gate, up = (x[token].double() @ into[expert].double().t()).chunk(2)
        row = torch.nn.functional.silu(gate) * up @ down[expert].double().t()
        expected[token] += shares[token, choice].double() * row
    for kernels in (cpu.CPU_KERNELS, reference.REFERENCE_KERNELS):
        rows, ends = _poisoned(count, 3, dtype=torch.int32), _poisoned(count, 6, dtype=torch.int32)
        _launch(kernels, _named(TINY, "expert_order"), (chosen,), (rows, ends))
        assert ends[0].tolist() == [int((chosen <= expert).sum()) for expert in range(6)]
        by_expert = [int(chosen.flatten()[row]) for row in rows.flatten()]
        assert by_expert == sorted(by_expert) and sorted(rows.flatten().tolist()) == list(range(3 * count))
        activation, out = _poisoned(count, 72).to(dtype), _poisoned(count, 96).to(dtype)
        _launch(kernels, _named(TINY, "experts_in"), (x, rows, ends), (activation,), into)
        _launch(kernels, _named(TINY, "experts_out"), (activation, rows, ends), (out,), down)
        stream = before.clone()
        _launch(kernels, _named(TINY, "combine"), (out, shares.float(), stream), (stream,))
        spread = expected.std().item() * (2e-6 if dtype is torch.float32 else 0.03) * 3 + 1e-4
        torch.testing.assert_close(
            stream.double(), expected, rtol=1e-4 if dtype is torch.float32 else 0.03, atol=spread
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_with_more_rows_than_a_product_takes(dtype: torch.dtype) -> None:
    """Products of a CPU are padded, and split beyond 256 rows; 300 tokens here all pass expert 0, 30 pass expert 5."""
    count = 300
    chosen = torch.tensor([[0, 5 if token < 30 else 3, 1 + token % 2] for token in range(count)], dtype=torch.int32)
    x, into, down = (torch.randn(shape).to(dtype) for shape in ((count, 32), (6, 48, 32), (6, 32, 24)))
    results = []
    for kernels in (cpu.CPU_KERNELS, reference.REFERENCE_KERNELS):
        rows, ends = _poisoned(count, 3, dtype=torch.int32), _poisoned(count, 6, dtype=torch.int32)
        activation, out = _poisoned(count, 72).to(dtype), _poisoned(count, 96).to(dtype)
        _launch(kernels, _named(TINY, "expert_order"), (chosen,), (rows, ends))
        _launch(kernels, _named(TINY, "experts_in"), (x, rows, ends), (activation,), into)
        _launch(kernels, _named(TINY, "experts_out"), (activation, rows, ends), (out,), down)
        results.append((activation, out))
    for mine, theirs in zip(*results, strict=True):
        tolerance = 1e-4 if dtype is torch.float32 else 0.02
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * theirs.float().std().item())


@KERNELS
def test_the_shared_gate_scales_rows(kernels: Kernels) -> None:
    x, activation, weight = torch.randn(9, 32), torch.randn(9, 40), torch.randn(1, 32)
    expected = activation / (1 + torch.exp(-(x @ weight[0])))[:, None]
    _launch(kernels, _named(TINY, "shared_gate"), (x, activation), (activation,), weight)
    torch.testing.assert_close(activation, expected)


def test_capturable_are_kernels_that_read_nothing_on_the_host() -> None:
    dense = build_graph(preset_config("llama-3-8b"), None).layer
    rest = {kind: kernel for kind, kernel in reference.REFERENCE_KERNELS.items() if "attention" not in kind}
    attentions = {OpKind.DECODE_ATTENTION: cpu.linear, OpKind.PREFILL_ATTENTION: cpu.linear}
    assert are_capturable({**rest, **attentions}, dense)
    assert not are_capturable({**rest, **attentions}, MIXTRAL.layer)
    grouped = {OpKind.EXPERTS_IN: cpu.linear, OpKind.EXPERTS_OUT: cpu.linear}
    for kind in grouped:
        one_of_them = {**grouped, kind: reference.REFERENCE_KERNELS[kind]}
        assert not are_capturable({**rest, **attentions, **one_of_them}, MIXTRAL.layer)
    assert are_capturable({**rest, **attentions, **grouped}, MIXTRAL.layer)
    assert not are_capturable(reference.REFERENCE_KERNELS, dense)


def test_a_device_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {kind: kernel for kind, kernel in cpu.CPU_KERNELS.items() if kind not in EXPERT_KINDS}
    monkeypatch.setitem(dispatch._KERNELS, "cpu", lambda *_: without)
    kernels_for(CPU, torch.float32, build_graph(preset_config("llama-3-8b"), None).layer)
    with pytest.raises(ValueError, match="no kernel for expert_order, experts_in, experts_out on device 'cpu'"):
        kernels_for(CPU, torch.float32, MIXTRAL.layer)


# --- graphs and plans ----------------------------------------------------------------------------------------------


def test_a_model_of_dense_and_sparse_layers() -> None:
    assert [kind.name for kind in TINY.layers] == ["sparse", "dense", "sparse"]
    dense, sparse = TINY.layers[1], TINY.layers[0]
    assert "gate_up_proj" in dense.operation_names and "router" not in dense.operation_names
    assert "router" in sparse.operation_names and "shared_down_proj" in sparse.operation_names
    assert {spec.name for spec in MIXTRAL.tensors}.isdisjoint({"gate_up", "activation", "shared_gate_up"})
    kinds = {op.kind for op in fuse_swiglu(TINY).layer}
    assert OpKind.LINEAR_SWIGLU in kinds and OpKind.SWIGLU not in kinds


def test_a_plan_must_cut_the_operations_of_an_order_alike() -> None:
    plan = nanobatch_plan(TINY, 64, [32])
    plan.validate(TINY)
    whole = {nano.operation: nano for nano in sequential_plan(TINY, 64).nano_operations}
    for op in TINY.layer:
        others = [nano for nano in plan.nano_operations if nano.operation != op.name]
        place = next(at for at, nano in enumerate(plan.nano_operations) if nano.operation == op.name)
        uneven = replace(plan, nano_operations=(*others[:place], whole[op.name], *others[place:]))
        if op.kind in EXPERT_KINDS:
            with pytest.raises(PlanError, match=r"must be cut at the same places, as both use 'expert_.*at token 32"):
                uneven.validate(TINY)
        else:
            uneven.validate(TINY)


def test_tensors_of_indices_have_four_bytes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = DeviceModel(
            graph=TINY,
            dtype=dtype,
            weights=random_weights(TINY, dtype, CPU, seed=0),
            caches=allocate_caches(TINY, num_pages=4, page_size=4, dtype=dtype, device=CPU),
            kernels=cpu.CPU_KERNELS,
        )
        sizes = bytes_of(TINY, num_tokens=10, num_logits=2, dtype_bytes=dtype.itemsize)
        for plans in (None, [sequential_plan(TINY, 10)]):
            tensors = Workspace.allocate(model, num_tokens=10, num_logits=2, plans=plans).tensors
            assert {name: tensor.nbytes for name, tensor in tensors.items()} == sizes
            types = {Element.MODEL: dtype, Element.INT32: torch.int32, Element.FLOAT32: torch.float32}
            assert all(tensor.dtype is types[TINY.tensor(name).element] for name, tensor in tensors.items())
    assert sizes["expert_ids"] == 10 * 3 * 4 and sizes["expert_activation"] == 10 * 3 * 24 * 2


@pytest.mark.parametrize("exchange", Exchange)
def test_experts_are_split_over_gpus_like_a_block(exchange: Exchange) -> None:
    shape = BatchShape(num_tokens=4096, num_decode_tokens=4096, decode_context=4096, num_sampled=1)
    for graph, last in ((MIXTRAL, "combine"), (QWEN2, "shared_down_proj"), (QWEN3, "combine")):
        part = shard(graph, 2, exchange)
        part.validate()
        for name in ("experts_in", "experts_out"):
            assert 2 * _named(part, name).flops(shape) == _named(graph, name).flops(shape)
        reduced = [op.name for op in part.layer if op.kind is OpKind.ALL_REDUCE and "o_proj" not in op.name]
        assert reduced == [f"{last}_all_reduce"]
        assert [op.resource for op in part.layer if op.name in reduced] == [Resource.NETWORK]
    gate = _named(shard(QWEN2, 2, exchange), "shared_gate")
    assert gate.flops(shape) == 4096 * (2 * 2048 + 5632 // 2)
    with pytest.raises(GraphError, match="'experts_out': 769 features cannot be dealt out to 2 GPUs"):
        shard(replace_experts(QWEN3, 769), 2, exchange)


@pytest.mark.parametrize("num_gpus", [1, 4])
def test_what_search_tries_runs_on_experts(num_gpus: int) -> None:
    """Cuts of every candidate satisfy the rule for orders, and experts are ordered as a product with what follows."""
    config = PRESETS["qwen2-57b-a14b"]
    profile = estimated_profile("qwen2-57b-a14b", config, parse_gpus(f"h200x{num_gpus}"), max_tokens=1024)
    graph = shard(build_graph(parse(config), None), num_gpus)
    groups = {group.name: [op.name for op in group.operations] for group in groups_of(graph)}
    assert groups["router"] == ["ffn_norm", "router", "expert_order"]
    assert groups["experts_out"] == ["experts_out", "combine"]
    shape = BatchShape(num_tokens=1024, num_decode_tokens=512, decode_context=512 * 900, prefill_context=512 * 200)
    table = CostTable(profile, graph)
    found = next(candidates(graph, table, shape, Deadline.after(20.0)))
    cuts = {task.group.name: set[int]() for task in found.problem.tasks}
    for task in found.problem.tasks:
        cuts[task.group.name].add(task.tokens.stop)
    assert cuts["router"] == cuts["experts_in"] == cuts["experts_out"] != {1024}
    # Where a batch is cut in four, it is up to attention alone.
    assert not {"router", "experts_in", "experts_out"} & {*_until_attention(groups_of(graph))}


def replace_experts(graph: OpGraph, width: int) -> OpGraph:
    """The graph with experts of another width."""

    def other(op: Operation) -> Operation:
        if not isinstance(op.dims, ExpertDims) or op.dims.is_gated:
            return op
        return replace(op, dims=replace(op.dims, in_features=width))

    return graph.map_kinds(lambda kind: replace(kind, operations=tuple(map(other, kind.operations))))


def test_measured_experts_have_rows() -> None:
    """Random numbers would be no order: what the products are measured on is written by the layer's own operations."""
    site = Site(graph=TINY, device=CPU, dtype=torch.float32, page_size=4)
    weights = random_weights(TINY, torch.float32, CPU, seed=0)
    workspace = random_workspace(site, TINY, weights, num_pages=8, num_tokens=32, num_rows=1)
    work = over_layers(workspace, lambda op: op.kind is OpKind.EXPERTS_IN, equal_requests(1, 0, 20, 4))
    assert workspace.tensors["expert_ends"][0, -1] == 60
    before = workspace.tensors["expert_activation"].clone()
    work()
    assert not torch.equal(workspace.tensors["expert_activation"][:20], before[:20])
    assert torch.equal(workspace.tensors["expert_activation"][20:], before[20:])
