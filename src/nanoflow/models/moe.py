"""Mixtures of experts as a graph: Mixtral, Qwen 1.5 and 2 MoE, Qwen 3 MoE.

Attention is Llama's (`llama.py`). In a sparse layer the feed-forward block is a router, the order of a token range's
rows by expert, two grouped products and a weighted sum; a shared expert, which every token passes, is an ordinary block
beside them. Layers without experts have Llama's block, so a model may have dense and sparse kinds of layers.
`graph/experts.py` has the sizes and costs of these operations, `expert_fields.py` what config.json says of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanoflow.graph.experts import (
    ClampedSwiglu,
    CombineDims,
    ExpertDims,
    OrderDims,
    RouterDims,
    Routing,
    SharedGateDims,
)
from nanoflow.graph.graph import Element, LayerKind, OpGraph, Parameter, ParameterPart, TensorSpec
from nanoflow.graph.operation import Operation, OpKind, Resource
from nanoflow.models import llama, parts
from nanoflow.models.expert_fields import ExpertsConfig
from nanoflow.models.model import ModelConfig
from nanoflow.models.rope import rope_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNames:
    """Names of a sparse block's tensors in checkpoints.

    Attributes:
        block: Prefix of the block within a layer.
        gate, up, down: Names of an expert's matrices.
    """

    block: str
    gate: str
    up: str
    down: str


MIXTRAL = StoredNames(block="block_sparse_moe.", gate="w1", up="w3", down="w2")
QWEN = StoredNames(block="mlp.", gate="gate_proj", up="up_proj", down="down_proj")
# transformers 5 holds the experts of a layer as one tensor each in a block of this name, and some checkpoints do too.
_STACKED = "mlp."
# Tensors that say which row is at each place, and where each expert's rows end.
_ORDER = ("expert_rows", "expert_ends")


def build(
    config: ModelConfig,
    max_model_len: int | None,
    *,
    names: StoredNames = QWEN,
    has_qk_norm: bool = False,
) -> OpGraph:
    """The graph of a mixture of experts.

    Args:
        config: The model, with experts.
        max_model_len: Longest sequence served, on which some rotary embeddings depend; None is the model's own limit.
        names: What checkpoints call the tensors of a sparse block.
        has_qk_norm: Each query and key head is normalised before rotation (Qwen 3).

    Raises:
        ModelError: The activation or the rotary embedding is not supported.
    """
    llama.require_silu(config)
    experts = config.experts
    assert experts is not None, "the architecture's reading has fields of experts"
    has_qkv_bias = config.fields.flag("qkv_bias", default=False)
    attention_parameters = llama.attention_parameters(config, has_qkv_bias=has_qkv_bias, has_qk_norm=has_qk_norm)
    rope = rope_spec(config, max_model_len)

    def kind_of(window: int | None, is_sparse: bool) -> LayerKind:
        block = _sparse_parameters(config, experts, names) if is_sparse else llama.mlp_parameters(config)
        parameters = (*attention_parameters, *block)
        known = {parameter.name for parameter in parameters}
        dims = llama.attention_dims(config, window, rope, has_qk_norm=has_qk_norm)
        variant = parts.variant_of(config, window)
        of_block = _sparse_block(config, experts, known) if is_sparse else llama.mlp(config, known)
        return LayerKind(
            name=f"{variant} {'sparse' if is_sparse else 'dense'}".strip(),
            operations=(*llama.attention_block(config, dims, known, variant), *of_block),
            parameters=parameters,
            rope=rope,
        )

    layers = list(zip(config.layer_windows, experts.sparse_layers, strict=True))
    kinds = {each: kind_of(*each) for each in dict.fromkeys(layers)}
    return parts.decoder(
        config,
        [kinds[each] for each in layers],
        parameters=parts.shared_parameters(config),
        more_tensors=tensors(config, experts),
    )


def with_skew(graph: OpGraph, skew: float) -> OpGraph:
    """The graph whose costs count with unevenly chosen experts; see `Routing.skew`."""

    def skewed(op: Operation) -> Operation:
        if not isinstance(op.dims, ExpertDims):
            return op
        return replace(op, dims=replace(op.dims, routing=replace(op.dims.routing, skew=skew)))

    return graph.map_kinds(lambda kind: replace(kind, operations=tuple(map(skewed, kind.operations))))


def _routing(experts: ExpertsConfig) -> Routing:
    return Routing(num_experts=experts.num_experts, num_per_token=experts.num_per_token)


def _sparse_block(config: ModelConfig, experts: ExpertsConfig, parameters: set[str]) -> tuple[Operation, ...]:
    """The feed-forward block of a sparse layer."""
    return (
        parts.norm("ffn_norm", config),
        *routed(config, experts, parameters),
        *(() if experts.shared_intermediate_size is None else _shared(config, experts, parameters)),
    )


def routed(
    config: ModelConfig, experts: ExpertsConfig, parameters: set[str], clamped: ClampedSwiglu | None = None
) -> Iterator[Operation]:
    """From `normed` to the experts' weighted sum, added to `hidden`.

    Args:
        config: The model.
        experts: Its experts.
        parameters: Names of the layer's; router and products have biases if there are parameters of that name.
        clamped: The activation; None for SwiGLU.
    """
    routing, hidden = _routing(experts), config.hidden_size
    yield Operation(
        name="router",
        kind=OpKind.ROUTER,
        resource=Resource.MEMORY,
        reads=("normed",),
        writes=("expert_weights", "expert_ids"),
        weights=parts.present(("router.weight", "router.bias"), parameters),
        dims=RouterDims(in_features=hidden, routing=routing, is_normalised=experts.is_normalised),
    )
    yield Operation(
        name="expert_order",
        kind=OpKind.EXPERT_ORDER,
        resource=Resource.MEMORY,
        reads=("expert_ids",),
        writes=_ORDER,
        dims=OrderDims(routing=routing),
    )
    yield from _products(config, experts, parameters, clamped)
    yield Operation(
        name="combine",
        kind=OpKind.COMBINE,
        resource=Resource.MEMORY,
        reads=("expert_out", "expert_weights", "hidden"),
        writes=("hidden",),
        dims=CombineDims(width=hidden, routing=routing),
    )


def _products(
    config: ModelConfig, experts: ExpertsConfig, parameters: set[str], clamped: ClampedSwiglu | None
) -> Iterator[Operation]:
    """The grouped products over all experts; the arguments are those of `routed`."""
    routing, hidden, inner = _routing(experts), config.hidden_size, experts.intermediate_size
    has_bias = "experts_in.bias" in parameters
    yield Operation(
        name="experts_in",
        kind=OpKind.EXPERTS_IN,
        resource=Resource.COMPUTE,
        reads=("normed", *_ORDER),
        writes=("expert_activation",),
        weights=parts.present(("experts_in.weight", "experts_in.bias"), parameters),
        dims=ExpertDims(
            in_features=hidden,
            out_features=2 * inner,
            routing=routing,
            is_gated=True,
            has_bias=has_bias,
            clamped=clamped,
        ),
    )
    yield Operation(
        name="experts_out",
        kind=OpKind.EXPERTS_OUT,
        resource=Resource.COMPUTE,
        reads=("expert_activation", *_ORDER),
        writes=("expert_out",),
        weights=parts.present(("experts_out.weight", "experts_out.bias"), parameters),
        dims=ExpertDims(in_features=inner, out_features=hidden, routing=routing, is_gated=False, has_bias=has_bias),
    )


def _shared(config: ModelConfig, experts: ExpertsConfig, parameters: set[str]) -> Iterator[Operation]:
    """The shared expert: its activation is multiplied by its gate, then its product is added to `hidden`."""
    hidden, inner = config.hidden_size, experts.shared_intermediate_size
    assert inner is not None
    yield parts.linear("shared_gate_up_proj", "normed", "shared_gate_up", hidden, 2 * inner, parameters)
    yield replace(
        parts.activation(OpKind.SWIGLU, inner),
        name="shared_activation",
        reads=("shared_gate_up",),
        writes=("shared_activation",),
    )
    yield Operation(
        name="shared_gate",
        kind=OpKind.SHARED_GATE,
        resource=Resource.MEMORY,
        reads=("normed", "shared_activation"),
        writes=("shared_activation",),
        weights=("shared_gate.weight",),
        dims=SharedGateDims(in_features=hidden, width=inner),
    )
    yield parts.linear_add("shared_down_proj", "shared_activation", inner, hidden, parameters)


def _sparse_parameters(config: ModelConfig, experts: ExpertsConfig, names: StoredNames) -> tuple[Parameter, ...]:
    hidden, inner, count = config.hidden_size, experts.intermediate_size, experts.num_experts
    block, stacked = f"{parts.LAYER}{names.block}", f"{parts.LAYER}{_STACKED}"
    router = ParameterPart(source=f"{block}gate.weight", shape=(count, hidden), other_source=f"{stacked}gate.weight")
    return (
        llama.ffn_norm(config),
        Parameter(name="router.weight", parts=(router,)),
        _of_experts(
            "experts_in", block, count, (names.gate, names.up), (inner, hidden), f"{stacked}experts.gate_up_proj"
        ),
        _of_experts("experts_out", block, count, (names.down,), (hidden, inner), f"{stacked}experts.down_proj"),
        *_shared_parameters(config, experts, block),
    )


def _of_experts(
    name: str, block: str, count: int, matrices: tuple[str, ...], shape: tuple[int, int], whole: str
) -> Parameter:
    """The matrices of all experts, those of one expert one below the other."""
    sources = ((f"{block}experts.{expert}.{matrix}.weight", shape) for expert in range(count) for matrix in matrices)
    return replace(parts.fused(f"{name}.weight", *sources), num_stacked=count, whole=whole)


def _shared_parameters(config: ModelConfig, experts: ExpertsConfig, block: str) -> tuple[Parameter, ...]:
    hidden, inner, source = config.hidden_size, experts.shared_intermediate_size, f"{block}shared_expert."
    if inner is None:
        return ()
    gate_up = {"gate_proj": inner, "up_proj": inner}
    return (
        *parts.projection("shared_gate_up_proj", source, gate_up, hidden, has_bias=False),
        parts.fused("shared_gate.weight", (f"{block}shared_expert_gate.weight", (1, hidden))),
        *parts.projection("shared_down_proj", source, {"down_proj": hidden}, inner, has_bias=False),
    )


def tensors(config: ModelConfig, experts: ExpertsConfig) -> tuple[TensorSpec, ...]:
    """Tensors of sparse layers. A token has K rows of `expert_activation`, sorted by expert over its token range.

    The ends of the experts' rows are in the first row of the token range in `expert_ends`; other rows are not used.
    """
    count = experts.num_per_token
    shared = experts.shared_intermediate_size or 0
    return (
        TensorSpec(name="expert_weights", width=count, element=Element.FLOAT32),
        TensorSpec(name="expert_ids", width=count, element=Element.INT32),
        TensorSpec(name="expert_rows", width=count, element=Element.INT32, is_by_range=True),
        TensorSpec(name="expert_ends", width=experts.num_experts, element=Element.INT32, is_by_range=True),
        TensorSpec(name="expert_activation", width=count * experts.intermediate_size, is_by_range=True),
        TensorSpec(name="expert_out", width=count * config.hidden_size),
        TensorSpec(name="shared_gate_up", width=2 * shared),
        TensorSpec(name="shared_activation", width=shared),
    )
