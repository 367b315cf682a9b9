"""Quantised checkpoints of every form give the logits of the numbers they stand for; damaged ones are one line."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine import precision
from nanoflow.engine.build import build_engine
from nanoflow.engine.precision import served_graph
from nanoflow.graph.graph import Fp8, OpGraph
from nanoflow.models import config_json as model_config
from nanoflow.models import dequantise, fp8
from nanoflow.models import weights as weights_module
from nanoflow.models.config_json import ModelError
from nanoflow.models.contents import read_contents
from nanoflow.models.fp8 import dequantised, quantise_rows
from nanoflow.models.fp8_stored import kept_as_stored
from nanoflow.models.quantised import Quantisation, quantisation_in
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import Weights, load_weights
from tests.driving import HuggingFace
from tests.families import make_model
from tests.logits import prompt_logits
from tests.quantisers import CASES, Case, groups_config, packed, write_twins

CPU = torch.device("cpu")
PROMPT = [number * 37 % 131 for number in range(40)]
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
GATE = "model.layers.1.mlp.gate_proj"
Tensors = dict[str, torch.Tensor]


def _make(folder: Path, case: Case, family: str = "llama2", **options: Any) -> Path:
    """A quantised model; returns the folder of its twin."""
    # The layers of a Gemma are listed one by one.
    sizes = {name: size for name, size in SIZES.items() if name != "num_hidden_layers" or family != "gemma3"}
    return write_twins(make_model(family, folder, **sizes), case, **options)


def _load(folder: Path) -> Weights:
    graph = build_graph(model_config.load(folder), None)
    return load_weights(graph, folder, torch.float32, CPU, show_progress=False)


def _are_alike(one: Weights, other: Weights) -> bool:
    groups = zip((one.shared, *one.layers), (other.shared, *other.layers), strict=True)
    return all(
        torch.allclose(first[name], second[name], rtol=1e-6, atol=0) for first, second in groups for name in first
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_numbers(name: str, tmp_path: Path) -> None:
    plain = prompt_logits(make_model("llama2", tmp_path / "plain", **SIZES), PROMPT)
    twin = _make(tmp_path, CASES[name])
    logits = prompt_logits(tmp_path, PROMPT)
    torch.testing.assert_close(logits, HuggingFace(twin).logits(PROMPT), rtol=2e-4, atol=2e-4)
    assert not torch.allclose(logits, plain, atol=1e-2)
    graph = build_graph(model_config.load(tmp_path), None)
    contents = read_contents(graph, tmp_path)
    assert contents.title == CASES[name].title
    assert contents.has_kv_scales == any("k_scale" in more for more in CASES[name].more)


@pytest.mark.parametrize("family", ["phi3", "qwen2", "gemma3"])
@pytest.mark.parametrize("name", ["gptq-4-order", "awq-32", "fp8-odd-block"])
def test_every_part_of_a_parameter_is_read(name: str, family: str, tmp_path: Path) -> None:
    """Fused projections, biases that are there, tied outputs, norms with an offset."""
    twin = _make(tmp_path, CASES[name], family)
    assert _are_alike(_load(tmp_path), _load(twin))


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.endswith(("order", "ordered", "zeros", "block", "-128"))]
)
def test_chunks_of_rows_make_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = _make(tmp_path, CASES[name])
    monkeypatch.setattr(dequantise, "_CHUNK_NUMBERS", 1)
    sizes: list[int] = []
    read = dequantise._READERS

    def noted(part: Any) -> Callable[..., torch.Tensor]:
        def read_noted(*args: Any) -> torch.Tensor:
            sizes.append(args[-1] - args[-2])
            return read[part](*args)

        return read_noted

    monkeypatch.setattr(dequantise, "_READERS", {part: noted(part) for part in read})
    assert _are_alike(_load(tmp_path), _load(twin))
    assert max(sizes) == 128 and len(sizes) > 14


class _Copier:
    """Copies at once, in the thread that it was made for."""

    def __init__(self, device: torch.device) -> None:
        self.thread = threading.get_ident()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert threading.get_ident() == self.thread and target.is_contiguous()
        target.view(-1).copy_(source.reshape(-1))

    def wait(self) -> None:
        """Nothing is queued."""


@pytest.mark.parametrize("name", ["awq-32", "compressed-int4-ordered"])
def test_several_threads_make_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = _make(tmp_path, CASES[name])
    monkeypatch.setattr(weights_module, "_MAPPED_BYTES", 1)
    graph = build_graph(model_config.load(tmp_path), None)
    loaded = load_weights(graph, tmp_path, torch.float32, CPU, show_progress=False, make_copier=_Copier)
    assert _are_alike(loaded, _load(twin))


def test_a_config_that_says_more_than_the_weights_do(tmp_path: Path) -> None:
    """All is stored in float32: nothing is said of another form."""
    make_model("llama2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert read_contents(build_graph(model_config.load(tmp_path), None), tmp_path).described("float32", 1) is None


def test_scales_in_another_file_are_found(tmp_path: Path) -> None:
    twin = _make(tmp_path, CASES["fp8-tensor"])
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-{1 + name.endswith('scale')}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert _are_alike(_load(tmp_path), _load(twin))


def test_modules_of_one_checkpoint_may_have_forms_of_their_own(tmp_path: Path) -> None:
    def mixed(weight: Any, generator: Any) -> Any:
        # Of the seven matrices only those of 256 rows have eight bits.
        return (packed(8, -1, sym=True) if len(weight) == 256 else packed(4, 32, sym=True))(weight, generator)

    weights = {"type": "int", "symmetric": True}
    config = groups_config("pack-quantized", {**weights, "num_bits": 4, "strategy": "group", "group_size": 32})
    large = {"targets": ["re:.*(gate|up)_proj"], "weights": {**weights, "num_bits": 8, "strategy": "channel"}}
    config["config_groups"] = {"large": large, **config["config_groups"]}
    twin = _make(tmp_path, Case(quantise=mixed, config=config, title="compressed-tensors int8 and int4"))
    assert _are_alike(_load(tmp_path), _load(twin))
    graph = build_graph(model_config.load(tmp_path), None)
    assert read_contents(graph, tmp_path).title == "compressed-tensors int8 and int4"


def test_biases_of_zeros_are_nothing_and_others_are_refused(tmp_path: Path) -> None:
    twin = _make(tmp_path, CASES["gptq-4-asym"], biases=True)
    assert _are_alike(_load(tmp_path), _load(twin))
    _change(tmp_path, {f"{GATE}.bias": torch.full((256,), 0.5)})
    _expect(tmp_path, f"has 1 tensor ({GATE}.bias) that LlamaForCausalLM")


def test_the_start_says_what_is_stored_and_what_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    _make(tmp_path, CASES["compressed-fp8-tensor"])
    with caplog.at_level(logging.INFO, "nanoflow"):
        config = EngineConfig(model=str(tmp_path), device="cpu", dtype="bfloat16", max_num_seqs=2)
        build_engine(config, show_progress=True).close()
    said = "weights are stored as compressed-tensors FP8 and served as bfloat16: 0.00 GiB"
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert f"{said}; scales of keys and values in it are not used; products in FP8 need a GPU from Hopper on" in lines
    assert said in capsys.readouterr().err


def _served(folder: Path, **options: Any) -> tuple[OpGraph, str | None]:
    graph = build_graph(model_config.load(folder), None)
    config = EngineConfig(model=str(folder), device="cpu", **options)
    return served_graph(config, graph, read_contents(graph, folder), torch.float32, CPU)


@pytest.mark.parametrize("name", [name for name in CASES if "fp8" in name or "fbgemm" in name or "modelopt" in name])
def test_what_is_stored_in_fp8_is_multiplied_as_it_is(name: str, tmp_path: Path) -> None:
    twin = _load(_make(tmp_path, CASES[name], "qwen2"))
    graph, line = _served(tmp_path, quantization="fp8")
    weights = load_weights(graph, tmp_path, torch.float32, CPU, show_progress=False)
    for kind, group, exact in zip(graph.layers, weights.layers, twin.layers, strict=True):
        for parameter in kind.parameters:
            numbers = group[parameter.name]
            if parameter.fp8 is not None:
                assert numbers.dtype == torch.float8_e4m3fn
                numbers = dequantised(numbers, group[parameter.scales_name], parameter.fp8.block)
            # Blocks of another size, or that do not end with q, k and v, are read and quantised anew.
            is_kept = parameter.fp8 is None or name != "fp8-odd-block"
            if "block" in name and parameter.name == "qkv_proj.weight":
                assert parameter.fp8 == Fp8()
                is_kept = False
            elif name in ("fp8-block", "compressed-fp8-block") and "proj.weight" in parameter.name:
                assert parameter.fp8 == Fp8(block=(128, 128))
            torch.testing.assert_close(
                numbers, exact[parameter.name], rtol=1e-6 if is_kept else 0.07, atol=1e-2 * (not is_kept)
            )
    assert line is not None and line.startswith(
        f"weights are stored as {CASES[name].title} and served as FP8 and float32"
    )
    assert ("those in it are not used" in line) == any(
        "input_scale" in more or "activation_scale" in more for more in CASES[name].more
    )


def test_other_forms_may_be_quantised_to_fp8(tmp_path: Path) -> None:
    twin = _load(_make(tmp_path, CASES["awq-32"]))
    graph, line = _served(tmp_path, quantization="fp8")
    weights = load_weights(graph, tmp_path, torch.float32, CPU, show_progress=False)
    numbers, scales = quantise_rows(twin.layers[1]["gate_up_proj.weight"])
    assert torch.equal(weights.layers[1]["gate_up_proj.weight"].view(torch.uint8), numbers.view(torch.uint8))
    assert torch.equal(weights.layers[1]["gate_up_proj.weight_scales"], scales[:, 0])
    assert line is not None and line.startswith("weights are stored as AWQ int4 and served as FP8 and float32")


@pytest.mark.parametrize("name", ["plain", "fp8-odd-block"])
def test_pieces_and_chunks_are_quantised_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = make_model("qwen2", tmp_path, **SIZES) if name == "plain" else _make(tmp_path, CASES[name], "qwen2")
    graph, _ = _served(tmp_path, quantization="fp8")
    whole = load_weights(graph, tmp_path, torch.float32, CPU, show_progress=False)
    monkeypatch.setattr(weights_module, "_MAPPED_BYTES", 50_000)
    monkeypatch.setattr(dequantise, "_CHUNK_NUMBERS", 1)
    monkeypatch.setattr(fp8, "_CHUNK_NUMBERS", 3_000)
    pieces = load_weights(graph, tmp_path, torch.float32, CPU, show_progress=False)
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        assert all(torch.equal(tensor.view(torch.uint8), other[each].view(torch.uint8)) for each, tensor in one.items())


def test_a_layer_that_is_not_stored_in_fp8_keeps_all_of_its_name_as_they_are(tmp_path: Path) -> None:
    twin = _make(tmp_path, CASES["fp8-tensor"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{GATE}.weight"] = load_file(twin / "model.safetensors")[f"{GATE}.weight"]
    del tensors[f"{GATE}.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    graph = build_graph(model_config.load(tmp_path), None)
    kept = kept_as_stored(graph, read_contents(graph, tmp_path))
    assert set(kept) == {"qkv_proj.weight", "o_proj.weight", "down_proj.weight"}


def test_a_device_with_products_in_fp8_keeps_what_is_stored_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_fp8", lambda device, dtype: True)
    _make(tmp_path, CASES["compressed-fp8-channel"])
    kept, line = _served(tmp_path)
    assert kept == _served(tmp_path, quantization="fp8")[0]
    assert line is not None and "served as FP8 and float32" in line
    graph, line = _served(tmp_path, quantization="none")
    assert graph == build_graph(model_config.load(tmp_path), None)
    assert line is not None and "served as float32" in line
    plain = make_model("llama2", tmp_path / "plain", **SIZES)
    assert _served(plain) == (build_graph(model_config.load(plain), None), None)


def test_without_a_gpu_fp8_is_asked_for(tmp_path: Path) -> None:
    _make(tmp_path, CASES["fp8-tensor"])
    for quantization in ("auto", "none"):
        graph, line = _served(tmp_path, quantization=quantization)
        assert not any(parameter.fp8 for kind in graph.kinds for parameter in kind.parameters)
        assert line is not None and line.endswith("Hopper on") == (quantization == "auto")
    plain = make_model("llama2", tmp_path / "plain", **SIZES)
    assert _served(plain) == (build_graph(model_config.load(plain), None), None)
    graph, line = _served(plain, quantization="fp8")
    assert line is not None and line.startswith("weights are quantised to FP8 (a scale for each row) where they can be")
    assert line.endswith(f"else float32: {graph.parameter_bytes(4) / 2**30:.2f} GiB")
    odd = make_model(
        "llama2", tmp_path / "odd", hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=3
    )
    with pytest.raises(ConfigError, match="no products of sizes that suit it"):
        _served(odd, quantization="fp8")


def _status_kib(name: str) -> int:
    """A size of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset")
def test_peak_memory_is_the_model_and_a_few_rows(tmp_path: Path) -> None:
    """The largest of the matrices has 6 million numbers, and would take 24 MiB whole, several times over."""

    def quickly(weight: Any, generator: Any) -> Any:
        rows, columns = weight.shape
        made = {
            "qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
            "qzeros": torch.zeros(columns // 128, rows // 8, dtype=torch.int32),
            "scales": torch.ones(columns // 128, rows, dtype=torch.float16),
        }
        return made, weight[:1, :1]

    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 1}
    write_twins(
        make_model("llama2", tmp_path, **sizes), Case(quantise=quickly, config=CASES["awq-128"].config, title="")
    )
    Path("/proc/self/clear_refs").write_text("5")
    before_kib = _status_kib("VmRSS")
    weights = _load(tmp_path)
    taken_kib, model_kib = _status_kib("VmHWM") - before_kib, weights.num_bytes // 1024
    # All rows at once would take 290 MiB more than the model. The mapped file counts too: 11 MiB.
    assert model_kib > 80 * 1024 and taken_kib < model_kib + 120 * 1024, (taken_kib, model_kib)


def _change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def _expect(folder: Path, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        _load(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fp8-tensor", {"weight_scale": None}, f"lacks 1 tensor ({GATE}.weight_scale) that LlamaForCausalLM"),
        ("fp8-block", {"weight_scale_inv": torch.ones(3, 1)}, "weight_scale_inv has shape (3, 1), expected (2, 1)"),
        ("fp8-tensor", {"weight_scale": torch.ones(2)}, "weight_scale has shape (2,), expected (256, 1)"),
        ("fp8-tensor", {"weight": torch.zeros(256, 128, dtype=torch.int8)}, "has type I8, expected F8_E4M3"),
        ("fp8-tensor", {"weight": torch.zeros(256, 128)}, f"has 1 tensor ({GATE}.weight_scale) that LlamaForCausalLM"),
        ("fp8-tensor", {"strange": torch.zeros(1)}, f"has 1 tensor ({GATE}.strange) that LlamaForCausalLM"),
        ("awq-32", {"scales": None}, f"lacks 1 tensor ({GATE}.scales) that LlamaForCausalLM"),
        (
            "awq-32",
            {"qweight": torch.zeros(128, 31, dtype=torch.int32)},
            "qweight has shape (128, 31), expected (128, 32)",
        ),
        ("awq-32", {"qweight": torch.zeros(128, 32)}, "qweight has type F32, expected I32"),
        ("gptq-4-order", {"g_idx": None}, f"lacks 1 tensor ({GATE}.g_idx)"),
        (
            "gptq-4-order",
            {"g_idx": torch.full((128,), 2, dtype=torch.int32)},
            "g_idx names groups that are not there, of 2",
        ),
        ("gptq-4-order", {"g_idx": torch.full((128,), -1, dtype=torch.int32)}, "g_idx names groups that are not there"),
        (
            "awq-32",
            {"scales": torch.full((4, 256), torch.inf).half()},
            "scales has scales that are infinite or no numb",
        ),
        ("fp8-tensor", {"weight_scale": torch.tensor(torch.nan)}, "weight_scale has scales that are infinite or no nu"),
        (
            "compressed-int8-channel",
            {"weight_scale": torch.ones(()), "weight_g_idx": torch.ones(128, dtype=torch.int32)},
            "weight_g_idx names groups that are not there, of 1",
        ),
        (
            "compressed-int4-group",
            {"weight_zero_point": torch.ones(32, 4, dtype=torch.int32)},
            f"has 1 tensor ({GATE}.weight_zero_point) that LlamaForCausalLM",
        ),
    ],
)
def test_damaged_tensors_are_one_line(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _make(tmp_path, CASES[name])
    _change(tmp_path, {f"{GATE}.{role}": tensor for role, tensor in changes.items()})
    _expect(tmp_path, message)


GROUP = CASES["compressed-int4-group"].config["config_groups"]["group_0"]
BLOCKS = CASES["compressed-fp8-block"].config["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("fp8-tensor", {"weight_block_size": [64, 64]}, "weight_scale has shape (), expected (2, 2) by config.json"),
        ("fp8-tensor", {"weight_block_size": [64]}, "must be a list of 2 positive numbers"),
        ("fp8-tensor", {"quant_method": "exl2"}, "weights quantised by EXL2 are not served, FP8, AWQ, GPTQ"),
        ("awq-32", {"group_size": 64}, "qzeros has shape (4, 16), expected (2, 16) by config.json"),
        ("awq-32", {"group_size": 0}, "field 'group_size' must be a positive integer, got 0"),
        ("awq-32", {"bits": 3}, "field 'bits' must be 4, as AWQ is served with 4 bits alone, got 3"),
        ("awq-32", {"version": "gemv"}, "field 'version' must be 'gemm', got 'gemv'"),
        ("awq-32", {"zero_point": False}, "field 'zero_point' must be true"),
        ("awq-32", {"rotation": "hadamard"}, "field 'rotation' is not known; remove it if it says nothing"),
        ("gptq-4-asym", {"bits": 3}, "field 'bits' must be 4 or 8, got 3"),
        ("gptq-4-asym", {"bits": 8}, "qweight has shape (16, 128), expected (32, 128) by config.json"),
        ("gptq-4-asym", {"checkpoint_format": "marlin"}, "must be gptq or gptq_v2, got 'marlin'"),
        ("gptq-4-asym", {"dynamic": {"+:.*up": {"bits": 8}}}, "field 'dynamic' must only leave modules out"),
        ("gptq-4-asym", {"desc_act": True}, "q_proj.g_idx, model.layers.0.self_attn.k_proj.g_idx"),
        ("modelopt", {"quant_algo": "NVFP4"}, "must be one of FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, got 'NVFP4'"),
        ("compressed-int4-group", {"config_groups": {}}, "field 'config_groups' is empty"),
        ("compressed-int4-group", {"format": "nvfp4-pack-quantized"}, "pack-quantized, got 'nvfp4-pack-quantized'"),
        ("compressed-int4-group", {"transform_config": {"R1": {}}}, "field 'transform_config' must be empty"),
        ("compressed-int4-group", {"sparsity_config": {"format": "sparse-24"}}, "'sparsity_config' must be empty"),
        ("compressed-int4-group", {"ignore": ["re:(" * 9]}, "which is no pattern"),
        ("compressed-int4-group", {"ignore": [GATE]}, f"lacks 1 tensor ({GATE}.weight)"),
        (
            "compressed-int4-group",
            {"config_groups": {"g": {**GROUP, "weights": {**GROUP["weights"], "num_bits": 2}}}},
            "field 'weights' has 2 bits of type 'int' as pack-quantized, which is not served",
        ),
    ],
)
def test_damaged_configs_are_one_line(name: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    _make(tmp_path, CASES[name])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(fields)
    (tmp_path / "config.json").write_text(json.dumps(config))
    _expect(tmp_path, message)


def _quantisation(name: str, fields: dict[str, Any]) -> Quantisation:
    found = quantisation_in({"quantization_config": {**CASES[name].config, **fields}}, origin="config.json")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("awq-32", {"format": "gemv"}, "field 'format' is 'gemv', but version is 'gemm': they must agree"),
        ("awq-32", {"version": None, "format": "gemv"}, "field 'format' must be 'gemm', got 'gemv'"),
        ("awq-32", {"backend": "llm-awq"}, "field 'backend' is 'llm-awq', which packs weights in another way"),
        ("gptq-4-asym", {"format": "gptq_v2"}, "field 'format' is 'gptq_v2', but checkpoint_format is 'gptq'"),
        ("gptq-4-asym", {"is_marlin_format": True}, "field 'is_marlin_format' must be false"),
        ("gptq-4-asym", {"group_size": None}, "field 'group_size' is missing"),
        (
            "compressed-fp8-block",
            {"config_groups": {"g": {**GROUP, "weights": {**BLOCKS, "block_structure": [0.5, 128]}}}},
            "field 'block_structure' must be two whole numbers, got (0.5, 128.0)",
        ),
        # bitsandbytes once named itself by this alone.
        ("gptq-4-asym", {"quant_method": None, "load_in_4bit": True}, "quantised by BITSANDBYTES (4 bits) are not"),
    ],
)
def test_configs_that_cannot_be_read_are_one_line(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        _quantisation(name, fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gptq-4-v2", {"checkpoint_format": None, "format": "GPTQ_v2"}),
        ("gptq-4-v2", {"format": "gptq_v2"}),
        # What GPTQModel and transformers 5 write of AWQ.
        ("awq-32", {"format": "gemm", "checkpoint_format": "gemm", "desc_act": True, "lm_head": False, "sym": True}),
        ("awq-32", {"damp_percent": 0.1, "batch_size": 1, "true_sequential": True, "dynamic": {"-:.*lm_head": {}}}),
    ],
)
def test_fields_that_several_tools_write(name: str, fields: dict[str, Any]) -> None:
    assert _quantisation(name, fields).form_of("x") == _quantisation(name, {}).form_of("x")


@pytest.mark.parametrize("name", ["gptq-4-asym", "fp8-tensor"])
def test_weights_of_which_no_file_says_how_they_are_quantised(name: str, tmp_path: Path) -> None:
    twin = _make(tmp_path, CASES[name])
    (tmp_path / "config.json").write_bytes((twin / "config.json").read_bytes())
    _expect(tmp_path, ": they are quantised, but config.json has no quantization_config")


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("bitsandbytes", "in transformers call dequantize() and save_pretrained()"),
        *((method, "use the original model, or one in these forms") for method in ("hqq", "aqlm", "quark", "torchao")),
    ],
)
def test_other_methods_are_refused_by_name(method: str, advice: str, tmp_path: Path) -> None:
    make_model("llama2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    _expect(tmp_path, f"weights quantised by {method.upper()} are not served, FP8, AWQ")
    _expect(tmp_path, advice)


@pytest.mark.parametrize("name", ["awq-128", "gptq-4-sym"])
def test_rows_that_fill_no_word_are_refused(name: str, tmp_path: Path) -> None:
    write_twins(make_model("llama2", tmp_path, **{**SIZES, "intermediate_size": 260}), CASES[name])
    _expect_problem(tmp_path, "is no multiple of 8, the numbers in a word")


def _expect_problem(folder: Path, message: str) -> None:
    """As `_expect`, of an error about sizes, which names no file."""
    with pytest.raises(ModelError, match=message):
        _load(folder)
