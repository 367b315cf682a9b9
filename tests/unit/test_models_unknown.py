"""Models that are not served: the architecture is said first, other formats are named, and every command says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM
from nanoflow.cli.main import main
from nanoflow.models.config_json import ModelError, load, parse
from nanoflow.models.fields import shown
from nanoflow.models.locate import locate_model
from nanoflow.models.registry import ARCHITECTURES
from tests.unit.test_models_config import LLAMA

KNOWN = f"known: {', '.join(ARCHITECTURES)}"
LEARNED = "learned positions"
# What config.json says, how the model is described, and which served architecture is nearest (None: none is).
UNKNOWN: tuple[tuple[dict[str, Any], str, str | None], ...] = (
    ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768}, LEARNED, "Llama"),
    ({"architectures": ["GPT2LMHeadModel"]}, LEARNED, "Llama"),
    ({"model_type": "gpt2", "n_embd": 768}, LEARNED, "Llama"),
    ({"architectures": ["OPTForCausalLM"], "model_type": "opt", "rms_norm_eps": None}, LEARNED, "Llama"),
    ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "ALiBi", "Llama"),
    ({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}, "built otherwise", "Llama"),
    ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "built otherwise", "Llama"),
    ({"architectures": ["Gemma2ForCausalLM"]}, "built otherwise", "Llama"),
    ({"architectures": ["PhiForCausalLM"], "model_type": "phi"}, "built otherwise", "Llama"),
    ({"architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small"}, "built otherwise", "Phi3"),
    ({"architectures": ["PhimoeForCausalLM"], "model_type": "phimoe"}, "mixture of experts", "Llama"),
    ({"architectures": ["Phi4MMForCausalLM"], "model_type": "phi4mm"}, "several media", None),
    ({"architectures": ["OlmoeForCausalLM"], "num_experts": 64}, "mixture of experts", "Llama"),
    ({"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}, "state-space", "Qwen3"),
    ({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}, "mixture of experts", "Llama"),
    ({"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"}, "", "Mistral"),
    ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "state-space", "Llama"),
    ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "classifier", "Llama"),
    ({"architectures": ["Qwen3Model"], "model_type": "qwen3"}, "without an output projection", "Qwen3"),
    ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "an encoder, which", None),
    ({"architectures": ["BertModel"]}, "an encoder, which", None),
    ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "encoder and a decoder", None),
    ({"architectures": ["T5ForConditionalGeneration"]}, "encoder and a decoder", None),
    ({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}, "sound", None),
    ({"architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": {"depth": 2}}, "images", None),
    ({"architectures": ["ViTForImageClassification"], "model_type": "vit"}, "images", None),
    ({"architectures": ["ThingForCausalLM"], "model_type": "thing"}, "is not known;", "Llama"),
    ({"architectures": ["ThingLMHeadModel"], "model_type": "thing"}, "is not known;", "Llama"),
    ({"architectures": ["gpt2" * 50]}, LEARNED, "Llama"),
    ({"model_type": "thing", "quantization_config": {"bits": 4}}, "", "Llama"),
)


@pytest.mark.parametrize(("config", "kind", "nearest"), UNKNOWN)
def test_an_unknown_architecture_is_said_before_anything_that_it_lacks(
    config: dict[str, Any], kind: str, nearest: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    for is_folder in (False, True):
        with pytest.raises(ModelError) as caught:
            _ = load(tmp_path) if is_folder else parse(config)
        message = str(caught.value)
        name = shown(config.get("architectures", [config.get("model_type")])[0])
        assert f"{name} is not known" in message and message.endswith(KNOWN) and "\n" not in message
        assert kind in message and "is missing" not in message
        near = "none of the known ones is similar" if nearest is None else f"nearest known: {nearest}ForCausalLM;"
        assert near in message


# The files of a folder (a name that ends in / is a folder), and what is said of it.
FOLDERS: tuple[tuple[Mapping[str, object], str], ...] = (
    ({}, "is empty"),
    ({"README.md": ""}, "has no config.json"),
    (
        {"model-Q4_K_M.gguf": "GGUF"},
        r"holds GGUF \(it has 'model-Q4_K_M.gguf'\): give the file to serve, as '.*/model-Q4_K_M.gguf'",
    ),
    ({"model.GGUF": "GGUF", "tokenizer.json": {}}, "holds GGUF"),
    ({"model.ggml": ""}, "is in GGML"),
    (
        {"adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "org/base"}},
        r"is a LORA adapter of 'org/base' \(adapter_config.json\), no whole model: .*merge_and_unload",
    ),
    ({"adapter_config.json": {}, "adapter_model.safetensors": ""}, "is an adapter"),
    ({"adapter_config.json": "no JSON"}, "is an adapter"),
    ({"model_index.json": {}, "unet/config.json": {}}, "is a diffusers pipeline"),
    ({"modules.json": []}, "is a sentence-transformers model"),
    ({"params.json": {}, "consolidated.00.pth": ""}, "as its makers write it"),
    ({"pytorch_model.bin": ""}, "has 'pytorch_model.bin', but only safetensors is read: convert"),
    ({"model.pth": ""}, "has 'model.pth', but only safetensors is read: convert"),
    ({"onnx/model.onnx": ""}, "is in ONNX"),
    ({"model.onnx": "", "tokenizer.json": {}}, "is in ONNX"),
    ({"tf_model.h5": ""}, "is for TensorFlow"),
    ({"flax_model.msgpack": ""}, "is for Flax"),
    ({"weights.00.npz": ""}, "is in MLX's form"),
    ({"model.safetensors": ""}, "has 'model.safetensors', but no config.json"),
    ({"tokenizer.json": {}, "tokenizer_config.json": {}}, "is a tokenizer alone"),
    ({"checkpoint-9/config.json": {}, "checkpoint-10/config.json": {}}, "'checkpoint-10' has one: give '.*-10'"),
    ({"snapshots/abc/config.json": {}, "refs/main": "abc"}, "'snapshots/abc' has one: give '.*/snapshots/abc'"),
    # With a config.json:
    ({"config.json": LLAMA, "adapter_config.json": {"peft_type": "LORA"}}, "is a LORA adapter"),
    (
        {"config.json": LLAMA, "adapter_config.json": {}, "model.safetensors": ""},
        "a whole model and an adapter .*, which would not be applied: remove adapter_config.json if",
    ),
    ({"config.json": {"_class_name": "UNet2DConditionModel"}}, "is of diffusers"),
    ({"config.json": {**LLAMA, "quantization": {"group_size": 64, "bits": 4}}}, r"by MLX \(4 bits\) are not served"),
    ({"config.json": LLAMA, "quantize_config.json": {"bits": 4}}, "quantize_config.json: field '.*' is missing"),
    ({"config.json": []}, "must hold a JSON object"),
    ({"config.json": {}}, "field 'architectures' is missing"),
)


def _write(folder: Path, files: Mapping[str, object]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(("files", "says"), FOLDERS)
def test_what_a_folder_is_that_is_no_model(files: Mapping[str, object], says: str, tmp_path: Path) -> None:
    model = _write(tmp_path, files)
    with pytest.raises(ModelError, match=says) as caught:
        load(locate_model(model))
    assert "\n" not in str(caught.value) and model in str(caught.value)
    if files.get("config.json", True) == {}:
        return  # Which fields are wrong may be said after what the tokenizer lacks.
    with pytest.raises(ValueError, match=says):
        LLM(model, device="cpu")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.gguf", b"GG", "is no GGUF file, although its name says so"),
        ("model.ggml", b"lmgg", "is a GGML file"),
        ("model.onnx", b"", "is an ONNX graph"),
        ("model.safetensors", b"", "is a file of weights alone"),
        ("model.pth", b"PK\x03\x04", "is an archive"),
        ("model.bin", b"", "never pickles"),
        ("config.json", b"{}", "is a file; give its folder"),
        ("notes", b"", "is a file; give the folder that holds config.json"),
    ],
)
def test_what_a_file_is_that_is_no_folder(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=says):
        locate_model(str(tmp_path / name))


@pytest.mark.parametrize("others", [{"model.gguf": ""}, {"pytorch_model.bin": ""}, {"onnx/model.onnx": ""}])
def test_weights_in_another_format_beside_a_config(
    others: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _write(tmp_path, {"config.json": {**LLAMA, "model_type": "llama"}, **others})
    assert main(["generate", "x", "--model", model, "--tokenizer", "default", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and model in error
    assert next(iter(others)).split("/")[0] in error, error


COMMANDS = (
    ("serve", "{}", "--port", "0", "--device", "cpu"),
    ("generate", "x", "--model", "{}", "--device", "cpu"),
    ("chat", "--model", "{}", "--device", "cpu"),
    ("bench", "throughput", "--model", "{}", "--device", "cpu"),
    ("profile", "{}", "-o", "{}/profile.json", "--estimate", "h200"),
    ("profile", "{}", "-o", "{}/profile.json", "--device", "cpu"),
    ("analyze", "{}", "--gpu", "h200"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": {"architectures": ["OPTForCausalLM"], "model_type": "opt"}}, "'OPTForCausalLM' is not known"),
        ({"adapter_config.json": {"peft_type": "LORA"}}, "is a LORA adapter"),
    ],
)
def test_every_command_says_it_in_a_line(
    command: tuple[str, ...],
    files: Mapping[str, object],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = _write(tmp_path, files)
    assert main([part.format(model) for part in command]) == 1
    error = capsys.readouterr().err
    assert says in error and error.startswith("nanoflow: error: ") and error.count("\n") == 1, error
