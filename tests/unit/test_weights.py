"""Checkpoints of every shape load into fused parameters; what is wrong with the others is one line."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.graph.graph import OpGraph
from nanoflow.models import config_json as model_config
from nanoflow.models import weights as weights_module
from nanoflow.models.checkpoint import StoredTensor
from nanoflow.models.config_json import ModelError
from nanoflow.models.registry import build_graph
from nanoflow.models.stored import Plain, Stored
from nanoflow.models.weights import Weights, load_weights, random_weights
from tests.driving import HuggingFace
from tests.families import make_model
from tests.logits import prompt_logits

CPU = torch.device("cpu")
PROMPT = [number * 37 % 131 for number in range(40)]
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


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def _only_output(tensors: dict[str, Tensor]) -> None:
    tensors[OUTPUT] = tensors.pop(EMBEDDING)


def _both_alike(tensors: dict[str, Tensor]) -> None:
    tensors[OUTPUT] = tensors[EMBEDDING].clone()


def _both(tensors: dict[str, Tensor]) -> None:
    tensors[OUTPUT] = tensors[EMBEDDING].flip(0).contiguous()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("change", [_only_output, _both_alike, _both])
@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_a_tied_pair_is_read_as_transformers_reads_it(
    family: str, change: Callable[[dict[str, Tensor]], None], sharded: bool, tmp_path: Path
) -> None:
    """Stored under either name, and not tied if both are stored and differ: no tensor is dropped by its name."""
    make_model(family, tmp_path, tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    plain = prompt_logits(tmp_path, PROMPT)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if sharded:
        _shard(tmp_path)
    logits = prompt_logits(tmp_path, PROMPT)
    torch.testing.assert_close(logits, HuggingFace(tmp_path).logits(PROMPT), rtol=2e-4, atol=2e-4)
    assert torch.allclose(logits, plain, atol=1e-3) == (change is not _both)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_type_that_config_json_does_not_have_is_that_of_the_weights(dtype: str, tmp_path: Path) -> None:
    make_model("llama2", tmp_path, dtype=dtype)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": None}))
    assert model_config.load(tmp_path).dtype == dtype
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": None, "torch_dtype": "float16"}))
    assert model_config.load(tmp_path).dtype == "float16"
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": None}))
    (tmp_path / "model.safetensors").unlink()
    assert model_config.load(tmp_path).dtype == "float32"


def test_a_tied_pair_that_differs_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model("llama2", tmp_path, tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    _both_alike(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    assert model_config.load(tmp_path).tie_word_embeddings
    assert not caplog.messages
    tensors[OUTPUT][-1, -1] += 1.0
    save_file(tensors, tmp_path / "model.safetensors")
    assert not model_config.load(tmp_path).tie_word_embeddings
    assert "ties the output to the embedding, but the weights differ: they are not tied" in caplog.text


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
    assert len(str(caught.value)) < 500


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


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b", 7, None, ["x"]]
)
def test_an_index_may_not_leave_the_folder(name: object, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    _expect_error(folder, f"names {name!r}, which is no file name")


def test_an_index_that_names_a_tensor_that_is_not_there(folder: Path) -> None:
    _shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.rotary_emb.inv_freq"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    _expect_error(folder, "names model.rotary_emb.inv_freq in 'model-00001-of-00002.safetensors', which lacks it")


def test_a_tensor_in_two_shards(folder: Path) -> None:
    _shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    other = load_file(folder / "model-00001-of-00002.safetensors")
    save_file({**load_file(path), QUERY: other.get(QUERY, torch.zeros(2))}, path)
    first = folder / "model-00001-of-00002.safetensors"
    save_file({**other, QUERY: torch.zeros(2)}, first)
    _expect_error(folder, f"{QUERY} is in both {first} and {path}: remove one of them")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "shard"])
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (Path.mkdir, "is no regular file"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: path.symlink_to(path), "not readable: Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
    ],
)
def test_what_is_no_file_is_not_waited_for(name: str, make: Callable[[Path], None], problem: str, folder: Path) -> None:
    _shard(folder)
    path = folder / ("model-00001-of-00002.safetensors" if name == "shard" else name)
    path.unlink(missing_ok=True)
    make(path)
    _expect_error(folder, f"{path}: {problem}")


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def _header(header: object, num_bytes: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


@pytest.mark.parametrize(
    "content",
    [
        (2**60).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        _header(b""),
        _header([]),
        _header(b"{" + b"x" * 100),
        _header(b'{"a":' * 50_000),
        _header({"a": 1}),
        _header({"a": {"dtype": "F32", "shape": [2]}}),
        _header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        _header({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}),
        _header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**60]}}),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
        _header({"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}),
        _header({**HEADER, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
        _header({**HEADER, "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, 16),
        _header(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        ),
        _header(HEADER, 4),
        _header(HEADER, 12),
        _header(b'{"\xff": 1}'),
    ],
)
def test_a_hostile_header(content: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    _expect_error(folder, f"{path} is cut short or no safetensors file; download it again (")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_header_that_is_too_long_is_not_read(folder: Path) -> None:
    """A sparse file says that it has the gigabyte that its header claims."""
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)
    _expect_error(folder, f"{path} is cut short or no safetensors file; download it again (its header has 1073741824 b")


def test_strange_names_are_quoted_and_cut(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "a\nb": torch.zeros(2), "c" * 1000: torch.zeros(2)}, folder / "model.safetensors")
    _expect_error(folder, r"('a\nb', 'cccc")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 259}, "model.embed_tokens.weight has shape (257, 64), expected (259, 64) by config.json"),
        (
            {"hidden_size": 2**30, "head_dim": 16},
            "model.embed_tokens.weight has shape (257, 64), expected (257, 1073741824) by config",
        ),
        ({"intermediate_size": 2**30}, "gate_proj.weight has shape (96, 64), expected (1073741824, 64) by config.json"),
        ({"head_dim": 8}, "q_proj.weight has shape (64, 64), expected (32, 64) by config.json"),
        ({"num_key_value_heads": 4}, "k_proj.weight has shape (32, 64), expected (64, 64) by config.json"),
        ({"num_hidden_layers": 2}, "no place for: num_hidden_layers is 2 in config.json, the weights have 3"),
        ({"num_hidden_layers": 9999}, "needs: num_hidden_layers is 9999 in config.json, the weights have 3"),
    ],
)
def test_a_config_that_disagrees_with_the_weights_names_both(
    fields: dict[str, int], message: str, folder: Path
) -> None:
    """And an engine says so before it asks whether a model of that size fits, or makes anything."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": None, **fields}))
    _expect_error(folder, message)
    with pytest.raises(ModelError, match=re.escape(message)):
        build_engine(EngineConfig(model=str(folder), device="cpu"))


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


def test_tensors_are_mapped_in_parts_in_the_order_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(name: str, start: int, end: int) -> Stored:
        tensor = StoredTensor(path=Path("x"), shape=(), dtype="F32", start=start, end=end)
        return Stored(name=name, form=Plain(), shape=(), tensors={"weight": tensor}, names={"weight": name})

    monkeypatch.setattr(weights_module, "_MAPPED_BYTES", 10)
    places = {"c": (8, 14), "a": (0, 4), "d": (14, 40), "b": (4, 8), "e": (40, 42)}
    groups = weights_module._groups([part(name, *place) for name, place in places.items()])
    assert [[each.part.name for each in group] for group in groups] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(weights_module._groups([])) == []


def test_a_tensor_that_is_too_large_is_mapped_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mapping is of more than the bound, unless a single row is."""
    monkeypatch.setattr(weights_module, "_MAPPED_BYTES", 10)

    def part(name: str, shape: tuple[int, ...], dtype: str, start: int, end: int) -> Stored:
        tensor = StoredTensor(path=Path("x"), shape=shape, dtype=dtype, start=start, end=end)
        return Stored(name=name, form=Plain(), shape=shape, tensors={"weight": tensor}, names={"weight": name})

    parts = [
        part("small", (2,), "F32", 0, 8),
        part("large", (5, 2, 1), "F16", 8, 28),
        part("next", (2,), "F32", 28, 36),
        part("rows", (2, 8), "F32", 36, 100),
    ]
    found = [[(each.part.name, each.rows) for each in group] for group in weights_module._groups(parts)]
    assert found == [
        [("small", None)],
        [("large", slice(0, 2))],
        [("large", slice(2, 4))],
        [("large", slice(4, 6))],
        [("next", None)],
        [("rows", slice(0, 1))],
        [("rows", slice(1, 2))],
    ]


def _stack_experts(folder: Path) -> None:
    """The same checkpoint with the experts of a layer as one tensor each, as transformers 5 holds them."""
    tensors = load_file(folder / "model.safetensors")
    number = re.compile(r"(.*layers\.\d+\.)(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight")
    stacked: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name in list(tensors):
        if (match := number.fullmatch(name)) is not None:
            matrix = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(match[3], match[3])
            stacked.setdefault((match[1], matrix), {})[int(match[2])] = tensors.pop(name)
        elif "block_sparse_moe.gate" in name:
            tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)
    whole = {key: torch.stack([of[expert] for expert in sorted(of)]) for key, of in stacked.items()}
    for (layer, matrix), down in whole.items():
        if matrix == "down_proj":
            gate_up = torch.cat((whole[layer, "gate_proj"], whole[layer, "up_proj"]), dim=1)
            tensors |= {f"{layer}mlp.experts.gate_up_proj": gate_up, f"{layer}mlp.experts.down_proj": down}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_load_alike_from_both_layouts(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(family, tmp_path)
    apart = _load(tmp_path)
    _stack_experts(tmp_path)
    whole = _load(tmp_path)
    monkeypatch.setattr(weights_module, "_MAPPED_BYTES", 5000)
    for other in (whole, _load(tmp_path)):
        for one, group in zip((apart.shared, *apart.layers), (other.shared, *other.layers), strict=True):
            assert one.keys() == group.keys() and all(torch.equal(one[name], group[name]) for name in one)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    make_model("qwen3-moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=re.escape(f"lacks 1 tensor ({name})")):
        _load(tmp_path)


def test_a_checkpoint_mapped_in_parts_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _load(folder)
    monkeypatch.setattr(weights_module, "_MAPPED_BYTES", 1)
    parts = _load(folder)
    for one, other in zip((whole.shared, *whole.layers), (parts.shared, *parts.layers), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
