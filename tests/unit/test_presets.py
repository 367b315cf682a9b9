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
    "mixtral-8x7b": 46_702_792_704,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
# What one token passes; 12.9, 2.7, 14.2 and 3.3 of 1e9 are published, and of gpt-oss 3.61 and 5.13 without the
# embedding, which has 0.579.
NUM_ACTIVE = {
    "mixtral-8x7b": 12_879_925_248,
    "qwen1.5-moe-a2.7b": 2_689_173_504,
    "qwen2-57b-a14b": 14_249_270_784,
    "qwen3-30b-a3b": 3_353_032_704,
    "gpt-oss-20b": 4_187_440_704,
    "gpt-oss-120b": 5_711_982_912,
}


def test_every_preset_has_its_published_size() -> None:
    assert {name: build_graph(preset_config(name), None).num_parameters for name in PRESETS} == NUM_PARAMETERS


def test_a_token_of_a_mixture_of_experts_passes_what_its_name_says() -> None:
    graphs = {name: build_graph(preset_config(name), None) for name in PRESETS}
    active = {
        name: graph.num_active_parameters for name, graph in graphs.items() if preset_config(name).experts is not None
    }
    assert active == NUM_ACTIVE
    dense = [graph for name, graph in graphs.items() if name not in NUM_ACTIVE]
    assert all(graph.num_active_parameters == graph.num_parameters for graph in dense)


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
