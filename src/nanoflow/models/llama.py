"""The Llama family as a graph: Llama 2 and 3, DeepSeek-LLM, Mistral, Qwen 2, 2.5 and 3.

Which architecture takes which traits is `registry.py`'s knowledge; no kernel and no tensor here. The residual stream is
`hidden`: the embedding writes it, and the last product of each block adds to it in place, so that no sum is written
to be added later. SwiGLU stands by itself here; `graph/fuse.py` joins it to the product before it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from nanoflow.graph.graph import LayerKind, OpGraph, Parameter, ParameterPart, RopeSpec, TensorSpec
from nanoflow.graph.layers import sections_of
from nanoflow.graph.operation import AttentionDims, LinearDims, NormDims, Operation, OpKind, Resource, RowDims, Scope
from nanoflow.models.fields import ModelError, shown
from nanoflow.models.model import ModelConfig
from nanoflow.models.rope import rope_spec

# What checkpoints call the embedding and the output projection.
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = "model.layers.{layer}."
# Two names of one function.
_ACTIVATIONS = ("silu", "swish")


def build(
    config: ModelConfig, max_model_len: int | None, *, has_qkv_bias: bool = False, has_qk_norm: bool = False
) -> OpGraph:
    """The graph of a model of the family.

    Args:
        config: The model.
        max_model_len: Longest sequence served, for rotary embeddings that depend on it; None is the model's own limit.
        has_qkv_bias: Queries, keys and values have biases even if `config.attention_bias` is False (Qwen 2).
        has_qk_norm: Each query and key head is normalised before it is rotated (Qwen 3).

    Raises:
        ModelError: The activation or the rotary embedding is not one that is served.
    """
    if config.hidden_act not in _ACTIVATIONS:
        raise ModelError(f"{config.architecture}: hidden_act must be 'silu', got {shown(config.hidden_act)}")
    layer_parameters = (
        *_attention_parameters(config, has_qkv_bias=has_qkv_bias, has_qk_norm=has_qk_norm),
        *_mlp_parameters(config),
    )
    rope = rope_spec(config, max_model_len)
    kinds = {
        window: _kind(config, _attention_dims(config, window, has_qk_norm=has_qk_norm), layer_parameters, rope)
        for window in dict.fromkeys(config.layer_windows)
    }
    graph = OpGraph(
        name=config.architecture,
        vocab_size=config.vocab_size,
        prologue=(_embed(config),),
        sections=sections_of([kinds[window] for window in config.layer_windows]),
        epilogue=_epilogue(config),
        tensors=_tensors(config, next(iter(kinds.values())).attention),
        parameters=_parameters(config),
        ignored_sources=(r".*rotary_emb\.inv_freq", *((re.escape(OUTPUT),) if config.tie_word_embeddings else ())),
    )
    graph = replace(graph, name=f"{graph.name} {_size(graph)}")
    graph.validate()
    return graph


def _kind(
    config: ModelConfig, attention: AttentionDims, parameters: tuple[Parameter, ...], rope: RopeSpec
) -> LayerKind:
    """Layers with this window; what differs is the attention, so it alone is told apart, if there are other layers."""
    is_other = len(set(config.layer_windows)) > 1 and attention.window is not None
    variant = "sliding" if is_other else ""
    return LayerKind(
        name=variant or "layer",
        operations=_layer(config, attention, {parameter.name for parameter in parameters}, variant),
        parameters=parameters,
        rope=rope,
    )


def _attention_dims(config: ModelConfig, window: int | None, *, has_qk_norm: bool) -> AttentionDims:
    return AttentionDims(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        window=window,
        norm_eps=config.rms_norm_eps if has_qk_norm else None,
    )


def _tensors(config: ModelConfig, attention: AttentionDims) -> tuple[TensorSpec, ...]:
    hidden, sampled = config.hidden_size, Scope.SAMPLED
    return (
        TensorSpec(name="token_ids", width=1),
        TensorSpec(name="hidden", width=hidden),
        TensorSpec(name="normed", width=hidden),
        TensorSpec(name="qkv", width=attention.q_width + 2 * attention.kv_width),
        TensorSpec(name="q", width=attention.q_width),
        TensorSpec(name="kv", width=0, is_per_layer=True),
        TensorSpec(name="attn", width=attention.q_width),
        TensorSpec(name="gate_up", width=2 * config.intermediate_size),
        TensorSpec(name="activation", width=config.intermediate_size),
        TensorSpec(name="sampled_hidden", width=hidden, scope=sampled),
        TensorSpec(name="sampled_normed", width=hidden, scope=sampled),
        TensorSpec(name="logits", width=config.vocab_size, scope=sampled),
    )


def _embed(config: ModelConfig) -> Operation:
    return Operation(
        name="embed",
        kind=OpKind.EMBED,
        resource=Resource.MEMORY,
        reads=("token_ids",),
        writes=("hidden",),
        weights=("embed.weight",),
        dims=RowDims(width=config.hidden_size),
    )


def _layer(config: ModelConfig, attention: AttentionDims, parameters: set[str], variant: str) -> tuple[Operation, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv_width = attention.q_width + 2 * attention.kv_width
    return (
        _norm("attn_norm", config),
        _linear("qkv_proj", "normed", "qkv", hidden, qkv_width, parameters),
        *_attention(attention, parameters, variant),
        _linear_add("o_proj", "attn", attention.q_width, hidden, parameters),
        _norm("ffn_norm", config),
        _linear("gate_up_proj", "normed", "gate_up", hidden, 2 * inner, parameters),
        Operation(
            name="activation",
            kind=OpKind.SWIGLU,
            resource=Resource.MEMORY,
            reads=("gate_up",),
            writes=("activation",),
            dims=RowDims(width=inner),
        ),
        _linear_add("down_proj", "activation", inner, hidden, parameters),
    )


def _attention(dims: AttentionDims, parameters: set[str], variant: str) -> tuple[Operation, ...]:
    return (
        Operation(
            name="rope_append",
            kind=OpKind.ROPE_APPEND,
            resource=Resource.MEMORY,
            reads=("qkv",),
            writes=("q", "kv"),
            weights=_present(("q_norm.weight", "k_norm.weight"), parameters),
            dims=replace(dims, window=None),
        ),
        Operation(
            name="decode_attention",
            kind=OpKind.DECODE_ATTENTION,
            resource=Resource.MEMORY,
            scope=Scope.DECODE,
            reads=("q", "kv"),
            writes=("attn",),
            dims=dims,
            variant=variant,
        ),
        Operation(
            name="prefill_attention",
            kind=OpKind.PREFILL_ATTENTION,
            resource=Resource.COMPUTE,
            scope=Scope.PREFILL,
            reads=("q", "kv"),
            reads_before=("kv",),
            writes=("attn",),
            dims=dims,
            variant=variant,
        ),
    )


def _epilogue(config: ModelConfig) -> tuple[Operation, ...]:
    """From the residual stream of the sampled rows to their logits."""
    output = "embed.weight" if config.tie_word_embeddings else "lm_head.weight"
    return (
        Operation(
            name="gather_sampled",
            kind=OpKind.GATHER_ROWS,
            resource=Resource.MEMORY,
            scope=Scope.SAMPLED,
            reads=("hidden",),
            writes=("sampled_hidden",),
            dims=RowDims(width=config.hidden_size),
        ),
        _norm("final_norm", config, scope=Scope.SAMPLED, prefix="sampled_"),
        Operation(
            name="lm_head",
            kind=OpKind.LINEAR,
            resource=Resource.COMPUTE,
            scope=Scope.SAMPLED,
            reads=("sampled_normed",),
            writes=("logits",),
            weights=(output,),
            dims=LinearDims(in_features=config.hidden_size, out_features=config.vocab_size),
        ),
    )


def _norm(name: str, config: ModelConfig, *, scope: Scope = Scope.ALL, prefix: str = "") -> Operation:
    """The norm of `hidden`; `prefix` chooses the tensors of the sampled rows."""
    return Operation(
        name=name,
        kind=OpKind.RMS_NORM,
        resource=Resource.MEMORY,
        scope=scope,
        reads=(f"{prefix}hidden",),
        writes=(f"{prefix}normed",),
        weights=(f"{name}.weight",),
        dims=NormDims(width=config.hidden_size, eps=config.rms_norm_eps),
    )


def _linear(name: str, read: str, written: str, in_features: int, out_features: int, parameters: set[str]) -> Operation:
    return Operation(
        name=name,
        kind=OpKind.LINEAR,
        resource=Resource.COMPUTE,
        reads=(read,),
        writes=(written,),
        weights=_present((f"{name}.weight", f"{name}.bias"), parameters),
        dims=LinearDims(in_features=in_features, out_features=out_features),
    )


def _linear_add(name: str, read: str, in_features: int, out_features: int, parameters: set[str]) -> Operation:
    """The last product of a block, added to the residual stream."""
    product = _linear(name, read, "hidden", in_features, out_features, parameters)
    return replace(product, kind=OpKind.LINEAR_ADD, reads=(read, "hidden"))


def _present(names: tuple[str, ...], parameters: set[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in parameters)


def _parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    embedding = (config.vocab_size, config.hidden_size)
    is_tied = config.tie_word_embeddings
    untied = () if is_tied else (_fused("lm_head.weight", (OUTPUT, embedding)),)
    # A tied pair may be stored under either name.
    table = ParameterPart(source=EMBEDDING, shape=embedding, other_source=OUTPUT if is_tied else None)
    return (
        Parameter(name="embed.weight", parts=(table,)),
        _fused("final_norm.weight", ("model.norm.weight", (config.hidden_size,))),
        *untied,
    )


def _attention_parameters(config: ModelConfig, *, has_qkv_bias: bool, has_qk_norm: bool) -> tuple[Parameter, ...]:
    hidden, source = config.hidden_size, f"{_LAYER}self_attn."
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
    norms = ("q_norm", "k_norm") if has_qk_norm else ()
    return (
        _fused("attn_norm.weight", (f"{_LAYER}input_layernorm.weight", (hidden,))),
        *_projection("qkv_proj", source, qkv, hidden, has_bias=config.attention_bias or has_qkv_bias),
        *(_fused(f"{norm}.weight", (f"{source}{norm}.weight", (config.head_dim,))) for norm in norms),
        *_projection("o_proj", source, {"o_proj": hidden}, q_width, has_bias=config.attention_bias),
    )


def _mlp_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    hidden, inner, source, has_bias = config.hidden_size, config.intermediate_size, f"{_LAYER}mlp.", config.mlp_bias
    return (
        _fused("ffn_norm.weight", (f"{_LAYER}post_attention_layernorm.weight", (hidden,))),
        *_projection("gate_up_proj", source, {"gate_proj": inner, "up_proj": inner}, hidden, has_bias=has_bias),
        *_projection("down_proj", source, {"down_proj": hidden}, inner, has_bias=has_bias),
    )


def _projection(
    name: str, source: str, heights: dict[str, int], in_features: int, *, has_bias: bool
) -> tuple[Parameter, ...]:
    """Weight, and bias if it has one, of a product whose checkpoint parts have these names and output features."""
    weight = _fused(
        f"{name}.weight", *((f"{source}{part}.weight", (height, in_features)) for part, height in heights.items())
    )
    bias = _fused(f"{name}.bias", *((f"{source}{part}.bias", (height,)) for part, height in heights.items()))
    return (weight, bias) if has_bias else (weight,)


def _fused(name: str, *parts: tuple[str, tuple[int, ...]]) -> Parameter:
    return Parameter(name=name, parts=tuple(ParameterPart(source=source, shape=shape) for source, shape in parts))


def _size(graph: OpGraph) -> str:
    count = graph.num_parameters
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
