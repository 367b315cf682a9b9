"""Variations of a config.json: each field left out, null, left over from another architecture, or with another value.

`tests/integration/test_configs.py` compares each of them with transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.all_cases import RUNS_ALL_CASES, rank

DELETED = object()
NUM_LAYERS = 4
WINDOW = 24
# More than the windows and the trained lengths below.
NUM_TOKENS = 70

_BASE: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 0.01,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 500.0,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_QWEN: Mapping[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 2,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}
_SPARSE: Mapping[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [2],
}
# A complete config.json of each served architecture.
BASES: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {**_BASE, "model_type": "llama", "attention_bias": False, "mlp_bias": False},
    "MistralForCausalLM": {**_BASE, "model_type": "mistral", "sliding_window": WINDOW},
    "Qwen2ForCausalLM": {**_BASE, "model_type": "qwen2", **_QWEN},
    "Qwen3ForCausalLM": {**_BASE, "model_type": "qwen3", **_QWEN, "attention_bias": False},
    "Gemma3ForCausalLM": {
        **{name: value for name, value in _BASE.items() if name not in ("hidden_act", "torch_dtype")},
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": 20,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 50.0,
        "dtype": "float32",
    },
    "Phi3ForCausalLM": {
        **_BASE,
        "model_type": "phi3",
        "sliding_window": WINDOW,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.5,
        "pad_token_id": 0,
    },
    "MixtralForCausalLM": {
        **_BASE,
        "model_type": "mixtral",
        "sliding_window": WINDOW,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
    },
    "Qwen2MoeForCausalLM": {
        **_BASE,
        "model_type": "qwen2_moe",
        **_QWEN,
        **_SPARSE,
        "shared_expert_intermediate_size": 56,
        "qkv_bias": True,
    },
    "Qwen3MoeForCausalLM": {
        **_BASE,
        "model_type": "qwen3_moe",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        **_SPARSE,
        "attention_bias": False,
    },
    "GptOssForCausalLM": {
        **_BASE,
        "model_type": "gpt_oss",
        "sliding_window": WINDOW,
        "attention_bias": True,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "swiglu_alpha": 1.3,
        "swiglu_limit": 1.5,
        "pad_token_id": 0,
    },
}

_ALTERNATING = ["full_attention", "sliding_attention"] * (NUM_LAYERS // 2)
_SLIDING = ["sliding_attention"] * NUM_LAYERS
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0, 2.5] * 4}
_LONGROPE_OF_HALF = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
_ROPES: tuple[Any, ...] = (
    {},
    "yarn",
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_theta": 100.0},
    {"rope_theta": None, "rope_type": "default"},
    {"rope_type": None},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 4.0, "rope_theta": 100.0},
    {"type": "linear", "rope_type": "default", "factor": 4.0},
    {"type": "default", "rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": None},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "dynamic"},
    _LLAMA3,
    {**_LLAMA3, "rope_theta": 100.0},
    {name: value for name, value in _LLAMA3.items() if name != "low_freq_factor"},
    {name: value for name, value in _LLAMA3.items() if name != "original_max_position_embeddings"},
    _YARN,
    {**_YARN, "rope_theta": 100.0},
    {**_YARN, "factor": None},
    {**_YARN, "attention_factor": 1.5},
    {**_YARN, "attention_factor": None, "beta_fast": None, "beta_slow": None},
    {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    {**_YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    {**_YARN, "truncate": None},
    {**_YARN, "original_max_position_embeddings": None},
    {"rope_type": "yarn", "factor": 4.0},
    _LONGROPE,
    {**_LONGROPE, "original_max_position_embeddings": 32},
    {**_LONGROPE, "original_max_position_embeddings": 32, "factor": 3.0},
    {**_LONGROPE, "original_max_position_embeddings": 32, "attention_factor": 1.5, "factor": None},
    {**_LONGROPE, "original_max_position_embeddings": 1024},
    {**_LONGROPE, "original_max_position_embeddings": None},
    {**_LONGROPE, "original_max_position_embeddings": 32, "partial_rotary_factor": 1.0},
    {**_LONGROPE, "original_max_position_embeddings": 32, "long_factor": [2.0] * 7},
    {**_LONGROPE, "original_max_position_embeddings": 32, "short_factor": None},
    {**_LONGROPE_OF_HALF, "original_max_position_embeddings": 32},
    {**_LONGROPE_OF_HALF, "rope_type": "su", "original_max_position_embeddings": 1024},
    {**_LONGROPE_OF_HALF, "rope_type": "yarn", "factor": 2.0},
    {"rope_type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"rope_type": "mrope", "mrope_section": [2, 3, 3]},
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": 0.75, "rope_theta": 100.0},
    {"partial_rotary_factor": None},
    {"partial_rotary_factor": 1.0, "rope_type": "default"},
    {"full_attention": {"rope_type": "default", "rope_theta": 100.0}},
    {"sliding_attention": {"rope_type": "linear", "factor": 2.0}, "full_attention": _YARN},
    {"sliding_attention": {"rope_theta": 70.0}, "full_attention": None},
    {"sliding_attention": None},
)
# Other values of each field. An architecture that lacks the field must ignore it.
_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_size": (48, 64.0, "64", -64),
    "num_hidden_layers": (3, 0),
    "num_attention_heads": (8, 3, 0),
    "num_key_value_heads": (1, 4, 3, 8),
    "head_dim": (8, 32, 15, 0),
    "intermediate_size": (64, True),
    "vocab_size": (257, 0),
    "max_position_embeddings": (64, 32, 0),
    "rms_norm_eps": (0.5, 1, -1.0),
    "hidden_act": ("swish", "gelu", "relu", 3),
    "tie_word_embeddings": (True, "yes", 1),
    "attention_bias": (True, False, 1),
    "mlp_bias": (True, False, "no"),
    "sliding_window": (8, WINDOW, 2048, 0, -3, "24"),
    "use_sliding_window": (True, False, 0),
    "max_window_layers": (0, 1, NUM_LAYERS, 28, -1),
    "sliding_window_pattern": (1, 3, 0, 2.5),
    "hidden_activation": ("gelu", "silu", 3),
    "rope_local_base_freq": (1000.0, -1.0, "50"),
    "use_bidirectional_attention": (True, False, "no"),
    "layer_types": (_ALTERNATING, _SLIDING, ["full_attention"] * NUM_LAYERS, _SLIDING[1:], ["mamba"] * NUM_LAYERS, []),
    "rope_theta": (100.0, 10000, 1e6, "10000", -1.0),
    "rope_scaling": _ROPES,
    "rope_parameters": _ROPES,
    "partial_rotary_factor": (1.0, 0.5, 0.7, 0.75, 0.07, 0.01, 0.0, -0.5, 2.0, True, "0.5"),
    "original_max_position_embeddings": (32, 1024, 0, 32.0),
    "torch_dtype": ("bfloat16", "half", "int8", "float64"),
    "dtype": ("float16", "float32", "torch.bfloat16"),
    "eos_token_id": (5, [3, 5], [], 9999, -1),
    "pad_token_id": (0, -1, 9999),
    "bos_token_id": (7, -1),
    "attention_dropout": (0.5, 0),
    "initializer_range": (0.5,),
    "use_cache": (False,),
    "pretraining_tp": (2,),
    "architectures": ([], "LlamaForCausalLM", ["MambaForCausalLM"]),
    "model_type": ("gpt2",),
    "auto_map": ({"AutoConfig": "evil.Config"},),
    "transformers_version": ("4.57.0", "5.24.0"),
    "quantization_config": ({"quant_method": "hqq"},),
    "is_causal": (True, False),
    "num_local_experts": (8, 4, 0, "6"),
    "num_experts": (8, 4, 0, -1),
    "num_experts_per_tok": (2, 1, 6, 7, 0),
    "norm_topk_prob": (True, False, 1),
    "decoder_sparse_step": (1, 2, 3, 0, -2),
    "mlp_only_layers": ([], [0, 1], [0, 1, 2, 3], [7], ["1"], 2),
    "moe_intermediate_size": (24, 0),
    "shared_expert_intermediate_size": (24, 0),
    "qkv_bias": (True, False, 1),
    "swiglu_alpha": (0.7, 0, "1.7"),
    "swiglu_limit": (0.5, 7, -1.0),
    "logits_scaling": (8.0,),
    "logit_scale": (0.5,),
    "residual_multiplier": (0.5,),
    "embedding_multiplier": (2.0,),
    "attention_multiplier": (0.5,),
    "final_logit_softcapping": (5.0,),
    "attn_logit_softcapping": (5.0,),
    "query_pre_attn_scalar": (4, 16, -4, "16"),
    "attention_chunk_size": (8,),
    "mrope_section": ([2, 3, 3],),
    "temperature": (0.5,),
}
# Combinations: two spellings of one field, and fields that affect each other.
_TOGETHER: tuple[Mapping[str, Any], ...] = (
    {"rope_scaling": _YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    {"rope_scaling": _YARN, "rope_parameters": _YARN},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": _LLAMA3},
    {"rope_scaling": {}, "rope_parameters": _YARN},
    {"rope_scaling": None, "rope_parameters": {**_YARN, "rope_theta": 100.0}},
    {"rope_scaling": _YARN, "rope_parameters": None},
    {"rope_parameters": {"rope_theta": 100.0}, "rope_theta": 1e6},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
    {"rope_parameters": _YARN, "rope_theta": DELETED},
    {"rope_scaling": _YARN, "original_max_position_embeddings": 16},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "original_max_position_embeddings": 16},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
    {"rope_scaling": {"partial_rotary_factor": 0.75}, "partial_rotary_factor": None},
    {"rope_scaling": {"partial_rotary_factor": 0.75}, "partial_rotary_factor": 0.25},
    {"rope_scaling": _LONGROPE, "partial_rotary_factor": 1.0},
    {"rope_scaling": _LONGROPE, "partial_rotary_factor": DELETED, "max_position_embeddings": 128},
    {"rope_scaling": _LONGROPE, "original_max_position_embeddings": 1024, "partial_rotary_factor": 1.0},
    {"rope_scaling": {**_LONGROPE, "original_max_position_embeddings": 16}, "original_max_position_embeddings": 1024},
    {"rope_scaling": _LONGROPE_OF_HALF, "head_dim": 32, "partial_rotary_factor": 0.25},
    {"rope_scaling": _LONGROPE_OF_HALF, "original_max_position_embeddings": 4096},
    {"partial_rotary_factor": 0.75, "head_dim": 15},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 70},
    {"dtype": "float32", "torch_dtype": "bfloat16"},
    {"dtype": None, "torch_dtype": "float32"},
    {"layer_types": DELETED, "max_window_layers": DELETED},
    {"layer_types": DELETED, "use_sliding_window": DELETED},
    {"layer_types": DELETED, "sliding_window": DELETED},
    {"layer_types": DELETED},
    {"layer_types": None, "max_window_layers": 1},
    {"layer_types": _ALTERNATING, "sliding_window": 8},
    {"layer_types": _ALTERNATING, "sliding_window": 8, "use_sliding_window": True},
    {"layer_types": _ALTERNATING, "sliding_window": None},
    {"layer_types": _ALTERNATING, "head_dim": DELETED},
    {"layer_types": DELETED, "sliding_window": None, "use_sliding_window": True},
    {"head_dim": DELETED, "num_key_value_heads": DELETED},
    {"num_attention_heads": 16, "num_key_value_heads": DELETED},
    {"num_attention_heads": 32, "num_key_value_heads": DELETED},
    {"head_dim": DELETED, "hidden_size": 60},
    {"head_dim": DELETED, "num_attention_heads": DELETED, "num_key_value_heads": 4},
    {"head_dim": None, "hidden_size": 96},
    {"head_dim": 8, "tie_word_embeddings": True},
    {"architectures": None},
    {"architectures": None, "sliding_window": 8, "layer_types": _SLIDING},
    {"attention_bias": True, "mlp_bias": True},
    {"attention_bias": True, "tie_word_embeddings": True, "sliding_window": 8, "max_window_layers": 1},
    {"num_local_experts": 8, "num_experts_per_tok": 2},
    {"num_experts": 4, "num_local_experts": 8},
    {"mlp_only_layers": [3], "decoder_sparse_step": 2},
    {"mlp_only_layers": DELETED, "decoder_sparse_step": DELETED, "norm_topk_prob": DELETED},
    {"layer_types": DELETED, "max_window_layers": 3},
    {"rope_theta": DELETED, "rope_local_base_freq": DELETED},
    {"rope_theta": 100.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {
        "rope_parameters": {"sliding_attention": {"rope_theta": 70.0}, "full_attention": {"rope_theta": 700.0}},
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    {"sliding_window": None, "sliding_window_pattern": 1},
    {"sliding_window": None, "sliding_window_pattern": 3},
    {"layer_types": _ALTERNATING, "sliding_window_pattern": 3},
)
# Each variation is tested with so many architectures, first with those that have its fields.
_NUM_ARCHITECTURES = 2
# Variations that are tested with an architecture in any case, as no other is refused for the same reason.
_ONLY_ONES: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "Gemma3ForCausalLM": (
        {"use_bidirectional_attention": True},
        {"final_logit_softcapping": 5.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 100.0}},
        {"rope_scaling": {**_YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}},
    ),
    "Phi3ForCausalLM": ({"partial_rotary_factor": 0.01},),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A variation.

    Attributes:
        name: What is changed.
        config: The object.
    """

    name: str
    config: dict[str, Any]


def cases_of(architecture: str, *, is_complete: bool = RUNS_ALL_CASES) -> Iterator[Case]:
    """Variations of an architecture's config.json: all, or those that are tested with this architecture.

    Over all architectures the latter have every variation.
    """
    base = _complete(architecture)
    yield Case(name="as it is", config=base)
    for changes in _changes(base):
        if is_complete or architecture in _tested_with(changes):
            config = {name: value for name, value in {**base, **changes}.items() if value is not DELETED}
            yield Case(name=name_of(changes), config=config)


def _complete(architecture: str) -> dict[str, Any]:
    return {"architectures": [architecture], **BASES[architecture]}


def _changes(base: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from ({name: DELETED} for name in base)
    for name, values in _VALUES.items():
        yield from ({name: value} for value in (None, *values) if base.get(name, DELETED) != value)
    yield from _TOGETHER


def _tested_with(changes: Mapping[str, Any]) -> set[str]:
    """The architectures with which a variation is tested if not all cases run."""

    def order(architecture: str) -> tuple[bool, bool, int]:
        base = _complete(architecture)
        is_change = any(base.get(name, DELETED) != value for name, value in changes.items())
        return not is_change, not changes.keys() <= base.keys(), rank(f"{architecture}: {name_of(changes)}")

    only = {architecture for architecture, ones in _ONLY_ONES.items() if changes in ones}
    return {*sorted(BASES, key=order)[:_NUM_ARCHITECTURES], *only}


def name_of(changes: Mapping[str, Any]) -> str:
    """What is changed, as text."""
    return ", ".join(_shown(*change) for change in changes.items())


def _shown(name: str, value: Any) -> str:
    return f"no {name}" if value is DELETED else f"{name}={value!r}"
