"""The graph says all there is to say: interpreted op by op in plain torch it gives the logits of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nanoflow.graph.experts import ExpertDims, OrderDims, RouterDims
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import (
    AttentionDims,
    BatchShape,
    LinearDims,
    NormDims,
    Operation,
    OpKind,
    RowDims,
    Scope,
)
from nanoflow.graph.shard import shard
from nanoflow.models import config_json as model_config
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import ARCHITECTURES, build_graph
from nanoflow.models.weights import Weights, load_weights
from tests.families import FAMILIES, SLIDING_WINDOW, make_model

NUM_TOKENS = 90  # beyond the sliding window and the trained length of the models with scaled rotary embeddings


class Interpreter:
    """One sequence as one prefill; every row is sampled. Keys and values of a layer are the tensor "kv"."""

    def __init__(self, graph: OpGraph, weights: Weights) -> None:
        self.graph, self.weights, self.kind = graph, weights, graph.layers[0]
        self.tensors: dict[str, Tensor] = {}

    def logits(self, token_ids: Tensor) -> Tensor:
        self.tensors["token_ids"] = token_ids
        self.run(self.graph.prologue, self.weights.shared)
        for kind, parameters in zip(self.graph.layers, self.weights.layers, strict=True):
            self.kind = kind
            self.run(kind.operations, parameters)
        self.run(self.graph.epilogue, self.weights.shared)
        return self.tensors["logits"]

    def run(self, operations: tuple[Operation, ...], parameters: dict[str, Tensor]) -> None:
        for op in operations:
            if op.scope is Scope.DECODE:
                continue
            taken = [self.tensors[name] for name in op.reads] + [parameters[name] for name in op.weights]
            given = KERNELS[op.kind](self, op, *taken)
            for name, tensor in zip(op.writes, given, strict=True):
                width = self.graph.tensor(name).width
                assert not width or tensor.shape == (NUM_TOKENS, width)
                self.tensors[name] = tensor

    def embed(self, op: Operation, ids: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(op.dims, RowDims)
        return (table[ids] * op.dims.scale,)

    def gather_rows(self, op: Operation, *rows: Tensor) -> tuple[Tensor, ...]:
        return rows

    def rms_norm(self, op: Operation, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(op.dims, NormDims)
        return (functional.rms_norm(hidden, (op.dims.width,), weight, op.dims.eps),)

    def rms_norm_add(self, op: Operation, x: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (hidden + self.rms_norm(op, x, weight)[0],)

    def linear(self, op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return (functional.linear(x, weight, bias),)

    def linear_add(
        self, op: Operation, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return (hidden + functional.linear(x, weight, bias),)

    def swiglu(self, op: Operation, gate_up: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(op.dims, RowDims)
        return (functional.silu(gate_up[:, : op.dims.width]) * gate_up[:, op.dims.width :],)

    def geglu(self, op: Operation, gate_up: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(op.dims, RowDims)
        gate, up = gate_up[:, : op.dims.width], gate_up[:, op.dims.width :]
        return (0.5 * gate * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up,)

    def router(self, op: Operation, x: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(op.dims, RouterDims)
        exponents = (x @ weight.T + sum(bias)).exp()
        weights, ids = (exponents / exponents.sum(1, keepdim=True)).sort(descending=True)
        weights, ids = (each[:, : op.dims.routing.num_per_token] for each in (weights, ids))
        return weights / weights.sum(1, keepdim=True) if op.dims.is_normalised else weights, ids

    def expert_order(self, op: Operation, ids: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(op.dims, OrderDims)
        chosen = ids.flatten().tolist()
        rows = sorted(range(len(chosen)), key=lambda row: chosen[row])
        ends = [sum(each <= expert for each in chosen) for expert in range(op.dims.routing.num_experts)]
        return torch.tensor(rows).view_as(ids), torch.tensor(ends).expand(NUM_TOKENS, -1)

    def experts_in(
        self, op: Operation, x: Tensor, rows: Tensor, ends: Tensor, weight: Tensor, *bias: Tensor
    ) -> tuple[Tensor, ...]:
        assert isinstance(op.dims, ExpertDims)
        assert op.dims.has_bias is bool(bias)
        of_rows = []
        for token, expert in self._routed(rows, ends):
            gate, up = (weight[expert] @ x[token] + sum(each[expert] for each in bias)).chunk(2)
            if (clamped := op.dims.clamped) is None:
                of_rows.append(functional.silu(gate) * up)
            else:
                gate, up = gate.clamp(max=clamped.limit), up.clamp(-clamped.limit, clamped.limit)
                of_rows.append((up + 1) * gate / (1 + (-clamped.alpha * gate).exp()))
        return (torch.stack(of_rows).view(NUM_TOKENS, -1),)

    def experts_out(
        self, op: Operation, act: Tensor, rows: Tensor, ends: Tensor, weight: Tensor, *bias: Tensor
    ) -> tuple[Tensor, ...]:
        routed = zip(act.view(rows.numel(), -1), self._routed(rows, ends), strict=True)
        out = torch.stack([weight[expert] @ row + sum(each[expert] for each in bias) for row, (_, expert) in routed])
        return (out[rows.flatten().argsort()].view(NUM_TOKENS, -1),)

    def _routed(self, rows: Tensor, ends: Tensor) -> list[tuple[int, int]]:
        """Token and expert of each row, in the experts' order."""
        count = rows.shape[1]
        return [(row // count, int((ends[0] <= place).sum())) for place, row in enumerate(rows.flatten().tolist())]

    def combine(self, op: Operation, out: Tensor, weights: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        return (hidden + torch.einsum("tk,tkh->th", weights, out.view(*weights.shape, -1)),)

    def shared_gate(self, op: Operation, x: Tensor, activation: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (activation / (1.0 + (-(x @ weight[0])).exp())[:, None],)

    def rope_append(self, op: Operation, qkv: Tensor, *norms: Tensor) -> tuple[Tensor, ...]:
        dims = op.dims
        assert isinstance(dims, AttentionDims)
        heads = qkv.view(NUM_TOKENS, -1, dims.head_dim)
        q, rest = heads[:, : dims.num_heads], heads[:, dims.num_heads :]
        k, v = rest.chunk(2, dim=1)
        if norms:
            assert dims.norm_eps is not None
            q, k = (
                functional.rms_norm(x, (dims.head_dim,), w, dims.norm_eps) for x, w in zip((q, k), norms, strict=True)
            )
        return self.rotate(q).flatten(1), torch.stack((self.rotate(k), v))

    def rotate(self, heads: Tensor) -> Tensor:
        rope = self.kind.rope
        angles = torch.arange(len(heads), dtype=torch.float64)[:, None, None] * torch.tensor(rope.inv_freq)
        cos, sin = ((f(angles) * rope.attention_factor).float() for f in (torch.cos, torch.sin))
        half = len(rope.inv_freq)
        low, high, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)

    def prefill_attention(self, op: Operation, q: Tensor, kv: Tensor, *sinks: Tensor) -> tuple[Tensor, ...]:
        dims = op.dims
        assert isinstance(dims, AttentionDims)
        k, v = (x.repeat_interleave(dims.num_heads // dims.num_kv_heads, dim=1) for x in kv)
        scores = torch.einsum("qhd,khd->hqk", q.view(NUM_TOKENS, -1, dims.head_dim), k) * dims.scale
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        window = dims.window or NUM_TOKENS
        scores = scores.masked_fill((distance < 0) | (distance >= window), float("-inf"))
        exponents = scores.exp()
        total = exponents.sum(-1, keepdim=True) + sum(each.exp()[:, None, None] for each in sinks)
        return (torch.einsum("hqk,khd->qhd", exponents / total, v).flatten(1),)


KERNELS: dict[OpKind, Callable[..., tuple[Tensor, ...]]] = {
    OpKind.EMBED: Interpreter.embed,
    OpKind.GATHER_ROWS: Interpreter.gather_rows,
    OpKind.RMS_NORM: Interpreter.rms_norm,
    OpKind.RMS_NORM_ADD: Interpreter.rms_norm_add,
    OpKind.LINEAR: Interpreter.linear,
    OpKind.LINEAR_ADD: Interpreter.linear_add,
    OpKind.ROPE_APPEND: Interpreter.rope_append,
    OpKind.PREFILL_ATTENTION: Interpreter.prefill_attention,
    OpKind.SWIGLU: Interpreter.swiglu,
    OpKind.GEGLU: Interpreter.geglu,
    OpKind.ROUTER: Interpreter.router,
    OpKind.EXPERT_ORDER: Interpreter.expert_order,
    OpKind.EXPERTS_IN: Interpreter.experts_in,
    OpKind.EXPERTS_OUT: Interpreter.experts_out,
    OpKind.COMBINE: Interpreter.combine,
    OpKind.SHARED_GATE: Interpreter.shared_gate,
}


def _load(folder: Path) -> tuple[OpGraph, Weights]:
    graph = build_graph(model_config.load(folder), None)
    return graph, load_weights(graph, folder, torch.float32, torch.device("cpu"), show_progress=False)


def _reference_logits(folder: Path, token_ids: Tensor) -> Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: Tensor = model(token_ids[None]).logits[0]
    return logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_computes_what_transformers_computes(family: str, tied: bool, tmp_path: Path) -> None:
    make_model(family, tmp_path, tied=tied)
    graph, weights = _load(tmp_path)
    token_ids = torch.randint(graph.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    expected = _reference_logits(tmp_path, token_ids)
    logits = Interpreter(graph, weights).logits(token_ids)
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=5e-4)  # measured: 7e-5, with logits of deviation 2.4


def test_every_architecture_has_a_family(tmp_path: Path) -> None:
    # Gemma's class for text has a longer name.
    names = (family.config_class.replace("TextConfig", "Config") for family in FAMILIES.values())
    classes = {name.replace("Config", "ForCausalLM") for name in names}
    assert classes == set(ARCHITECTURES)


def test_windows_of_sliding_families(tmp_path: Path) -> None:
    make_model("mistral", tmp_path / "mistral")
    make_model("qwen2-sliding", tmp_path / "qwen2")
    make_model("qwen2", tmp_path / "plain")
    assert _load(tmp_path / "mistral")[0].windows == 3 * (SLIDING_WINDOW,)
    assert _load(tmp_path / "qwen2")[0].windows == (None, None, SLIDING_WINDOW, SLIDING_WINDOW)
    assert _load(tmp_path / "plain")[0].windows == 3 * (None,)


LLAMA_2_70B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}
# What the paper leaves out: the residual that o_proj and down_proj read, 2048 tokens in 80 layers.
RESIDUAL_GIGABYTES = 80 * 2048 * 8192 * 2 / 1e9


@pytest.mark.parametrize(
    ("operation", "gflop", "gigabytes"),
    [
        ("qkv_proj", 27487.8, 19.5),
        ("o_proj", 21990.2, 16.1 + RESIDUAL_GIGABYTES),
        ("gate_up_proj", 153931.6, 96.6),
        ("down_proj", 76965.8, 49.7 + RESIDUAL_GIGABYTES),
        ("decode_attention", 3665.9, 462.2),
    ],
)
def test_costs_are_those_of_table_2_of_the_paper(operation: str, gflop: float, gigabytes: float) -> None:
    graph = build_graph(model_config.parse(LLAMA_2_70B), None)
    shape = BatchShape(num_tokens=2048, num_decode_tokens=1365, decode_context=1365 * 1024)
    op = next(op for op in graph.layer if op.name == operation)
    assert op.flops(shape) * graph.num_layers / 1e9 == pytest.approx(gflop, rel=0.01)
    assert op.memory_bytes(shape, 2) * graph.num_layers / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_a_part_of_a_head_is_rotated_and_counted() -> None:
    whole = model_config.parse({**LLAMA_2_70B, "architectures": ["Phi3ForCausalLM"]})
    part = replace(whole, rope=replace(whole.rope, rotary_dim=96))
    shape = BatchShape(num_tokens=7, num_decode_tokens=7, decode_context=70)
    flops = [
        next(op.flops(shape) for op in build_graph(config, None).layer if op.kind is OpKind.ROPE_APPEND)
        for config in (whole, part)
    ]
    assert flops == [3 * 7 * (64 + 8) * rotated for rotated in (128, 96)]


def test_size_of_llama_2_70b() -> None:
    graph = build_graph(model_config.parse(LLAMA_2_70B), None)
    assert graph.num_parameters == 68_976_648_192
    assert graph.name == "LlamaForCausalLM 69.0B"
    assert graph.kv_bytes_per_token(2) == 327_680


def test_unknown_architecture_is_one_line_that_lists_the_known() -> None:
    for refuse in (
        lambda: model_config.parse({**LLAMA_2_70B, "architectures": ["MambaForCausalLM"]}),
        lambda: build_graph(replace(model_config.parse(LLAMA_2_70B), architecture="MambaForCausalLM"), None),
    ):
        with pytest.raises(
            model_config.ModelError, match=r"'MambaForCausalLM' is not known .*known: LlamaForCausalLM, "
        ):
            refuse()


def test_other_activations_are_refused() -> None:
    config = model_config.parse({**LLAMA_2_70B, "hidden_act": "gelu"})
    with pytest.raises(model_config.ModelError, match="hidden_act must be 'silu', got 'gelu'"):
        build_graph(config, None)


@pytest.mark.parametrize(("num_gpus", "num_kv_heads"), [(2, 4), (8, 1), (16, 1)])
def test_heads_of_keys_are_repeated_where_there_are_fewer_than_gpus(num_gpus: int, num_kv_heads: int) -> None:
    """Llama-3-8B has 32 heads and 8 of keys."""
    graph = shard(build_graph(preset_config("llama-3-8b"), None), num_gpus)
    (dims,) = {op.dims for op in graph.layer if isinstance(op.dims, AttentionDims)}
    assert (dims.num_heads, dims.num_kv_heads) == (32 // num_gpus, num_kv_heads)
    qkv = next(op.dims for op in graph.layer if op.name == "qkv_proj")
    assert isinstance(qkv, LinearDims) and qkv.out_features == (32 // num_gpus + 2 * num_kv_heads) * 128
