"""Tiny random models of every family that nanoflow serves, made with transformers.

Weights are drawn wide enough that greedy tokens vary, and that a wrong rotation, window or bias changes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EOS_TOKEN_ID = 2
SLIDING_WINDOW = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to make a tiny model.

    Attributes:
        config_class: Name of the configuration class in transformers.
        options: Its arguments, beside the common ones.
    """

    config_class: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _llama(**options: Any) -> Family:
    return Family(config_class="LlamaConfig", options=options)


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# 12 of the 16 dimensions of a head are rotated.
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.5, 4.0],
    "long_factor": [1.0, 1.5, 3.0, 9.0, 20.0, 40.0],
}

FAMILIES: dict[str, Family] = {
    "llama2": _llama(num_key_value_heads=4),
    "llama3": _llama(rope_parameters=_LLAMA3_ROPE, eos_token_id=[EOS_TOKEN_ID, 3]),
    "llama-linear-rope": _llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama-yarn": _llama(rope_parameters=_YARN_ROPE),
    "llama-bias": _llama(attention_bias=True, mlp_bias=True),
    "deepseek": _llama(num_hidden_layers=4, num_key_value_heads=1, vocab_size=257),
    "mistral": Family(config_class="MistralConfig", options={"sliding_window": SLIDING_WINDOW}),
    "qwen2": Family(config_class="Qwen2Config", options={"vocab_size": 257}),
    "qwen2-sliding": Family(
        config_class="Qwen2Config",
        options={
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "max_window_layers": 2,
        },
    ),
    "qwen3": Family(config_class="Qwen3Config", options={"hidden_size": 48, "head_dim": 16, "num_attention_heads": 4}),
    # Layers 3 and 6 of 8 have no window: a repeated pattern and a remainder.
    "gemma3": Family(
        config_class="Gemma3TextConfig",
        options={
            "num_hidden_layers": 8,
            "head_dim": 24,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(8)],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            },
            "query_pre_attn_scalar": 40,
            "pad_token_id": 0,
        },
    ),
    "mixtral": Family(config_class="MixtralConfig", options={"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral-sliding": Family(
        config_class="MixtralConfig", options={"num_experts_per_tok": 3, "sliding_window": SLIDING_WINDOW}
    ),
    # Layers 1 and 3 are sparse, 0, 2 and 4 dense; of the first ones every other has a window.
    "qwen2-moe": Family(
        config_class="Qwen2MoeConfig",
        options={
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "max_window_layers": 4,
        },
    ),
    "qwen3-moe": Family(
        config_class="Qwen3MoeConfig",
        options={
            "hidden_size": 48,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "mlp_only_layers": [2],
            "moe_intermediate_size": 24,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
    # Layers 0 and 2 have a window, 1 has none.
    "gpt-oss": Family(
        config_class="GptOssConfig",
        options={
            "head_dim": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": SLIDING_WINDOW,
            "rope_parameters": {**_YARN_ROPE, "beta_fast": 8.0, "truncate": False},
            "swiglu_limit": 1.5,
            "pad_token_id": 0,
        },
    ),
    # The padding token must be in the vocabulary.
    "phi3": Family(config_class="Phi3Config", options={"pad_token_id": 0, "sliding_window": SLIDING_WINDOW}),
    "phi4-mini": Family(
        config_class="Phi3Config",
        options={"pad_token_id": 0, "rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 1024},
    ),
}
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
}


def make_model(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = False,
    dtype: str = "float32",
    std: float = 0.3,
    expert_spread: float = 1.0,
    **changes: Any,
) -> Path:
    """Write a tiny random model, without a tokenizer.

    Args:
        family: Key of FAMILIES.
        folder: Where to write config.json, generation_config.json and model.safetensors.
        seed: Seed of the weights.
        tied: Whether the output projection is the embedding.
        dtype: "float32", "bfloat16" or "float16", in the file.
        std: Standard deviation of the matrices; a small one gives a model that rounding errors hardly affect.
        expert_spread: How much the experts of a layer differ, from 0 to 1. Where they differ little, it hardly matters
            if rounding chooses another one.
        changes: Arguments of the configuration class.

    Returns:
        The folder.
    """
    import torch
    import transformers

    made = FAMILIES[family]
    options = {**_COMMON, **made.options, **changes, "tie_word_embeddings": tied, "dtype": dtype}
    config = getattr(transformers, made.config_class)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 3:
                noise = (1 - expert_spread) * noise[:1] + expert_spread * noise
            parameter.copy_(std * noise if parameter.dim() > 1 else 0.2 * noise)
        for name, parameter in model.named_parameters():
            if "norm" in name or "sinks" in name:
                parameter.add_(1.0)
    model.save_pretrained(folder)
    return folder
