"""Parts that the graphs of decoder families share: operations, tensors and parameters.

The file of a family (`llama.py`, `gemma3.py`) puts them together. The residual stream is the tensor `hidden`: a norm
reads it and writes `normed`, and the last operation of a block adds to `hidden` in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from nanoflow.graph.graph import LayerKind, OpGraph, Parameter, ParameterPart, TensorSpec
from nanoflow.graph.layers import sections_of
from nanoflow.graph.operation import AttentionDims, LinearDims, NormDims, Operation, OpKind, Resource, RowDims, Scope
from nanoflow.models.model import ModelConfig

# Names in checkpoints: the embedding, the output projection, and the prefix of a layer's tensors.
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.{layer}."
# The parameter that attention with sinks takes: a logit of each query head.
SINKS = "attn.sinks"


def decoder(
    config: ModelConfig,
    layers: Sequence[LayerKind],
    *,
    parameters: tuple[Parameter, ...],
    more_tensors: tuple[TensorSpec, ...] = (),
    scale: float = 1.0,
) -> OpGraph:
    """Build the graph of a whole model.

    Args:
        config: The model.
        layers: The kind of each layer; see `by_window`.
        parameters: Parameters outside the layers.
        more_tensors: Tensors of the layers that only this family has.
        scale: Factor on the embedding.
    """
    graph = OpGraph(
        name=config.architecture,
        vocab_size=config.vocab_size,
        prologue=(embed(config, scale),),
        sections=sections_of(layers),
        epilogue=epilogue(config),
        tensors=tensors(config, layers[0].attention, *more_tensors),
        parameters=parameters,
        ignored_sources=ignored_sources(config),
    )
    touched = {name for op in graph.operations() for name in (*op.reads, *op.writes)}
    graph = replace(graph, tensors=tuple(spec for spec in graph.tensors if spec.name in touched))
    graph = replace(graph, name=f"{graph.name} {size_of(graph)}")
    graph.validate()
    return graph


def by_window(config: ModelConfig, kind_of: Callable[[int | None], LayerKind]) -> list[LayerKind]:
    """The kind of each layer where windows alone distinguish them; `kind_of` is called once for each window."""
    kinds = {window: kind_of(window) for window in dict.fromkeys(config.layer_windows)}
    return [kinds[window] for window in config.layer_windows]


def variant_of(config: ModelConfig, window: int | None) -> str:
    """The variant of the attention in layers with this window; empty if all layers have the same window.

    Layers with different windows differ in their attention only, so only attention needs variants.
    """
    return "sliding" if window is not None and len(set(config.layer_windows)) > 1 else ""


def tensors(config: ModelConfig, dims: AttentionDims, *more: TensorSpec) -> tuple[TensorSpec, ...]:
    """The tensors that most families have, and `more`; `decoder` drops those that no operation touches."""
    hidden, sampled = config.hidden_size, Scope.SAMPLED
    return (
        TensorSpec(name="token_ids", width=1),
        TensorSpec(name="hidden", width=hidden),
        TensorSpec(name="normed", width=hidden),
        TensorSpec(name="qkv", width=dims.q_width + 2 * dims.kv_width),
        TensorSpec(name="q", width=dims.q_width),
        TensorSpec(name="kv", width=0, is_per_layer=True),
        TensorSpec(name="attn", width=dims.q_width),
        TensorSpec(name="gate_up", width=2 * config.intermediate_size),
        TensorSpec(name="activation", width=config.intermediate_size),
        *more,
        TensorSpec(name="sampled_hidden", width=hidden, scope=sampled),
        TensorSpec(name="sampled_normed", width=hidden, scope=sampled),
        TensorSpec(name="logits", width=config.vocab_size, scope=sampled),
    )


def embed(config: ModelConfig, scale: float = 1.0) -> Operation:
    """The first operation: rows of the embedding, times `scale`."""
    return Operation(
        name="embed",
        kind=OpKind.EMBED,
        resource=Resource.MEMORY,
        reads=("token_ids",),
        writes=("hidden",),
        weights=("embed.weight",),
        dims=RowDims(width=config.hidden_size, scale=scale),
    )


def norm(name: str, config: ModelConfig, *, scope: Scope = Scope.ALL, prefix: str = "") -> Operation:
    """The RMSNorm of `hidden`; `prefix` selects the tensors of the sampled rows."""
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


def linear(name: str, read: str, written: str, in_features: int, out_features: int, parameters: set[str]) -> Operation:
    """A product, with a bias if there is a parameter of that name."""
    return Operation(
        name=name,
        kind=OpKind.LINEAR,
        resource=Resource.COMPUTE,
        reads=(read,),
        writes=(written,),
        weights=present((f"{name}.weight", f"{name}.bias"), parameters),
        dims=LinearDims(in_features=in_features, out_features=out_features),
    )


def linear_add(name: str, read: str, in_features: int, out_features: int, parameters: set[str]) -> Operation:
    """The last product of a block, added to `hidden`."""
    product = linear(name, read, "hidden", in_features, out_features, parameters)
    return replace(product, kind=OpKind.LINEAR_ADD, reads=(read, "hidden"))


def norm_add(name: str, read: str, config: ModelConfig) -> Operation:
    """The RMSNorm of a block's output, added to `hidden`."""
    return Operation(
        name=name,
        kind=OpKind.RMS_NORM_ADD,
        resource=Resource.MEMORY,
        reads=(read, "hidden"),
        writes=("hidden",),
        weights=(f"{name}.weight",),
        dims=NormDims(width=config.hidden_size, eps=config.rms_norm_eps),
    )


def activation(kind: OpKind, width: int) -> Operation:
    """SwiGLU or GeGLU of gate and up."""
    return Operation(
        name="activation",
        kind=kind,
        resource=Resource.MEMORY,
        reads=("gate_up",),
        writes=("activation",),
        dims=RowDims(width=width),
    )


def attention(dims: AttentionDims, parameters: set[str], variant: str = "") -> tuple[Operation, ...]:
    """Rotary embedding, cache write and attention; `variant` distinguishes it from that of other layer kinds."""
    sinks = (SINKS,) if dims.has_sinks else ()
    return (
        Operation(
            name="rope_append",
            kind=OpKind.ROPE_APPEND,
            resource=Resource.MEMORY,
            reads=("qkv",),
            writes=("q", "kv"),
            weights=present(("q_norm.weight", "k_norm.weight"), parameters),
            dims=replace(dims, window=None, has_sinks=False),
        ),
        Operation(
            name="decode_attention",
            kind=OpKind.DECODE_ATTENTION,
            resource=Resource.MEMORY,
            scope=Scope.DECODE,
            reads=("q", "kv"),
            writes=("attn",),
            weights=sinks,
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
            weights=sinks,
            dims=dims,
            variant=variant,
        ),
    )


def epilogue(config: ModelConfig) -> tuple[Operation, ...]:
    """From `hidden` of the sampled rows to their logits."""
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
        norm("final_norm", config, scope=Scope.SAMPLED, prefix="sampled_"),
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


def shared_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Parameters outside the layers."""
    embedding = (config.vocab_size, config.hidden_size)
    is_tied = config.tie_word_embeddings
    untied = () if is_tied else (fused("lm_head.weight", (OUTPUT, embedding)),)
    # A tied embedding may be stored under either name.
    table = ParameterPart(source=EMBEDDING, shape=embedding, other_source=OUTPUT if is_tied else None)
    return (
        Parameter(name="embed.weight", parts=(table,)),
        fused("final_norm.weight", ("model.norm.weight", (config.hidden_size,))),
        *untied,
    )


def projection(
    name: str, source: str, heights: dict[str, int], in_features: int, *, has_bias: bool
) -> tuple[Parameter, ...]:
    """Weight (and bias, if `has_bias`) of a product; `heights` has names and output features of its stored parts."""
    weight = fused(
        f"{name}.weight", *((f"{source}{part}.weight", (height, in_features)) for part, height in heights.items())
    )
    bias = fused(f"{name}.bias", *((f"{source}{part}.bias", (height,)) for part, height in heights.items()))
    return (weight, bias) if has_bias else (weight,)


def fused(name: str, *parts: tuple[str, tuple[int, ...]]) -> Parameter:
    """A parameter made of checkpoint tensors, given by name and shape."""
    return Parameter(name=name, parts=tuple(ParameterPart(source=source, shape=shape) for source, shape in parts))


def present(names: tuple[str, ...], parameters: set[str]) -> tuple[str, ...]:
    """Those of the names that are parameters."""
    return tuple(name for name in names if name in parameters)


def size_of(graph: OpGraph) -> str:
    """The number of parameters in short form, such as 8.0B."""
    count = graph.num_parameters
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def ignored_sources(config: ModelConfig) -> tuple[str, ...]:
    """Checkpoint tensors that are not needed: rotary frequencies, and the copy of a tied embedding."""
    return (r".*rotary_emb\.inv_freq", *((re.escape(OUTPUT),) if config.tie_word_embeddings else ()))
