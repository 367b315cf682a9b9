"""The Llama family as a graph: Llama 2 and 3, DeepSeek-LLM, Mistral, Qwen 2, 2.5 and 3, Phi 3 and 4.

`registry.py` says which options of `build` an architecture has; `parts.py` has what families share. The residual stream
is `hidden`: the embedding writes it, and the last product of each block adds to it in place, which saves a separate
addition. SwiGLU is an operation of its own here; `graph/fuse.py` fuses it with the product before it.
"""

from __future__ import annotations

from nanoflow.graph.graph import LayerKind, OpGraph, Parameter, RopeSpec
from nanoflow.graph.operation import AttentionDims, Operation, OpKind
from nanoflow.models import parts
from nanoflow.models.fields import ModelError, shown
from nanoflow.models.model import ModelConfig
from nanoflow.models.rope import rope_spec

# Two names for the same function.
_ACTIVATIONS = ("silu", "swish")


def build(
    config: ModelConfig,
    max_model_len: int | None,
    *,
    has_qkv_bias: bool = False,
    has_qk_norm: bool = False,
    is_stored_fused: bool = False,
) -> OpGraph:
    """The graph of a model of the family.

    Args:
        config: The model.
        max_model_len: Longest sequence served, on which some rotary embeddings depend; None is the model's own limit.
        has_qkv_bias: Queries, keys and values have biases even if `config.attention_bias` is False (Qwen 2).
        has_qk_norm: Each query and key head is normalised before rotation (Qwen 3).
        is_stored_fused: Checkpoints store `qkv_proj` and `gate_up_proj` as one tensor each, concatenated along the rows
            in this order (Phi 3).

    Raises:
        ModelError: The activation or the rotary embedding is not supported.
    """
    require_silu(config)
    layer_parameters = (
        *attention_parameters(
            config, has_qkv_bias=has_qkv_bias, has_qk_norm=has_qk_norm, is_stored_fused=is_stored_fused
        ),
        *mlp_parameters(config, is_stored_fused=is_stored_fused),
    )
    rope = rope_spec(config, max_model_len)
    layers = parts.by_window(
        config,
        lambda window: _kind(
            config, attention_dims(config, window, rope, has_qk_norm=has_qk_norm), layer_parameters, rope
        ),
    )
    return parts.decoder(config, layers, parameters=parts.shared_parameters(config))


def require_silu(config: ModelConfig) -> None:
    """Raise ModelError for an activation other than SwiGLU's."""
    if config.hidden_act not in _ACTIVATIONS:
        raise ModelError(f"{config.architecture}: hidden_act must be 'silu', got {shown(config.hidden_act)}")


def _kind(
    config: ModelConfig, attention: AttentionDims, parameters: tuple[Parameter, ...], rope: RopeSpec
) -> LayerKind:
    """The layer kind with this attention."""
    variant = parts.variant_of(config, attention.window)
    names = {parameter.name for parameter in parameters}
    return LayerKind(
        name=variant or "layer",
        operations=(*attention_block(config, attention, names, variant), *mlp(config, names)),
        parameters=parameters,
        rope=rope,
    )


def attention_dims(config: ModelConfig, window: int | None, rope: RopeSpec, *, has_qk_norm: bool) -> AttentionDims:
    """The sizes of attention in layers with this window."""
    rotary_dim = 2 * len(rope.inv_freq)
    return AttentionDims(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        window=window,
        norm_eps=config.rms_norm_eps if has_qk_norm else None,
        rotary_dim=rotary_dim if rotary_dim < config.head_dim else None,
    )


def attention_block(
    config: ModelConfig, attention: AttentionDims, parameters: set[str], variant: str
) -> tuple[Operation, ...]:
    """The first half of a layer; `parameters` are the names of the layer's."""
    hidden, qkv_width = config.hidden_size, attention.q_width + 2 * attention.kv_width
    return (
        parts.norm("attn_norm", config),
        parts.linear("qkv_proj", "normed", "qkv", hidden, qkv_width, parameters),
        *parts.attention(attention, parameters, variant),
        parts.linear_add("o_proj", "attn", attention.q_width, hidden, parameters),
    )


def mlp(config: ModelConfig, parameters: set[str]) -> tuple[Operation, ...]:
    """The second half of a layer, without experts."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return (
        parts.norm("ffn_norm", config),
        parts.linear("gate_up_proj", "normed", "gate_up", hidden, 2 * inner, parameters),
        parts.activation(OpKind.SWIGLU, inner),
        parts.linear_add("down_proj", "activation", inner, hidden, parameters),
    )


def attention_parameters(
    config: ModelConfig, *, has_qkv_bias: bool, has_qk_norm: bool, is_stored_fused: bool = False
) -> tuple[Parameter, ...]:
    """Parameters of the first half; the arguments are those of `build`."""
    hidden, source = config.hidden_size, f"{parts.LAYER}self_attn."
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
    qkv = {"qkv_proj": sum(qkv.values())} if is_stored_fused else qkv
    norms = ("q_norm", "k_norm") if has_qk_norm else ()
    return (
        parts.fused("attn_norm.weight", (f"{parts.LAYER}input_layernorm.weight", (hidden,))),
        *parts.projection("qkv_proj", source, qkv, hidden, has_bias=config.attention_bias or has_qkv_bias),
        *(parts.fused(f"{norm}.weight", (f"{source}{norm}.weight", (config.head_dim,))) for norm in norms),
        *parts.projection("o_proj", source, {"o_proj": hidden}, q_width, has_bias=config.attention_bias),
    )


def mlp_parameters(config: ModelConfig, *, is_stored_fused: bool = False) -> tuple[Parameter, ...]:
    """Parameters of the second half; the argument is that of `build`."""
    hidden, inner, has_bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    source = f"{parts.LAYER}mlp."
    gate_up = {"gate_up_proj": 2 * inner} if is_stored_fused else {"gate_proj": inner, "up_proj": inner}
    return (
        ffn_norm(config),
        *parts.projection("gate_up_proj", source, gate_up, hidden, has_bias=has_bias),
        *parts.projection("down_proj", source, {"down_proj": hidden}, inner, has_bias=has_bias),
    )


def ffn_norm(config: ModelConfig) -> Parameter:
    """The weight of the norm between both halves."""
    return parts.fused("ffn_norm.weight", (f"{parts.LAYER}post_attention_layernorm.weight", (config.hidden_size,)))
