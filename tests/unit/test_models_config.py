"""config.json in all its dialects, and what is said about a wrong one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoflow.models.config import ModelError, load, parse

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def test_transformers_4_and_5_say_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}, "torch_dtype": "bfloat16"}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}, "dtype": "bfloat16"}
    parsed = [parse({**LLAMA, **dialect}) for dialect in (old, new)]
    assert {config.dtype for config in parsed} == {"bfloat16"}
    assert {(rope.rope_type, rope.theta, rope.original_max_len) for rope in (c.rope for c in parsed)} == {
        ("llama3", 5e5, 64)
    }


def test_what_may_be_absent_has_the_defaults_of_llama() -> None:
    config = parse({name: value for name, value in LLAMA.items() if name != "num_key_value_heads"})
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (4, 16, "float32")
    assert (config.rope.rope_type, config.rope.theta) == ("default", 10000.0)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert (config.eos_token_ids, config.layer_windows) == ((), (None,) * 4)


def test_experts_in_the_words_of_mixtral_and_qwen() -> None:
    assert (parse(LLAMA).num_experts, parse(LLAMA).num_experts_per_token) == (None, None)
    for name in ("num_local_experts", "num_experts"):
        config = parse({**LLAMA, name: 8, "num_experts_per_tok": 2})
        assert (config.num_experts, config.num_experts_per_token) == (8, 2)
    with pytest.raises(ModelError, match="'num_experts_per_tok' is missing"):
        parse({**LLAMA, "num_experts": 8})
    with pytest.raises(ModelError, match="'num_experts_per_tok' must be at most num_experts 8, got 9"):
        parse({**LLAMA, "num_experts": 8, "num_experts_per_tok": 9})


def test_null_counts_as_absent() -> None:
    config = parse({**LLAMA, "rope_scaling": None, "head_dim": None, "sliding_window": None, "eos_token_id": None})
    assert (config.rope.rope_type, config.head_dim, config.eos_token_ids) == ("default", 16, ())


def test_old_name_of_the_rope_type() -> None:
    assert parse({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}).rope.rope_type == "linear"


def test_trained_length_outside_the_rope_parameters_wins() -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    assert parse({**LLAMA, "rope_scaling": rope}).rope.original_max_len == 512
    outside = {"rope_scaling": rope, "original_max_position_embeddings": 1024}
    assert parse({**LLAMA, **outside}).rope.original_max_len == 1024


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
    ],
)
def test_longest_context(rope: dict[str, Any], expected: int) -> None:
    assert parse({**LLAMA, "rope_scaling": rope}).max_context_len == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sliding_window": 24}, (24, 24, 24, 24)),
        ({"sliding_window": 24, "use_sliding_window": False, "max_window_layers": 2}, (None,) * 4),
        ({"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 24)),
        (
            {"sliding_window": 24, "max_window_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
            (24, None, 24, None),
        ),
    ],
)
def test_layer_windows(fields: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert parse({**LLAMA, **fields}).layer_windows == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
        ({"hidden_size": 64.0}, "field 'hidden_size' must be a positive integer, got 64.0"),
        ({"num_hidden_layers": 0}, "field 'num_hidden_layers' must be a positive integer, got 0"),
        ({"vocab_size": True}, "field 'vocab_size' must be a positive integer, got True"),
        ({"rms_norm_eps": -1}, "field 'rms_norm_eps' must be a positive number, got -1"),
        ({"rms_norm_eps": float("nan")}, "field 'rms_norm_eps' must be a positive number, got nan"),
        ({"num_key_value_heads": 3}, "'num_key_value_heads' must divide num_attention_heads 4, got 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "must divide hidden_size 64, got 5"),
        ({"head_dim": 15}, "field 'head_dim' must be even for the rotary embedding, got 15"),
        ({"tie_word_embeddings": "yes"}, "field 'tie_word_embeddings' must be true or false, got 'yes'"),
        ({"torch_dtype": "int8"}, "'torch_dtype' must be one of float32, bfloat16, float16, got 'int8'"),
        ({"eos_token_id": 131}, "field 'eos_token_id' must be token ids below 131, got 131"),
        ({"eos_token_id": [1, "2"]}, "field 'eos_token_id' must be token ids below 131, got '2'"),
        ({"layer_types": ["full_attention"]}, "field 'layer_types' must list 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "may hold full_attention and sliding_attention, got 'linear_atte"),
        ({"layer_types": ["sliding_attention"] * 4}, "field 'sliding_window' is missing, but layer_types asks"),
        ({"max_window_layers": -1}, "field 'max_window_layers' must be a whole number from 0, got -1"),
        ({"quantization_config": {"bits": 4}}, "field 'quantization_config' is set: quantised weights are not served"),
        ({"rope_scaling": "yarn"}, "field 'rope_scaling' must be an object, got 'yarn'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "differ between layers are not served",
        ),
        ({"partial_rotary_factor": 0.5}, "field 'partial_rotary_factor' must be 1"),
        ({"rope_theta": 1}, "field 'rope_theta' must exceed 1, got 1"),
    ],
)
def test_nonsense_is_one_line_with_file_and_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        parse({**LLAMA, **fields}, origin="/m/config.json")
    assert str(caught.value).startswith("/m/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [3]])
def test_no_architecture(architectures: object) -> None:
    with pytest.raises(ModelError, match="field 'architectures'"):
        parse({**LLAMA, "architectures": architectures})


def test_ends_of_sequence_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 5}))
    assert load(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5, 7]}')
    assert load(tmp_path).eos_token_ids == (5, 3, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not readable as JSON"), ("[]", "must hold a JSON object, holds a list")],
)
def test_no_usable_file(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_reading_a_model_and_building_its_graph_import_no_torch() -> None:
    code = "import sys; from nanoflow.models import locate, registry; print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
