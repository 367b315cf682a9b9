"""Gemma 3 (text) as a graph: layers of two kinds in a fixed pattern, most with a sliding window, the others without.

Each kind has its own rotary embedding. A block's output is normalised before it is added to the residual stream, so
that the addition is not fused with the last product. Norms multiply by 1 + the weight in the checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

from nanoflow.graph.graph import LayerKind, OpGraph, Parameter, RopeSpec, TensorSpec
from nanoflow.graph.operation import AttentionDims, Operation, OpKind
from nanoflow.models import parts
from nanoflow.models.fields import ModelError, shown
from nanoflow.models.model import ModelConfig
from nanoflow.models.rope import rope_spec

_ACTIVATION = "gelu_pytorch_tanh"
# Fields of config.json that would change what is computed, and are not supported.
_SOFT_CAPS = ("final_logit_softcapping", "attn_logit_softcapping")


def build(config: ModelConfig, max_model_len: int | None) -> OpGraph:
    """The graph of a model of the family.

    Args:
        config: The model.
        max_model_len: Longest sequence served, on which some rotary embeddings depend; None is the model's own limit.

    Raises:
        ModelError: The activation, a rotary embedding or another field has a value that is not supported.
    """
    if config.hidden_act != _ACTIVATION:
        raise ModelError(
            f"{config.architecture}: hidden_activation must be {_ACTIVATION!r}, got {shown(config.hidden_act)}"
        )
    for name in _SOFT_CAPS:
        if config.fields.has(name):
            raise config.fields.error(name, "must be null: soft caps are not served")
    if config.fields.has("use_bidirectional_attention") and config.fields.flag("use_bidirectional_attention"):
        raise config.fields.error("use_bidirectional_attention", "must be false: only causal attention is served")
    parameters = _layer_parameters(config)
    embedding, final_norm, *others = parts.shared_parameters(config)
    return parts.decoder(
        config,
        parts.by_window(config, lambda window: _kind(config, window, parameters, _rope(config, window, max_model_len))),
        parameters=(embedding, _one_more(final_norm), *others),
        more_tensors=(TensorSpec(name="block", width=config.hidden_size),),
        scale=config.hidden_size**0.5,
    )


def _rope(config: ModelConfig, window: int | None, max_model_len: int | None) -> RopeSpec:
    """The rotary embedding of layers with this window."""
    rope = config.rope if window is None or config.local_rope is None else config.local_rope
    return rope_spec(replace(config, rope=rope), max_model_len)


def _kind(config: ModelConfig, window: int | None, parameters: tuple[Parameter, ...], rope: RopeSpec) -> LayerKind:
    """The kind of layers with this window."""
    variant = parts.variant_of(config, window)
    attention = AttentionDims(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.fields.positive("query_pre_attn_scalar") ** -0.5,
        window=window,
        norm_eps=config.rms_norm_eps,
    )
    return LayerKind(
        name=variant or "layer",
        operations=_layer(config, attention, {parameter.name for parameter in parameters}, variant),
        parameters=parameters,
        rope=rope,
    )


def _layer(config: ModelConfig, attention: AttentionDims, names: set[str], variant: str) -> tuple[Operation, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv_width = attention.q_width + 2 * attention.kv_width
    return (
        parts.norm("attn_norm", config),
        parts.linear("qkv_proj", "normed", "qkv", hidden, qkv_width, names),
        *parts.attention(attention, names, variant),
        parts.linear("o_proj", "attn", "block", attention.q_width, hidden, names),
        parts.norm_add("attn_post_norm", "block", config),
        parts.norm("ffn_norm", config),
        parts.linear("gate_up_proj", "normed", "gate_up", hidden, 2 * inner, names),
        parts.activation(OpKind.GEGLU, inner),
        parts.linear("down_proj", "activation", "block", inner, hidden, names),
        parts.norm_add("ffn_post_norm", "block", config),
    )


def _layer_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    hidden, inner, has_bias = config.hidden_size, config.intermediate_size, config.attention_bias
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
    attention, mlp = f"{parts.LAYER}self_attn.", f"{parts.LAYER}mlp."
    return (
        _norm("attn_norm", f"{parts.LAYER}input_layernorm", hidden),
        *parts.projection("qkv_proj", attention, qkv, hidden, has_bias=has_bias),
        _norm("q_norm", f"{attention}q_norm", config.head_dim),
        _norm("k_norm", f"{attention}k_norm", config.head_dim),
        *parts.projection("o_proj", attention, {"o_proj": hidden}, q_width, has_bias=has_bias),
        _norm("attn_post_norm", f"{parts.LAYER}post_attention_layernorm", hidden),
        _norm("ffn_norm", f"{parts.LAYER}pre_feedforward_layernorm", hidden),
        *parts.projection("gate_up_proj", mlp, {"gate_proj": inner, "up_proj": inner}, hidden, has_bias=False),
        *parts.projection("down_proj", mlp, {"down_proj": hidden}, inner, has_bias=False),
        _norm("ffn_post_norm", f"{parts.LAYER}post_feedforward_layernorm", hidden),
    )


def _norm(name: str, source: str, width: int) -> Parameter:
    return _one_more(parts.fused(f"{name}.weight", (f"{source}.weight", (width,))))


def _one_more(weight: Parameter) -> Parameter:
    """1 + weight in float32, as in transformers: the sum is not rounded to the model's dtype."""
    return replace(weight, offset=1.0, is_float32=True)
