"""gpt-oss as a graph: attention with sinks, every other layer with a sliding window, and experts in every layer.

The attention block is Llama's (`llama.py`), the routed operations are those of other mixtures (`moe.py`). Router and
experts have biases, and the activation is clamped. Checkpoints have the experts of a layer as one tensor, with the rows
of gate and up in turn, as plain numbers or in MXFP4 (`stored.py`); kernels take the layout of every other mixture.
"""

from __future__ import annotations

from dataclasses import replace

from nanoflow.graph.experts import ClampedSwiglu
from nanoflow.graph.graph import LayerKind, OpGraph, Parameter, ParameterPart, RopeSpec
from nanoflow.models import llama, moe, parts
from nanoflow.models.expert_fields import ExpertsConfig
from nanoflow.models.model import ModelConfig
from nanoflow.models.rope import rope_spec


def build(config: ModelConfig, max_model_len: int | None) -> OpGraph:
    """The graph of a gpt-oss.

    Args:
        config: The model, with experts.
        max_model_len: Longest sequence served, on which some rotary embeddings depend; None is the model's own limit.

    Raises:
        ModelError: The rotary embedding or the activation's fields are not supported.
    """
    experts = config.experts
    assert experts is not None, "the architecture's reading has fields of experts"
    parameters, rope = _layer_parameters(config, experts), rope_spec(config, max_model_len)
    clamped = ClampedSwiglu(alpha=config.fields.positive("swiglu_alpha"), limit=config.fields.positive("swiglu_limit"))
    embedding, final_norm, *others = parts.shared_parameters(config)
    return parts.decoder(
        config,
        parts.by_window(config, lambda window: _kind(config, experts, clamped, window, parameters, rope)),
        parameters=(embedding, _in_float32(final_norm), *others),
        more_tensors=moe.tensors(config, experts),
    )


def _kind(
    config: ModelConfig,
    experts: ExpertsConfig,
    clamped: ClampedSwiglu,
    window: int | None,
    parameters: tuple[Parameter, ...],
    rope: RopeSpec,
) -> LayerKind:
    """The kind of layers with this window."""
    variant, known = parts.variant_of(config, window), {parameter.name for parameter in parameters}
    dims = replace(llama.attention_dims(config, window, rope, has_qk_norm=False), has_sinks=True)
    return LayerKind(
        name=variant or "layer",
        operations=(
            *llama.attention_block(config, dims, known, variant),
            parts.norm("ffn_norm", config),
            *moe.routed(config, experts, known, clamped),
        ),
        parameters=parameters,
        rope=rope,
    )


def _layer_parameters(config: ModelConfig, experts: ExpertsConfig) -> tuple[Parameter, ...]:
    hidden, inner, count = config.hidden_size, experts.intermediate_size, experts.num_experts
    attention_norm, *projections = llama.attention_parameters(config, has_qkv_bias=False, has_qk_norm=False)
    router, stacks = f"{parts.LAYER}mlp.router.", f"{parts.LAYER}mlp.experts."
    return (
        _in_float32(attention_norm),
        *projections,
        _in_float32(parts.fused(parts.SINKS, (f"{parts.LAYER}self_attn.sinks", (config.num_heads,)))),
        _in_float32(llama.ffn_norm(config)),
        parts.fused("router.weight", (f"{router}weight", (count, hidden))),
        parts.fused("router.bias", (f"{router}bias", (count,))),
        _stack("experts_in.weight", f"{stacks}gate_up_proj", (count, 2 * inner, hidden), is_interleaved=True),
        _stack("experts_in.bias", f"{stacks}gate_up_proj_bias", (count, 2 * inner), is_interleaved=True),
        _stack("experts_out.weight", f"{stacks}down_proj", (count, hidden, inner)),
        _stack("experts_out.bias", f"{stacks}down_proj_bias", (count, hidden)),
    )


def _stack(name: str, source: str, shape: tuple[int, ...], *, is_interleaved: bool = False) -> Parameter:
    """The matrices of all experts, or their biases, which one tensor of the checkpoint has."""
    part = ParameterPart(source=source, shape=shape, is_transposed=len(shape) == 3, is_interleaved=is_interleaved)
    return Parameter(name=name, parts=(part,))


def _in_float32(parameter: Parameter) -> Parameter:
    """Norms and sinks are multiplied or compared in float32, and rounded once, as in transformers."""
    return replace(parameter, is_float32=True)
