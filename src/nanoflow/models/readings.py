"""For each architecture, the fields of config.json that it has, and their defaults. Data only.

A field that is not in an architecture's table is ignored: it may be left over from another model. Defaults are those of
the configuration classes of transformers 5 (`LlamaConfig`, `MistralConfig` and so on); they are the same in
transformers 4 except where the table says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How an architecture reads config.json.

    Attributes:
        model_type: Its name in config.json.
        fields: Its fields and their defaults; None if `config_json.py` derives the default from other fields.
        nullable: Fields that may be null; null in another field is an error.
        rope_types: Names of its rotary embeddings, and the type in `rope.py` that each means; None if all types are
            accepted by their own names.
        can_rotate_in_part: Whether `partial_rotary_factor` may leave a part of each head unrotated.
        expert_counts: Names of the field with the number of experts; the first one in a file counts. Empty for a dense
            architecture.
        has_early_windows: Whether `max_window_layers` says that every other layer before it has a window; else those
            from it on have one.
        window_pattern: Without `layer_types`, every so-many-th layer has no window and the others have one; None if
            other fields say which.
        default_rope: The rotary embedding of a file that describes none; None is a plain one.
    """

    model_type: str
    fields: Mapping[str, Any]
    nullable: frozenset[str]
    rope_types: Mapping[str, str] | None = None
    can_rotate_in_part: bool = False
    expert_counts: tuple[str, ...] = ()
    has_early_windows: bool = False
    window_pattern: int | None = None
    default_rope: Mapping[str, Any] | None = None

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that the architecture has, with defaults for absent ones; others are dropped."""
        return {name: config.get(name, default) for name, default in self.fields.items()}


# Fields with the same meaning in every architecture.
_COMMON: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "dtype": None,
    "torch_dtype": None,
    "eos_token_id": None,
}
_NULLABLE = frozenset(
    (
        *("rope_parameters", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"),
        *("dtype", "torch_dtype", "eos_token_id"),
    )
)

LLAMA = Reading(
    model_type="llama",
    fields={
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    },
    nullable=_NULLABLE | {"num_key_value_heads", "head_dim"},
)

# With `layer_types`, transformers 5 reads a Mistral as a Ministral, whose layers differ; transformers 4 ignores the
# field.
_MISTRAL_FIELDS: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "eos_token_id": 2,
    "sliding_window": 4096,
}
MISTRAL = Reading(
    model_type="mistral",
    fields={**_MISTRAL_FIELDS, "layer_types": None},
    nullable=_NULLABLE | {"head_dim", "sliding_window", "layer_types"},
)

_QWEN_FIELDS: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN_NULLABLE = _NULLABLE | {"num_key_value_heads", "sliding_window", "layer_types"}
QWEN2 = Reading(model_type="qwen2", fields=_QWEN_FIELDS, nullable=_QWEN_NULLABLE)
QWEN3 = Reading(
    model_type="qwen3", fields={**_QWEN_FIELDS, "head_dim": 128, "attention_bias": False}, nullable=_QWEN_NULLABLE
)

# `rope_theta` is for layers without a window. transformers 4 writes `rope_local_base_freq` and `sliding_window_pattern`
# for what transformers 5 writes in `rope_parameters` and `layer_types`.
GEMMA3 = Reading(
    model_type="gemma3_text",
    fields={
        **{
            name: value
            for name, value in _COMMON.items()
            if name not in ("hidden_act", "original_max_position_embeddings")
        },
        "vocab_size": 262208,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "layer_types": None,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "eos_token_id": 1,
    },
    nullable=(_NULLABLE - {"original_max_position_embeddings"})
    | {"sliding_window", "layer_types", "final_logit_softcapping", "attn_logit_softcapping"}
    | {"use_bidirectional_attention"},
)

# Its configuration class accepts three names for the same extended rotary embedding.
PHI3 = Reading(
    model_type="phi3",
    fields={
        **_COMMON,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 1.0,
        "eos_token_id": 32000,
        "sliding_window": None,
    },
    nullable=(_NULLABLE - {"original_max_position_embeddings"}) | {"num_key_value_heads", "sliding_window"},
    rope_types={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
    can_rotate_in_part=True,
)

# Its class takes `num_experts` for `num_local_experts`, and that of Qwen 3 the other way round.
MIXTRAL = Reading(
    model_type="mixtral",
    fields={
        **_MISTRAL_FIELDS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts": None,
        "num_experts_per_tok": 2,
    },
    nullable=_NULLABLE | {"head_dim", "sliding_window"},
    expert_counts=("num_experts", "num_local_experts"),
)

_SPARSE_FIELDS: Mapping[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
QWEN2_MOE = Reading(
    model_type="qwen2_moe",
    fields={
        **_QWEN_FIELDS,
        **_SPARSE_FIELDS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "qkv_bias": True,
    },
    nullable=_NULLABLE | {"sliding_window", "layer_types", "mlp_only_layers"},
    expert_counts=("num_experts",),
    has_early_windows=True,
)
QWEN3_MOE = Reading(
    model_type="qwen3_moe",
    fields={
        **{name: value for name, value in _QWEN_FIELDS.items() if name not in ("max_window_layers", "layer_types")},
        **_SPARSE_FIELDS,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_local_experts": None,
        "num_experts_per_tok": 8,
    },
    nullable=_NULLABLE | {"sliding_window", "mlp_only_layers"},
    expert_counts=("num_local_experts", "num_experts"),
)

# What its experts' activation is does not depend on `hidden_act`.
GPT_OSS = Reading(
    model_type="gpt_oss",
    fields={
        **_COMMON,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts": None,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    nullable=_NULLABLE | {"sliding_window", "layer_types"},
    expert_counts=("num_experts", "num_local_experts"),
    window_pattern=2,
    default_rope={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
)
