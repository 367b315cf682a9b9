"""Presets against the published sizes of the models, and what is said where one cannot be used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nanoflow.config import EngineConfig
from nanoflow.engine.build import resolve_model
from nanoflow.engine.tokenizer import load_tokenizer
from nanoflow.models.config_json import ModelError
from nanoflow.models.presets import PRESETS, preset_config, preset_name
from nanoflow.models.registry import build_graph

NUM_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "deepseek-llm-67b": 67_425_001_472,
}
ANALYSIS_ONLY = {"mixtral-8x7b"}


def test_every_preset_has_its_published_size() -> None:
    served = [name for name in PRESETS if name not in ANALYSIS_ONLY]
    assert {name: build_graph(preset_config(name), None).num_parameters for name in served} == NUM_PARAMETERS


def test_a_mixture_of_experts_is_known_and_not_served() -> None:
    config = preset_config("mixtral-8x7b")
    assert (config.num_experts, config.num_experts_per_token) == (8, 2)
    width, inner, kv_width, vocab = config.hidden_size, config.intermediate_size, 8 * 128, config.vocab_size
    layer = 2 * width * (width + kv_width) + 8 * 3 * width * inner + width * 8 + 2 * width
    assert 32 * layer + 2 * vocab * width + width == 46_702_792_704
    with pytest.raises(
        ModelError,
        match=r"^architecture 'MixtralForCausalLM' is not served yet .a mixture of experts.; nearest known: MistralF",
    ):
        build_graph(config, None)


def test_every_other_preset_is_dense() -> None:
    assert {name for name in PRESETS if preset_config(name).num_experts is not None} == ANALYSIS_ONLY


def test_what_the_size_does_not_show() -> None:
    assert preset_config("mistral-7b").layer_windows == (4096,) * 32
    assert preset_config("phi-3-mini").layer_windows == (2047,) * 32
    one_b = preset_config("llama-3.2-1b")
    assert (one_b.rope.rope_type, one_b.head_dim, one_b.max_context_len) == ("llama3", 64, 131072)
    assert {preset_config(name).dtype for name in PRESETS if not name.startswith("llama-2")} == {"bfloat16"}


@pytest.mark.parametrize(
    ("name", "hint"), [("llama3-8b", "'llama-3-8b'"), ("Qwen3-8B", "'qwen3-8b'"), ("zzz", "known: llama-2-7b")]
)
def test_an_unknown_preset_is_told_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=f"unknown preset {name!r}; .*{hint}"):
        preset_config(name)


def test_only_the_prefix_makes_a_preset() -> None:
    assert preset_name("preset:llama-3-8b") == "llama-3-8b"
    assert preset_name("llama-3-8b") is None


def test_a_preset_has_neither_folder_nor_tokenizer() -> None:
    config = EngineConfig(model="preset:qwen2.5-0.5b")
    assert resolve_model(config) == (preset_config("qwen2.5-0.5b"), None)
    assert load_tokenizer(config) is None


def test_presets_need_no_torch() -> None:
    code = "import sys, nanoflow.models.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
