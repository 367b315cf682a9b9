"""Writes the experts of a gpt-oss in MXFP4, by the definition of the OCP Microscaling Formats, version 1.0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

GROUP = 32
# As the published checkpoints have it.
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
Array = NDArray[Any]


def number_of(code: int) -> float:
    """The number of a code of 4 bits: a sign, two bits of exponent whose bias is 1, one bit of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return -size if sign else size


def quantise(matrices: Array) -> tuple[Array, Array, Array]:
    """Codes two a byte, scales, and the numbers that they stand for.

    Args:
        matrices: [experts, rows, columns]; columns are a multiple of 32.

    Returns:
        uint8 [experts, rows, columns / 32, 16], uint8 [experts, rows, columns / 32], and float32 of the shape of
        `matrices`.
    """
    groups = matrices.reshape(*matrices.shape[:-1], -1, GROUP)
    # The largest number is at least 4 and less than 8 times the scale; 6 is the most that a code says.
    exponents = np.floor(np.log2(np.abs(groups).max(-1))) - 2
    numbers = np.array([number_of(code) for code in range(16)])
    scaled = groups / 2.0 ** exponents[..., None]
    codes = np.abs(scaled[..., None] - numbers).argmin(-1).astype(np.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    meant = numbers[codes] * 2.0 ** exponents[..., None]
    return blocks, (exponents + 127).astype(np.uint8), meant.reshape(matrices.shape).astype(np.float32)


def write_twins(folder: Path) -> Path:
    """Quantise the experts of a model in float32 in place, and write the model of the same numbers to a folder in it.

    Returns:
        `folder / "twin"`.
    """
    tensors, twins = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = twins[name] = tensor
            continue
        # Plain matrices are stored transposed, codes are not.
        blocks, scales, meant = quantise(tensor.transpose(1, 2).contiguous().numpy())
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = torch.from_numpy(blocks), torch.from_numpy(scales)
        twins[name] = torch.from_numpy(meant).transpose(1, 2).contiguous()
    twin = folder / "twin"
    twin.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config))
    save_file(twins, twin / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return twin
