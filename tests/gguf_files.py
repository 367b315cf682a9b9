"""Writes tiny models as GGUF files with the `gguf` package, as llama.cpp's converter would, for tests.

The package knows the names of tensors, the layout of the file and how numbers are quantised; what the converter does to
weights beyond that (rows of rotated heads in pairs, norms of Gemma) is done here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Array = NDArray[Any]
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
# Bytes of a block of these types that are scales in float16; the package cannot quantise to them.
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def write_gguf(
    folder: Path,
    file: Path,
    kind: str,
    dtype: str = "F32",
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array] | None = None,
) -> Path:
    """Write a model to a GGUF file, and the model of the same numbers to `folder / "twin"`.

    Args:
        folder: A model in float32.
        file: The file to write.
        kind: Its type in llama.cpp.
        dtype: Type of its matrices.
        metadata: Further values, or other ones; without the name of the type if a key begins with a point.
        tensors: Further tensors.
    """
    config = json.loads((folder / "config.json").read_text())
    names = gguf.get_tensor_name_map(_ARCHITECTURES[kind], config["num_hidden_layers"])
    generator = np.random.default_rng(3)
    written: dict[str, tuple[Array, str]] = {}
    twins = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy().astype(np.float32)
        raw, numbers, of_type = _quantised(values, dtype if tensor.dim() == 2 else "F32", generator)
        twins[name] = torch.from_numpy(numbers.copy())
        if kind == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            num_heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            raw = _in_pairs(raw, num_heads)
        if kind == "gemma3" and name.endswith("norm.weight"):
            raw = raw + np.float32(1.0)
        written[str(names.get_name(name, try_suffixes=(".weight", ".bias")))] = raw, of_type
    twin = folder / "twin"
    twin.mkdir()
    (twin / "config.json").write_text(json.dumps(config))
    save_file(twins, twin / "model.safetensors", metadata={"format": "pt"})
    written.update({name: (values, "F32") for name, values in (tensors or {}).items()})
    _write(file, kind, {**_metadata(config), **(metadata or {})}, written)
    return file


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        ".block_count": config["num_hidden_layers"],
        ".context_length": config["max_position_embeddings"],
        ".embedding_length": config["hidden_size"],
        ".feed_forward_length": config["intermediate_size"],
        ".attention.head_count": config["num_attention_heads"],
        ".attention.head_count_kv": config["num_key_value_heads"],
        ".attention.key_length": head_dim,
        ".attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        ".rope.freq_base": 10000.0,
        ".rope.dimension_count": head_dim,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _quantised(values: Array, dtype: str, generator: np.random.Generator) -> tuple[Array, Array, str]:
    """What is stored, the numbers that it stands for, and its type."""
    kind = gguf.GGMLQuantizationType[dtype]
    if dtype == "F32":
        return values, values, dtype
    if dtype not in _SCALES:
        raw = gguf.quants.quantize(values, kind)
        return raw, gguf.quants.dequantize(raw, kind), dtype
    # Random bytes are valid numbers of these types, if their scales are small.
    num_numbers, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (values.size // num_numbers, num_bytes)).astype(np.uint8)
    for start in _SCALES[dtype]:
        scales = generator.uniform(1e-4, 4e-4, (len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    raw = blocks.reshape(len(values), -1)
    return raw, gguf.quants.dequantize(raw, kind), dtype


def _in_pairs(rows: Array, num_heads: int) -> Array:
    """Rows i and i + half of each head beside each other."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _write(file: Path, kind: str, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Array, str]]) -> None:
    writer = gguf.GGUFWriter(file, kind)
    for key, value in metadata.items():
        name = f"{kind}{key}" if key.startswith(".") else key
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, (values, dtype) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=gguf.GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer_metadata(
    tokens: Sequence[str], kinds: Sequence[int], *, model: str, template: str | None = None, **more: Any
) -> dict[str, Any]:
    """The metadata of a tokenizer; further ones without their prefix."""
    values = {"model": model, "tokens": list(tokens), "token_type": list(kinds), **more}
    found = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    return found if template is None else {**found, "tokenizer.chat_template": template}
