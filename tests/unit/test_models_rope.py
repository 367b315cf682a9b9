"""Frequencies are those that transformers computes for the same fields."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.models.config_json import ModelError, parse
from nanoflow.models.rope import rope_spec

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 16384,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + place / 100 for place in range(64)],
    "long_factor": [1.0 + place / 2 for place in range(64)],
    "original_max_position_embeddings": 4096,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def _transformers(rope: dict[str, Any], max_model_len: int | None) -> tuple[list[float], float]:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    options = {name: value for name, value in BASE.items() if name != "architectures"}
    config = transformers.LlamaConfig(**options, rope_parameters=dict(rope))
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=max_model_len)
    return inv_freq.tolist(), float(factor)


@pytest.mark.parametrize(
    ("rope", "max_model_len"),
    [
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, None),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, None),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 8192),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 40000),
        ({"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, **LLAMA3}, None),
        ({"rope_type": "llama3", "factor": 32.0, "rope_theta": 5e5, **LLAMA3}, 100),
        ({**YARN, "rope_theta": 1e6}, None),
        ({**YARN, "rope_theta": 1e6, "factor": None}, None),
        ({**YARN, "rope_theta": 1e4, "attention_factor": 1.25}, None),
        ({**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.8}, None),
        ({**YARN, "rope_theta": 1e4, "mscale": 1.0}, None),
        ({**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0}, None),
        ({**YARN, "rope_theta": 1e4, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0}, None),
        ({**YARN, "rope_theta": 1e4, "beta_fast": 4.0, "beta_slow": 4.0, "truncate": False}, None),
        ({**YARN, "rope_theta": 1e4, "factor": 1.0}, None),
        ({**YARN, "rope_theta": 1e4, "factor": 0.5}, None),
        (LONG, None),
        (LONG, 4096),
        (LONG, 4097),
        ({**LONG, "factor": 8.0}, 16384),
        ({**LONG, "factor": 0.5}, 16384),
        ({**LONG, "attention_factor": 1.25, "factor": None}, 16384),
        # A ramp that would begin before the first dimension, end behind the last, or has no width.
        ({**YARN, "rope_theta": 1e4, "beta_fast": 1e4}, None),
        ({**YARN, "rope_theta": 1e4, "beta_slow": 1e-9}, None),
        ({**YARN, "rope_theta": 1e4, "beta_fast": 660.0, "beta_slow": 655.0}, None),
    ],
)
def test_frequencies_of_transformers(rope: dict[str, Any], max_model_len: int | None) -> None:
    expected, attention_factor = _transformers(rope, max_model_len)
    spec = rope_spec(parse({**BASE, "rope_parameters": rope}), max_model_len)
    assert spec.inv_freq == pytest.approx(expected, rel=2e-6)  # theirs are computed in float32
    assert spec.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize(("factor", "dim"), [(1.0, 128), (0.75, 96), (0.7, 89), (0.01, 1)])
def test_frequencies_of_a_part_of_a_head(factor: float, dim: int) -> None:
    config = parse({**BASE, "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": factor, "rope_theta": 5e5})
    expected = [5e5 ** (-2 * place / dim) for place in range((dim + 1) // 2)]
    assert rope_spec(config, None).inv_freq == pytest.approx(expected)


def test_longrope_has_long_factors_once_longer_sequences_are_served() -> None:
    config = parse({**BASE, "rope_parameters": LONG})
    assert config.default_context_len == 4096
    by_default, short, long = (rope_spec(config, served) for served in (None, 4096, 4097))
    assert by_default == short
    assert short.inv_freq[9] * 1.09 == pytest.approx(long.inv_freq[9] * 5.5)
    assert short.attention_factor == long.attention_factor > 1.0


def test_plain_frequencies() -> None:
    spec = rope_spec(parse({**BASE, "rope_theta": 5e5}), None)
    assert spec.inv_freq == pytest.approx([5e5 ** (-i / 64) for i in range(64)])
    assert spec.attention_factor == 1.0


def test_dynamic_is_plain_up_to_the_position_limit() -> None:
    config = parse({**BASE, "rope_scaling": {"type": "dynamic", "factor": 8.0}})
    plain = rope_spec(parse(BASE), None)
    assert rope_spec(config, 16384).inv_freq == pytest.approx(plain.inv_freq)
    assert rope_spec(config, 16385).inv_freq != plain.inv_freq


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "su"}, "must be one of default, linear, dynamic, llama3, yarn, longrope, got 'su'"),
        ({"rope_type": "longrope"}, "field 'short_factor' is missing"),
        ({**LONG, "long_factor": [1.0] * 63}, "'long_factor' must be a list of 64 positive numbers, got a list of 63"),
        ({**LONG, "long_factor": 2.0}, "field 'long_factor' must be a list of 64 positive numbers, got 2.0"),
        ({**LONG, "short_factor": [1.0] * 63 + [0]}, "field 'short_factor' must hold positive numbers, got 0"),
        ({**LONG, "short_factor": [1.0] * 63 + ["1"]}, "field 'short_factor' must hold positive numbers, got '1'"),
        ({**LONG, "short_factor": [1.0] * 63 + [True]}, "field 'short_factor' must hold positive numbers, got True"),
        ({**LONG, "long_factor": [1e-308] * 64}, "'longrope' gives no finite frequencies with these values"),
        ({**LONG, "factor": 0}, "field 'factor' must be a positive number, got 0"),
        ({**LONG, "factor": 2.0, "original_max_position_embeddings": 1}, "'longrope' gives no finite frequencies"),
        ({"type": "linear"}, "rope_scaling: field 'factor' is missing"),
        ({"type": "linear", "factor": 1e-308}, "'linear' gives no finite frequencies with these values"),
        ({"type": "linear", "factor": 10**400}, "field 'factor' must be a positive number, got 1000"),
        ({"type": "yarn", "factor": 4.0, "mscale": 1e308, "mscale_all_dim": 1.0}, "gives no finite frequencies"),
        ({"type": "yarn", "factor": 4.0, "truncate": None}, "field 'truncate' is missing: it is null"),
        ({"type": "yarn", "factor": 4.0, "beta_fast": float("nan")}, "'beta_fast' must be a positive number, got nan"),
        ({"type": "yarn", "factor": -2.0}, "field 'factor' must be a positive number, got -2.0"),
        ({"type": "llama3", "factor": 8.0}, "field 'low_freq_factor' is missing"),
        (
            {"type": "llama3", **LLAMA3, "low_freq_factor": 4.0, "factor": 8.0},
            "must exceed low_freq_factor 4.0, got 4",
        ),
    ],
)
def test_wrong_rope_parameters(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rope_spec(parse({**BASE, "rope_scaling": rope}), 2**20)


def test_a_head_of_two_dimensions_cannot_be_stretched_dynamically() -> None:
    config = parse({**BASE, "head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    with pytest.raises(ModelError, match="'dynamic' gives no finite frequencies"):
        rope_spec(config, None)
