"""GGUF files of every served architecture and type give the logits of their numbers; damaged ones are one line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.cli.main import main
from nanoflow.config import EngineConfig
from nanoflow.engine.tier_memory import fingerprint_of
from nanoflow.models import config_json, dequantise
from nanoflow.models.config_json import ModelError
from nanoflow.models.contents import read_contents
from nanoflow.models.ggml import rows_of_blocks
from nanoflow.models.gguf_file import TYPES, read_gguf
from nanoflow.models.gguf_model import gguf_config
from nanoflow.models.locate import locate_model
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import check_weights, load_weights
from tests.driving import HuggingFace
from tests.families import FAMILIES, make_model
from tests.gguf_files import write_gguf
from tests.logits import prompt_logits

PROMPT = [number * 37 % 131 for number in range(60)]
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A family as a GGUF file.

    Attributes:
        kind: Its type in llama.cpp.
        metadata: What its file says beyond the sizes.
        changes: Options of the model.
        divisors: Names of tensors that hold divisors of frequencies, and their values.
    """

    kind: str = "llama"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    divisors: Mapping[str, Any] = field(default_factory=dict)


def _llama3_divisors() -> list[float]:
    """As llama.cpp's converter computes them for the family's embedding."""
    frequencies = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    lengths, low, high = 2 * np.pi / frequencies, 64 / 1.0, 64 / 4.0
    smooth = (64 / lengths - 1.0) / 3.0
    between = 1 / ((1 - smooth) / 8.0 + smooth)
    return [float(v) for v in np.where(lengths < high, 1.0, np.where(lengths > low, 8.0, between))]


_PHI_ROPE = FAMILIES["phi4-mini"].options["rope_parameters"]
CASES: Mapping[str, Case] = {
    "llama2": Case(),
    "deepseek": Case(),
    "llama-bias": Case(changes={"mlp_bias": False}),
    "llama3": Case(divisors={"rope_freqs.weight": _llama3_divisors()}),
    "llama-linear-rope": Case(metadata={".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0}),
    "llama-yarn": Case(
        metadata={
            ".rope.scaling.type": "yarn",
            ".rope.scaling.factor": 4.0,
            ".rope.scaling.original_context_length": 64,
        }
    ),
    "qwen2": Case(kind="qwen2"),
    "qwen3": Case(kind="qwen3"),
    "gemma3": Case(
        kind="gemma3",
        metadata={
            ".attention.sliding_window": 24,
            ".attention.sliding_window_pattern": 3,
            ".rope.freq_base_swa": 100.0,
            ".rope.scaling.type": "linear",
            ".rope.scaling.factor": 4.0,
        },
        changes={"query_pre_attn_scalar": 24},
    ),
    "phi3": Case(kind="phi3", metadata={".attention.sliding_window": 24}),
    "phi4-mini": Case(
        kind="phi3",
        metadata={".rope.scaling.original_context_length": 1024, ".rope.dimension_count": 12},
        divisors={f"rope_factors_{name}.weight": _PHI_ROPE[f"{name}_factor"] for name in ("short", "long")},
    ),
}


def _write(folder: Path, family: str, dtype: str = "F32", *, tied: bool = False, **changes: Any) -> Path:
    case = CASES[family]
    make_model(family, folder, tied=tied, **{**case.changes, **changes})
    divisors = {name: np.array(values, np.float32) for name, values in case.divisors.items()}
    return write_gguf(folder, folder / "model.gguf", case.kind, dtype, metadata=case.metadata, tensors=divisors)


@pytest.mark.parametrize("family", CASES)
def test_logits_of_every_architecture(family: str, tmp_path: Path) -> None:
    file = _write(tmp_path, family, tied=family in ("gemma3", "llama2"))
    expected = HuggingFace(tmp_path / "twin").logits(PROMPT)
    torch.testing.assert_close(prompt_logits(file, PROMPT), expected, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("dtype", TYPES)
def test_logits_of_every_type(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _write(tmp_path, "llama2", dtype, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    expected = HuggingFace(tmp_path / "twin").logits(PROMPT)
    for chunk in (2**20, 1):
        monkeypatch.setattr(dequantise, "_CHUNK_NUMBERS", chunk)
        torch.testing.assert_close(prompt_logits(file, PROMPT), expected, rtol=3e-4, atol=3e-4)
    config = config_json.load(file)
    contents = read_contents(build_graph(config, None), file)
    assert contents.title == f"GGUF {dtype}"
    assert config.dtype == {"F32": "float32", "F16": "float16"}.get(dtype, "bfloat16")


@pytest.mark.parametrize("dtype", [name for name in TYPES if name not in ("F32", "F16", "BF16")])
def test_numbers_of_every_block(dtype: str) -> None:
    """Against the `gguf` package, for bytes of any values."""
    generator = np.random.default_rng(1)
    raw = generator.integers(0, 256, (5, 3 * TYPES[dtype].num_bytes), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType[dtype]
    assert gguf.GGML_QUANT_SIZES[kind] == (TYPES[dtype].num_numbers, TYPES[dtype].num_bytes)
    assert int(kind) == TYPES[dtype].number
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
    np.testing.assert_allclose(rows_of_blocks(torch.from_numpy(raw), dtype).numpy(), expected, rtol=1e-6)


def test_a_model_is_found_by_what_its_file_begins_with(tmp_path: Path) -> None:
    file = _write(tmp_path, "llama2").rename(tmp_path / "blob")
    assert locate_model(str(file)) == file
    config = config_json.load(file)
    assert config.rms_norm_eps == 1e-5 and config.eos_token_ids == (2,)
    assert not config.tie_word_embeddings


def test_what_llama_cpp_has_in_its_code_of_gemma(tmp_path: Path) -> None:
    """Five layers of six have a window; scores are scaled by the size of heads, in the largest model by another."""
    layers: dict[str, Any] = {"num_hidden_layers": 62, "layer_types": None, "hidden_size": 32, "intermediate_size": 32}
    for number, changes in enumerate((dict[str, Any](), layers)):
        folder = make_model("gemma3", tmp_path / str(number), **changes)
        file = write_gguf(folder, folder / "model.gguf", "gemma3", metadata={".attention.sliding_window": 24})
        config = config_json.load(file)
        windows = [None if layer % 6 == 5 else 24 for layer in range(config.num_layers)]
        assert list(config.layer_windows) == windows
        assert config.local_rope is not None and config.local_rope.theta == 10000.0
        assert config.fields.positive("query_pre_attn_scalar") == (8 if changes else 24)


def test_tokens_that_end_a_turn_end_completions(tmp_path: Path) -> None:
    """By the ids that the file gives, and by their names if they are control tokens."""
    tokens = [f"t{number}" for number in range(131)]
    tokens[9], tokens[11], tokens[12] = "<|im_end|>", "<|eot_id|>", "<|end|>"
    kinds = [3 if number in (9, 11) else 1 for number in range(131)]
    ids = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 999}
    file = _other(tmp_path, {**ids, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds})
    assert config_json.load(file).eos_token_ids == (5, 7, 9, 11)


def test_pages_are_kept_for_this_file_alone(tmp_path: Path) -> None:
    def fingerprint(file: Path) -> str:
        return fingerprint_of(file, EngineConfig(model=str(file)), name="llama", device="cpu", dtype="float32")

    file = _other(tmp_path, {})
    before = fingerprint(file)
    assert before == fingerprint(file)
    file.write_bytes(file.read_bytes() + b"\0")
    assert fingerprint(file) != before


def _other(folder: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> Path:
    make_model("llama2", folder)
    return write_gguf(folder, folder / "model.gguf", "llama", metadata=metadata, tensors=tensors)


def _expect(file: Path, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        graph = build_graph(config_json.load(file), None)
        load_weights(graph, file, torch.float32, CPU, show_progress=False)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({".block_count": None}, "llama: field 'block_count' is missing"),
        ({".attention.head_count": [4, 4]}, "field 'attention.head_count' must be a positive integer, got [4, 4]"),
        ({".expert_count": 8}, "'llama.expert_count' is 8: this kind of llama model is not read from GGUF"),
        ({".attention.scale": 0.5}, "'llama.attention.scale' is 0.5: this kind of llama model is not read from GGUF"),
        ({".attention.causal": False}, "only causal attention is served"),
        ({".rope.scaling.type": "longrope"}, "must be none, linear or yarn, got 'longrope'"),
        ({".rope.scaling.factor": 0.0}, "field 'rope.scaling.factor' must be a positive number, got 0.0"),
        ({".rope.scaling.attn_factor": 0.5}, "field 'rope.scaling.attn_factor' must be 1"),
        ({".rope.dimension_count": 8}, "field 'rope.dimension_count' must be the size of a head, 16, got 8"),
        ({"general.type": "adapter"}, "is of type 'adapter', no model"),
        ({"split.count": 2}, "join them with llama-gguf-split --merge"),
        ({"general.alignment": 0}, "is cut short or no GGUF file; download it again (general.alignment is 0)"),
        ({".block_count": 4}, "lacks 9 tensors (model.layers.3.input_layernorm.weight"),
        ({".feed_forward_length": 64}, "gate_proj.weight has shape (96, 64), expected (64, 64) by its metadata"),
    ],
)
def test_metadata_that_cannot_be_served_are_one_line(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    _expect(_other(tmp_path, metadata), message)


def test_tensors_that_have_no_place_are_named(tmp_path: Path) -> None:
    file = _other(tmp_path, {}, {"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    _expect(file, "has 1 tensor (blk.0.attn_sinks.weight) that LlamaForCausalLM")


def test_other_types_and_versions_are_refused_by_name(tmp_path: Path) -> None:
    file = _other(tmp_path, {}, {"blk.0.x.weight": np.ones((1, 256), np.float32)})
    data = file.read_bytes()
    place = data.index(b"blk.0.x.weight") + len(b"blk.0.x.weight") + 4 + 16
    for number, name in ((23, "IQ4_XS"), (39, "MXFP4"), (99, "number 99")):
        file.write_bytes(data[:place] + number.to_bytes(4, "little") + data[place + 4 :])
        _expect(file, f"blk.0.x.weight has type {name}, which is not read; take a file with F32, F16")
    file.write_bytes(data[:4] + (1).to_bytes(4, "little") + data[8:])
    _expect(file, "GGUF version 1 is not read")
    file.write_bytes(data[:4] + (3).to_bytes(4, "big") + data[8:])
    _expect(file, "its numbers are big-endian")


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    file = _other(tmp_path, {})
    file.write_bytes(file.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(ModelError, match="model_type 'gemma' is not known"):
        config_json.load(file)
    file.write_bytes(
        file.read_bytes().replace((5).to_bytes(8, "little") + b"gemma", (7).to_bytes(8, "little") + b"gpt-oss")
    )
    with pytest.raises(ModelError, match="is of type 'gpt-oss', which is not read from GGUF: take the model"):
        config_json.load(file)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="is neither a file nor a folder"):
        locate_model(str(tmp_path / "pipe"))


def test_a_factor_without_a_type_scales_as_in_llama_cpp(tmp_path: Path) -> None:
    file = _other(tmp_path, {".rope.scaling.factor": 4.0, "tokenizer.ggml.tokens": 5})
    assert gguf_config(file)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(ModelError, match=r"must be none beside rope_freqs.weight, got 'linear'"):
        divisors = {"rope_freqs.weight": np.ones(8, np.float32)}
        gguf_config(_other(tmp_path / "both", {".rope.scaling.factor": 4.0}, divisors))


def test_a_file_that_is_cut_short_is_one_line_wherever_it_is_cut(tmp_path: Path) -> None:
    file = _other(tmp_path, {})
    data = file.read_bytes()
    for size in (4, 8, 20, 24, 100, 300, 1000, 3000, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        _expect(file, f"{file} is cut short or no GGUF file; download it again (")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("small")
    file = _write(folder, "llama2", num_hidden_layers=1)
    return file, file.read_bytes()


@settings(deadline=None, max_examples=150)
@given(changes=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_changed_anywhere_in_the_header(changes: list[tuple[int, int]], small: tuple[Path, bytes]) -> None:
    """The file is read, or refused in one line, in little memory."""
    file, data = small
    changed = bytearray(data)
    for place, value in changes:
        changed[place] = value
    other = file.parent / "changed.gguf"
    other.write_bytes(changed)
    try:
        read_gguf(other)
        if bytes(changed[:4]) == b"GGUF":
            check_weights(build_graph(config_json.load(other), None), other)
    except ModelError as error:
        assert "\n" not in str(error)


def test_commands_take_a_file_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _write(tmp_path, "llama2")
    assert main(["analyze", str(file), "--gpu", "h200"]) == 0
    estimate = ["--estimate", "h200", "--max-batch-tokens", "256"]
    assert main(["profile", str(file), "-o", str(tmp_path / "profile.json"), *estimate]) == 0
    assert json.loads((tmp_path / "profile.json").read_text())
    assert main(["generate", "x", "--model", str(file), "--device", "cpu"]) == 1
    assert "field 'model' is missing" in capsys.readouterr().err
