"""config.json in all its dialects, and what is said about a wrong one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoflow.models.config_json import ModelError, load, parse
from nanoflow.models.registry import ARCHITECTURES, build_graph

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


QWEN: dict[str, Any] = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
PHI: dict[str, Any] = {"architectures": ["Phi3ForCausalLM"]}


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
    assert (config.eos_token_ids, config.layer_windows) == ((2,), (None,) * 4)


def test_an_end_of_sequence_by_default_only_in_a_vocabulary_that_has_it() -> None:
    assert parse({**LLAMA, "vocab_size": 2}).eos_token_ids == ()
    assert parse({**LLAMA, "eos_token_id": None}).eos_token_ids == ()
    assert parse(QWEN).eos_token_ids == ()


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", (4096, 32, 32, 32, 128, 11008, 32000, 2048)),
        ("MistralForCausalLM", (4096, 32, 32, 8, 128, 14336, 32000, 131072)),
        ("Qwen2ForCausalLM", (4096, 32, 32, 32, 128, 22016, 151936, 32768)),
        ("Qwen3ForCausalLM", (4096, 32, 32, 32, 128, 22016, 151936, 32768)),
        ("Phi3ForCausalLM", (3072, 32, 32, 32, 96, 8192, 32064, 4096)),
    ],
)
def test_an_absent_size_is_that_of_the_architecture(architecture: str, expected: tuple[int, ...]) -> None:
    config = parse({"architectures": [architecture]})
    sizes = (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim)
    assert (*sizes, config.intermediate_size, config.vocab_size, config.max_position_embeddings) == expected


def test_the_architecture_by_its_model_type() -> None:
    nothing: list[Any] = [None, []]
    for names in nothing:
        config = parse({**LLAMA, "architectures": names, "model_type": "mistral"})
        assert (config.architecture, config.layer_windows[0]) == ("MistralForCausalLM", 4096)
    with pytest.raises(ModelError, match="'model_type' is 'mistral', but architectures has 'LlamaForCausalLM'"):
        parse({**LLAMA, "model_type": "mistral"})


def test_what_an_architecture_does_not_have_changes_nothing() -> None:
    left_over = {"sliding_window": 8, "layer_types": ["sliding_attention"], "num_experts": 8, "num_local_experts": 8}
    assert parse({**LLAMA, **left_over}) == parse(LLAMA)
    assert not parse({**QWEN, "attention_bias": True, "mlp_bias": True}).attention_bias


def test_experts() -> None:
    mixtral = {**LLAMA, "architectures": ["MixtralForCausalLM"]}
    experts = parse(mixtral).experts
    assert parse(LLAMA).experts is None and experts is not None
    assert (experts.num_experts, experts.num_per_token, experts.is_normalised) == (8, 2, True)
    assert experts.shared_intermediate_size is None and all(experts.sparse_layers)
    with pytest.raises(ModelError, match="'num_experts_per_tok' is missing"):
        parse({**mixtral, "num_experts_per_tok": None})
    with pytest.raises(ModelError, match="'num_experts_per_tok' must be at most num_local_experts 8, got 9"):
        parse({**mixtral, "num_experts_per_tok": 9})


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"),
    [
        ("Mixtral", {"num_local_experts": 4}, 4),
        ("Mixtral", {"num_experts": 4, "num_local_experts": 16}, 4),
        ("Qwen2Moe", {"num_experts": 16, "num_local_experts": 32}, 16),
        ("Qwen2Moe", {"num_local_experts": 32}, 60),
        ("Qwen3Moe", {"num_experts": 16}, 16),
        ("Qwen3Moe", {"num_experts": 16, "num_local_experts": 32}, 32),
    ],
)
def test_the_number_of_experts_has_two_names(architecture: str, fields: dict[str, int], expected: int) -> None:
    experts = parse({**LLAMA, "architectures": [f"{architecture}ForCausalLM"], **fields}).experts
    assert experts is not None and experts.num_experts == expected


def test_layers_without_experts() -> None:
    base = {**LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 6, "decoder_sparse_step": 2}
    experts = parse({**base, "mlp_only_layers": [3, 99]}).experts
    assert experts is not None and experts.sparse_layers == (False, True, False, False, False, True)
    for value in (["1"], 3, [True], "x"):
        with pytest.raises(ModelError, match="field 'mlp_only_layers' must be a list of layers, got"):
            parse({**base, "mlp_only_layers": value})
    with pytest.raises(ModelError, match="field 'decoder_sparse_step' must be a positive integer, got 0"):
        parse({**base, "decoder_sparse_step": 0})


def test_a_window_that_is_missing_is_asked_for_by_what_the_architecture_has() -> None:
    with pytest.raises(ModelError, match="'sliding_window' is missing, but the architecture asks for windows"):
        parse({**LLAMA, "architectures": ["GptOssForCausalLM"], "sliding_window": None})
    with pytest.raises(ModelError, match="'sliding_window' is missing, but sliding_window_pattern asks for windows"):
        parse({**LLAMA, "architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "sliding_window": None})


def test_windows_of_a_qwen_2_moe_come_early() -> None:
    """Every other layer before `max_window_layers` has one, unlike in other Qwens, where those from it on do."""
    base = {**LLAMA, "num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    windows = parse({**base, "architectures": ["Qwen2MoeForCausalLM"]}).layer_windows
    assert windows == (8, None, 8, None, None)
    assert parse({**base, "architectures": ["Qwen2ForCausalLM"]}).layer_windows == (None, None, None, 8, 8)
    assert parse({**base, "architectures": ["Qwen3MoeForCausalLM"]}).layer_windows == (8,) * 5


def test_null_counts_as_absent_where_it_may_stand() -> None:
    config = parse({**LLAMA, "rope_scaling": None, "head_dim": None, "sliding_window": None, "eos_token_id": None})
    assert (config.rope.rope_type, config.head_dim, config.eos_token_ids) == ("default", 16, ())
    for name in ("rms_norm_eps", "tie_word_embeddings", "rope_theta", "attention_bias"):
        with pytest.raises(ModelError, match=f"field '{name}' is missing: it is null"):
            parse({**LLAMA, name: None})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "linear"),
        ({"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_of_two_spellings_counts_that_which_counts_in_transformers(fields: dict[str, Any], expected: str) -> None:
    assert parse({**LLAMA, **fields}).rope.rope_type == expected


def test_two_spellings_that_differ_are_told(caplog: pytest.LogCaptureFixture) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    parse({**LLAMA, "rope_scaling": scaling, "rope_parameters": dict(scaling)})
    assert not caplog.messages
    config = parse({**LLAMA, "rope_scaling": scaling, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})
    assert "rope_scaling and rope_parameters differ, rope_scaling is used" in caplog.text
    assert (config.rope.rope_type, config.rope.theta) == ("linear", 10000.0)


def test_other_names_of_types() -> None:
    assert parse({**LLAMA, "dtype": "half", "torch_dtype": "float32"}).dtype == "float16"
    assert parse({**LLAMA, "dtype": None, "torch_dtype": "torch.bfloat16"}).dtype == "bfloat16"


def test_old_name_of_the_rope_type() -> None:
    assert parse({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}).rope.rope_type == "linear"


def test_trained_length_outside_the_rope_parameters_wins() -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    assert parse({**LLAMA, "rope_scaling": rope}).rope.original_max_len == 512
    outside = {"rope_scaling": rope, "original_max_position_embeddings": 1024}
    assert parse({**LLAMA, **outside}).rope.original_max_len == 1024


@pytest.mark.parametrize(
    ("rope", "by_default", "expected"),
    [
        ({}, 2048, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 8192, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 2048, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 8192, 8192),
        ({"rope_type": "linear", "factor": 0.5}, 2048, 2048),
        ({"rope_type": "linear", "factor": 1e300}, 2**31 - 1, 2**31 - 1),
        ({"rope_type": "dynamic", "factor": 4.0}, 2048, 8192),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}, 2048, 2048),
        ({"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 256}, 256, 2048),
        ({"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 4096}, 2048, 2048),
        ({"rope_type": "longrope"}, 2048, 2048),
        ({"rope_type": "default", "factor": 4.0}, 2048, 2048),
    ],
)
def test_longest_context(rope: dict[str, Any], by_default: int, expected: int) -> None:
    config = parse({**LLAMA, "rope_scaling": rope})
    assert (config.default_context_len, config.max_context_len) == (by_default, expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 16),
        ({"partial_rotary_factor": 0.75}, 12),
        ({"partial_rotary_factor": 0.7}, 11),
        ({"partial_rotary_factor": 1 / 16}, 1),
        ({"partial_rotary_factor": 0.75, "rope_parameters": {"partial_rotary_factor": 0.5}}, 8),
        ({"partial_rotary_factor": None, "rope_scaling": {"partial_rotary_factor": 0.5}}, 8),
        ({"partial_rotary_factor": 0.5, "head_dim": 64}, 32),
    ],
)
def test_rotated_dimensions(fields: dict[str, Any], expected: int) -> None:
    assert parse({**LLAMA, **PHI, **fields}).rope.rotary_dim == expected


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_names_of_a_stretched_embedding_of_phi(name: str, spelling: str) -> None:
    rope = parse({**LLAMA, **PHI, "rope_scaling": {spelling: name}}).rope
    assert (rope.rope_type, rope.original_max_len) == ("longrope", 4096)


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"),
    [
        ("Phi3ForCausalLM", {}, (None,) * 4),
        ("Phi3ForCausalLM", {"sliding_window": 24, "use_sliding_window": False, "max_window_layers": 4}, (24,) * 4),
        ("LlamaForCausalLM", {"sliding_window": 24}, (None,) * 4),
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("MistralForCausalLM", {"sliding_window": 24, "use_sliding_window": False}, (24,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, (None,) * 3 + (4096,)),
        ("Qwen2ForCausalLM", {"sliding_window": 24, "max_window_layers": 0}, (None,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 24, "use_sliding_window": True}, (None,) * 4),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 4096)),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 24, "layer_types": ["sliding_attention", "attention"] * 2},
            (24, None, 24, None),
        ),
    ],
)
def test_layer_windows(architecture: str, fields: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert parse({**LLAMA, "architectures": [architecture], **fields}).layer_windows == expected


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
        ({**QWEN, "layer_types": ["full_attention"]}, "field 'layer_types' must list 4 layers"),
        (
            {**QWEN, "layer_types": ["linear_attention"] * 4},
            "may hold full_attention and sliding_attention, got 'linear_atte",
        ),
        ({**QWEN, "layer_types": [[]] * 4}, "may hold full_attention and sliding_attention, got []"),
        (
            {**QWEN, "use_sliding_window": False, "layer_types": ["sliding_attention"] * 4},
            "field 'sliding_window' is missing, but layer_types asks",
        ),
        ({**QWEN, "max_window_layers": -1}, "field 'max_window_layers' must be a whole number from 0, got -1"),
        ({"per_layer_config": {"0": {}}}, "field 'per_layer_config' is set: layers of different sizes are not served"),
        ({"is_causal": False}, "field 'is_causal' must be true: only causal attention is served"),
        ({"num_hidden_layers": 10**9}, "field 'num_hidden_layers' must be at most 10000, got 1000000000"),
        ({"head_dim": 10**9}, "field 'head_dim' must be at most 65536, got 1000000000"),
        ({"hidden_size": 2**30}, "field 'hidden_size' makes heads of 268435456 dimensions, at most 65536 are served"),
        ({"hidden_size": 10**400}, "field 'hidden_size' must be at most 2147483647, got 1000000"),
        ({"rms_norm_eps": 10**400}, "field 'rms_norm_eps' must be a positive number, got 1000000"),
        ({"rope_theta": 10**400}, "field 'rope_theta' must be a positive number, got 1000000"),
        ({"rope_theta": float("inf")}, "field 'rope_theta' must be a positive number, got inf"),
        ({"hidden_act": ["x" * 1000]}, "field 'hidden_act' must be a string, got ['xxxxxxxx"),
        ({"quantization_config": {"bits": 4}}, "field 'quantization_config' is set: weights are quantised (4 bits)"),
        ({"rope_scaling": "yarn"}, "field 'rope_scaling' must be an object, got 'yarn'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "differ between layers are not served",
        ),
        ({"partial_rotary_factor": 0.5}, "must be 1, as models of type llama rotate whole heads, got 0.5"),
        ({"partial_rotary_factor": [[]]}, "must be 1, as models of type llama rotate whole heads, got [[]]"),
        ({**PHI, "partial_rotary_factor": 1.5}, "must be at most 1 and rotate some of a head's 16 dimensions, got 1.5"),
        ({**PHI, "partial_rotary_factor": 1 / 17}, "must be at most 1 and rotate some of a head's 16 dimensions, got"),
        ({**PHI, "partial_rotary_factor": None}, "field 'partial_rotary_factor' is missing: it is null"),
        (
            {**PHI, "partial_rotary_factor": 10**400},
            "field 'partial_rotary_factor' must be a positive number, got 1000",
        ),
        (
            {**PHI, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "one of default, longrope, su, yarn, got 'linear'",
        ),
        ({**PHI, "sliding_window": 0}, "field 'sliding_window' must be a positive integer, got 0"),
        ({"rope_theta": 1}, "field 'rope_theta' must exceed 1, got 1"),
    ],
)
def test_nonsense_is_one_line_with_file_and_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        parse({**LLAMA, **fields}, origin="/m/config.json")
    assert str(caught.value).startswith("/m/config.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


# Values that no field means, or that few do.
HOSTILE: tuple[Any, ...] = (
    *(None, True, 0, -1, 3, 2**31, 10**9, 10**400, -(10**400), 0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf")),
    *("", "x", "\n" * 500, [], [[]], [None], [10**400], ["x" * 10_000], {}, {"a": {}}, {"rope_type": []}),
    *({"rope_type": "yarn", "factor": 5e-324}, {"rope_type": "linear", "factor": 10**400}, {"type": "dynamic"}),
)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "MambaForCausalLM"])
def test_no_value_of_any_field_is_more_than_one_line(architecture: str) -> None:
    base = {**LLAMA, "architectures": [architecture]}
    names = {name for one in ARCHITECTURES.values() for name in one.reading.fields}
    names |= {"architectures", "model_type", "quantization_config", "is_causal", "per_layer_config"}
    num_errors = 0
    for name, value in itertools.product(names, HOSTILE):
        try:
            build_graph(parse({**base, name: value}), None)
        except ModelError as error:
            num_errors += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 400
    # Fields that other architectures have are ignored, whatever they hold.
    assert num_errors > len(names) * len(HOSTILE) * 0.4


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [3]])
def test_no_architecture(architectures: object) -> None:
    with pytest.raises(ModelError, match="field 'architectures'"):
        parse({**LLAMA, "architectures": architectures})


def test_ends_of_sequence_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 5}))
    assert load(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5, 7]}')
    assert load(tmp_path).eos_token_ids == (5, 3, 7)
    (tmp_path / "other").write_text('{"eos_token_id": 9}')
    assert load(tmp_path, tmp_path / "other").eos_token_ids == (5, 9)
    # What an architecture has by default is not added to what a file says.
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load(tmp_path).eos_token_ids == (3, 5, 7)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load(tmp_path).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"[]", "must hold a JSON object, holds a list"),
        (b'{"a": "\xff"}', "not readable as JSON: 'utf-8' codec can't decode"),
        ('{"a": 1}'.encode("utf-16"), "not readable as JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "not readable as JSON: nested too deeply"),
        (b'{"a":' * 100_000, "not readable as JSON: nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not readable as JSON: Exceeds the limit"),
        (b'{"vocab_size": 1, "a": {"b": 1, "b": 2}}', "not readable as JSON: the key 'b' is twice in one object"),
        (b" " * 2**23, "has 8388608 bytes, more than the"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_no_usable_file(content: bytes | None, message: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif name == "generation_config.json":
        pytest.skip("may be absent")
    _expect_unreadable(tmp_path / name, message)


def _expect_unreadable(path: Path, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        load(path.parent)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def _make_socket(path: Path) -> None:
    # Names of sockets are short: this one is bound where it stands.
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(path.parent):
        bound.bind(path.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "is no regular file"),
        (os.mkfifo, "is no regular file"),
        (_make_socket, "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: path.symlink_to(path), "not readable: Too many levels of symbolic links"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_file_is_not_waited_for(
    make: Callable[[Path], None], message: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    _expect_unreadable(tmp_path / name, message)


def test_reading_a_model_and_building_its_graph_import_no_torch() -> None:
    code = "import sys; from nanoflow.models import locate, registry; print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
