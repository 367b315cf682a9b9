"""Quantises tiny models into the forms of other tools, in plain numpy: a twin of what the engine reads, the other way.

A quantiser returns the tensors of a form and the numbers that they stand for by the format's definition, which it knows
before it packs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Array = NDArray[Any]
# The tensors of a module by the last part of their names, and the matrix that they stand for.
Made = tuple[dict[str, torch.Tensor], Array]
Quantiser = Callable[[Array, np.random.Generator], Made]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A form.

    Attributes:
        quantise: Makes the tensors of one matrix.
        config: The field `quantization_config`, or the content of `file`.
        title: How the engine calls it.
        file: Where `config` is, if not in config.json.
        more: Further tensors in every attention block, by name.
    """

    quantise: Quantiser
    config: Mapping[str, Any]
    title: str
    file: str | None = None
    more: tuple[str, ...] = field(default=())


def write_twins(folder: Path, case: Case, *, biases: bool = False) -> Path:
    """Quantise every projection of a model in place, and write the model of the same numbers to `folder / "twin"`.

    Args:
        folder: A model in float32.
        case: The form.
        biases: Whether every quantised module gets a bias of zeros.
    """
    generator = np.random.default_rng(5)
    tensors, twins = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = twins[name] = tensor
            continue
        module = name.removesuffix(".weight")
        made, numbers = case.quantise(tensor.numpy(), generator)
        tensors.update({f"{module}.{role}": value for role, value in made.items()})
        twins[name] = torch.from_numpy(numbers.astype(np.float32).copy())
        if biases:
            tensors[f"{module}.bias"] = torch.zeros(len(tensor), dtype=torch.float16)
        if name.endswith("q_proj.weight"):
            attention = module.removesuffix(".q_proj")
            tensors.update({f"{attention}.{more}": torch.ones(()) for more in case.more})
    twin = folder / "twin"
    twin.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config))
    save_file(twins, twin / "model.safetensors", metadata={"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if case.file is None:
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(case.config)}))
    else:
        (folder / case.file).write_text(json.dumps(dict(case.config)))
    return twin


def fp8(scale_name: str, granularity: str | tuple[int, int], shape: tuple[int, ...] | None = None) -> Quantiser:
    """8-bit floating-point numbers and a scale of the tensor, of each row ("channel"), or of blocks."""

    def quantise(weight: Array, generator: np.random.Generator) -> Made:
        rows, columns = weight.shape
        height, width = {"tensor": (rows, columns), "channel": (1, columns)}.get(granularity, granularity)  # type: ignore[arg-type]
        scales = np.zeros((-(-rows // height), -(-columns // width)), np.float32)
        numbers, stored = np.zeros_like(weight), torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
                scales[i, j] = np.abs(weight[place]).max() / 448 * generator.uniform(1.0, 2.0)
                small = torch.from_numpy(weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
                stored[place], numbers[place] = small, small.float().numpy() * scales[i, j]
        scale = torch.from_numpy(scales)
        return {"weight": stored, scale_name: scale if shape is None else scale.reshape(shape)}, numbers

    return quantise


def int8(*, has_zeros: bool) -> Quantiser:
    """Whole numbers of 8 bits, a scale of each row and perhaps a zero point."""

    def quantise(weight: Array, generator: np.random.Generator) -> Made:
        scales = (np.abs(weight).max(1, keepdims=True) / 60).astype(np.float32)
        zeros = generator.integers(-50, 50, (len(weight), 1)) if has_zeros else np.zeros((len(weight), 1), int)
        numbers = np.round(weight / scales) + zeros
        made = {"weight": torch.from_numpy(numbers.astype(np.int8)), "weight_scale": torch.from_numpy(scales)}
        if has_zeros:
            made["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
        return made, (numbers - zeros) * scales

    return quantise


def awq(group_size: int) -> Quantiser:
    """AWQ's version gemm."""

    def quantise(weight: Array, generator: np.random.Generator) -> Made:
        numbers, zeros, scales, groups = _grouped(weight, 4, _columns(weight, group_size), generator, has_zeros=True)
        words = _packed(numbers.T, 4, 1, order=_AWQ_ORDER)
        made = {"qweight": words, "qzeros": _packed(zeros.T, 4, 1, order=_AWQ_ORDER), "scales": _half(scales.T)}
        return made, (numbers - zeros[:, groups]) * scales[:, groups]

    return quantise


def gptq(
    bits: int, group_size: int, *, sym: bool, desc_act: bool, version: int = 1, has_index: bool = True
) -> Quantiser:
    """GPTQ's first or second version; with `desc_act` columns are in groups at random."""

    def quantise(weight: Array, generator: np.random.Generator) -> Made:
        groups = _columns(weight, group_size)
        groups = generator.permutation(groups) if desc_act else groups
        numbers, zeros, scales, groups = _grouped(weight, bits, groups, generator, has_zeros=not sym)
        stored_zeros = zeros if version == 2 else (zeros - 1) % 2**bits
        made = {
            "qweight": _packed(numbers.T, bits, 0),
            "qzeros": _packed(stored_zeros.T, bits, 1),
            "scales": _half(scales.T),
        }
        if has_index:
            made["g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return made, (numbers - zeros[:, groups]) * scales[:, groups]

    return quantise


def packed(bits: int, group_size: int, *, sym: bool, ordered: bool = False) -> Quantiser:
    """The form pack-quantized of compressed-tensors."""

    def quantise(weight: Array, generator: np.random.Generator) -> Made:
        groups = _columns(weight, group_size)
        groups = generator.permutation(groups) if ordered else groups
        numbers, zeros, scales, groups = _grouped(weight, bits, groups, generator, has_zeros=not sym)
        made = {
            "weight_packed": _packed(numbers, bits, 1),
            "weight_scale": _half(scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not sym:
            made["weight_zero_point"] = _packed(zeros, bits, 0)
        if ordered:
            made["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return made, (numbers - zeros[:, groups]) * scales[:, groups]

    return quantise


def _columns(weight: Array, group_size: int) -> Array:
    """The group of each column; -1 is one group of all."""
    columns = np.arange(weight.shape[1])
    return columns // group_size if group_size > 0 else 0 * columns


def _grouped(
    weight: Array, bits: int, groups: Array, generator: np.random.Generator, *, has_zeros: bool
) -> tuple[Array, Array, Array, Array]:
    """Unsigned numbers [rows, columns], zero points and scales [rows, groups] of a matrix, and the groups."""
    num_groups, most = int(groups.max()) + 1, 2**bits - 1
    scales = np.zeros((len(weight), num_groups), np.float16)
    for group in range(num_groups):
        scales[:, group] = 2 * np.abs(weight[:, groups == group]).max(1) / most
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if has_zeros:
        zeros = generator.integers(0, most + 1, scales.shape)
    wide = scales.astype(np.float32)
    numbers = np.clip(np.round(weight / wide[:, groups]) + zeros[:, groups], 0, most).astype(np.int64)
    return numbers, zeros, wide, groups


def _packed(numbers: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Numbers along an axis in words of 32 bits: the number at `order[i]` of each word's is at bit `i * bits`."""
    per_word = 32 // bits
    lines = numbers if axis == 1 else numbers.T
    words = np.zeros((len(lines), -(-lines.shape[1] // per_word)), np.uint32)
    for column in range(lines.shape[1]):
        place = column % per_word
        shift = bits * (place if order is None else order.index(place))
        words[:, column // per_word] |= (lines[:, column].astype(np.uint32) << np.uint32(shift)).astype(np.uint32)
    words = words if axis == 1 else words.T
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def _half(scales: Array) -> torch.Tensor:
    return torch.from_numpy(scales.astype(np.float16).copy())


def groups_config(form: str, weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {"format": "dense"},
        **more,
    }


def _gptq_case(bits: int, group_size: int, *, sym: bool, desc_act: bool, version: int = 1) -> Case:
    return Case(
        quantise=gptq(bits, group_size, sym=sym, desc_act=desc_act, version=version, has_index=desc_act or sym),
        config={
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": desc_act,
            "sym": sym,
            "damp_percent": 0.01,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
            "dynamic": {"-:.*lm_head": {}},
        },
        title=f"GPTQ int{bits}",
    )


_FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "observer": "minmax"}
_INT = {"type": "int", "dynamic": False}
_AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}

CASES: Mapping[str, Case] = {
    "fp8-tensor": Case(
        quantise=fp8("weight_scale", "tensor", ()),
        config={"quant_method": "fp8", "activation_scheme": "static"},
        title="FP8",
        more=("q_proj.input_scale", "k_scale", "v_scale"),
    ),
    "fp8-tensor-inverse": Case(
        quantise=fp8("weight_scale_inv", "tensor", (1,)),
        config={"quant_method": "fp8", "weight_block_size": None},
        title="FP8",
        more=("o_proj.activation_scale",),
    ),
    "fp8-block": Case(
        quantise=fp8("weight_scale_inv", (128, 128)),
        config={"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
        title="FP8",
    ),
    "fp8-odd-block": Case(
        quantise=fp8("weight_scale_inv", (48, 80)),
        config={"quant_method": "fp8", "weight_block_size": [48, 80]},
        title="FP8",
    ),
    "fbgemm": Case(
        quantise=fp8("weight_scale", "channel"),
        config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        title="FP8",
        more=("q_proj.input_scale_ub",),
    ),
    "modelopt": Case(
        quantise=fp8("weight_scale", "tensor", ()),
        config={"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "x"}},
        title="ModelOpt FP8",
        more=("k_proj.k_scale", "v_proj.v_scale", "q_proj.input_scale"),
    ),
    "modelopt-file": Case(
        quantise=fp8("weight_scale", "tensor", ()), config=_MODELOPT, title="ModelOpt FP8", file="hf_quant_config.json"
    ),
    "compressed-fp8-tensor": Case(
        quantise=fp8("weight_scale", "tensor", (1,)),
        config=groups_config("float-quantized", {**_FLOAT, "strategy": "tensor"}, kv_cache_scheme={"num_bits": 8}),
        title="compressed-tensors FP8",
        more=("k_scale", "v_scale", "q_proj.input_scale"),
    ),
    "compressed-fp8-channel": Case(
        quantise=fp8("weight_scale", "channel"),
        config=groups_config("float-quantized", {**_FLOAT, "strategy": "channel"}, ignore=["re:.*lm_head"]),
        title="compressed-tensors FP8",
    ),
    "compressed-fp8-block": Case(
        quantise=fp8("weight_scale", (128, 128)),
        config=groups_config("float-quantized", {**_FLOAT, "strategy": "block", "block_structure": [128, 128]}),
        title="compressed-tensors FP8",
    ),
    "compressed-int8": Case(
        quantise=int8(has_zeros=False),
        config=groups_config("int-quantized", {**_INT, "num_bits": 8, "strategy": "channel", "symmetric": True}),
        title="compressed-tensors int8",
    ),
    "compressed-int8-zeros": Case(
        quantise=int8(has_zeros=True),
        config=groups_config("int-quantized", {**_INT, "num_bits": 8, "strategy": "channel", "symmetric": False}),
        title="compressed-tensors int8",
    ),
    **{
        f"compressed-int{bits}-{name}": Case(
            quantise=packed(bits, size, sym=sym, ordered=ordered),
            config=groups_config(
                "pack-quantized",
                {
                    **_INT,
                    "num_bits": bits,
                    "strategy": "channel" if size < 0 else "group",
                    "group_size": None if size < 0 else size,
                    "symmetric": sym,
                    "actorder": "group" if ordered else None,
                },
            ),
            title=f"compressed-tensors int{bits}",
        )
        for name, bits, size, sym, ordered in (
            ("group", 4, 32, True, False),
            ("zeros", 4, 64, False, False),
            ("ordered", 4, 32, False, True),
            ("channel", 8, -1, True, False),
            ("channel-zeros", 8, -1, False, False),
        )
    },
    **{
        f"awq-{size}": Case(quantise=awq(size), config={**_AWQ_CONFIG, "group_size": size}, title="AWQ int4")
        for size in (32, 128, -1)
    },
    "awq-file": Case(
        quantise=awq(64),
        config={"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
        title="AWQ int4",
        file="quant_config.json",
    ),
    "gptq-4-sym": _gptq_case(4, 128, sym=True, desc_act=False),
    "gptq-4-asym": _gptq_case(4, 32, sym=False, desc_act=False),
    "gptq-4-order": _gptq_case(4, 64, sym=False, desc_act=True),
    "gptq-4-v2": _gptq_case(4, 32, sym=False, desc_act=True, version=2),
    "gptq-4-row": _gptq_case(4, -1, sym=False, desc_act=False),
    "gptq-8": _gptq_case(8, 32, sym=True, desc_act=True),
    "gptq-8-asym": _gptq_case(8, 64, sym=False, desc_act=False, version=2),
}
