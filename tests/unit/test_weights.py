"""Checkpoints of every shape load into fused parameters; what is wrong with the others is one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoflow.graph.graph import OpGraph
from nanoflow.models import config as model_config
from nanoflow.models.config import ModelError
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import Weights, load_weights, random_weights
from tests.families import make_model

CPU = torch.device("cpu")
QUERY = "model.layers.1.self_attn.q_proj.weight"


def _graph(folder: Path) -> OpGraph:
    return build_graph(model_config.load(folder), None)


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(_graph(folder), folder, dtype, CPU, show_progress=False)


def _shard(folder: Path) -> None:
    """Split model.safetensors in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model("qwen2", tmp_path)


def test_parts_are_fused_in_order(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    weights = _load(folder)
    assert len(weights.layers) == 3
    for layer, group in enumerate(weights.layers):
        source = f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [stored[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            assert torch.equal(group[f"qkv_proj.{kind}"], torch.cat(parts))
        parts = [stored[f"{source}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(group["gate_up_proj.weight"], torch.cat(parts))
        assert torch.equal(group["down_proj.weight"], stored[f"{source}mlp.down_proj.weight"])
    assert torch.equal(weights.shared["embed.weight"], stored["model.embed_tokens.weight"])
    assert sorted(weights.shared) == ["embed.weight", "final_norm.weight", "lm_head.weight"]


def test_shards_load_like_one_file(folder: Path) -> None:
    whole = _load(folder)
    _shard(folder)
    sharded = _load(folder)
    for one, other in zip((whole.shared, *whole.layers), (sharded.shared, *sharded.layers), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_model("llama2", tmp_path, dtype="bfloat16")
    weights = _load(folder, dtype)
    stored = load_file(folder / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(weights.shared["final_norm.weight"], stored["model.norm.weight"].to(dtype))
    assert {tensor.dtype for group in (weights.shared, *weights.layers) for tensor in group.values()} == {dtype}


def test_a_tied_output_is_not_stored_twice(tmp_path: Path) -> None:
    folder = make_model("llama2", tmp_path, tied=True)
    tensors = load_file(folder / "model.safetensors")
    # Some checkpoints hold the tied matrix and the rotary buffers all the same.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    assert sorted(_load(folder).shared) == ["embed.weight", "final_norm.weight"]


def test_only_what_is_named_in_full_may_be_left_out(folder: Path) -> None:
    """A tensor that has a longer name than one to ignore may be one that the model needs elsewhere."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq_scale"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 tensor \(model\.layers\.0\.self_attn\.rotary_emb\.inv_freq_scale\)"):
        _load(folder)


def test_number_of_bytes(folder: Path) -> None:
    assert _load(folder, torch.bfloat16).num_bytes == 2 * _graph(folder).num_parameters


def _drop(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".mlp." in name]:
        del tensors[name]


def _drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors[QUERY]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2)


def _transpose(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def _quantise(tensors: dict[str, Tensor]) -> None:
    tensors[QUERY] = tensors[QUERY].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "lacks 9 tensors (model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight, "),
        (_drop, "model.layers.0.mlp.down_proj.weight and 6 more) that Qwen2ForCausalLM"),
        (_drop_one, f"lacks 1 tensor ({QUERY}) that Qwen2ForCausalLM"),
        (_add, "has 1 tensor (model.layers.3.mlp.up_proj.weight) that Qwen2ForCausalLM"),
        (_transpose, "model.layers.1.mlp.up_proj.weight has shape (64, 96), expected (96, 64)"),
        (_quantise, f"{QUERY} has type I8, expected F32, F16, BF16 or F64"),
    ],
)
def test_wrong_tensors(damage: Callable[[dict[str, Tensor]], None], message: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    _expect_error(folder, message)


def _expect_error(folder: Path, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        _load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 20000])
def test_a_file_cut_short(num_bytes: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    _expect_error(folder, f"{path} is cut short or no safetensors file; download it again (")


def test_a_pointer_instead_of_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060522752\n")
    _expect_error(folder, f"{path} is cut short or no safetensors file")


def test_an_index_that_names_a_missing_file(folder: Path) -> None:
    _shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    _expect_error(folder, "names 'model-00002-of-00002.safetensors', which is not there")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_a_broken_index(content: str, folder: Path) -> None:
    _shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    _expect_error(folder, "model.safetensors.index.json")


def test_an_index_may_not_leave_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _expect_error(folder, "names '../elsewhere.safetensors', which is no file name")


def test_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _expect_error(folder, "has 'pytorch_model.bin', but only safetensors is read: convert with")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    _expect_error(folder, "has neither model.safetensors nor model.safetensors.index.json")


def test_nothing_is_allocated_for_a_wrong_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4, "layer_types": None}))

    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("allocated before the check")

    monkeypatch.setattr(torch, "empty", refuse)
    _expect_error(folder, "lacks 12 tensors")


def test_progress_bar(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_weights(_graph(folder), folder, torch.float32, CPU, show_progress=True)
    assert "Loading weights: 100%" in capsys.readouterr().err
    _load(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_weights(dtype: torch.dtype, folder: Path) -> None:
    graph = _graph(folder)
    weights, again, other = (random_weights(graph, dtype, CPU, seed) for seed in (3, 3, 4))
    gate_up = weights.layers[1]["gate_up_proj.weight"]
    assert gate_up.dtype == dtype
    assert gate_up.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(gate_up, again.layers[1]["gate_up_proj.weight"])
    assert not torch.equal(gate_up, other.layers[1]["gate_up_proj.weight"])
    assert not torch.equal(gate_up, weights.layers[0]["gate_up_proj.weight"])
    assert torch.all(weights.layers[0]["attn_norm.weight"] == 1.0)
    assert 0.0 < weights.layers[0]["qkv_proj.bias"].abs().max().item() < 0.02
