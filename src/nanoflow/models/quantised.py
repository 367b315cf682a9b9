"""Reads how the weights of a checkpoint are quantised: from config.json, or from the file that older tools write.

It knows the methods, their fields, and which form (`stored.py`) each gives a module. A method or a field that it does
not know is refused by name, since a wrong guess would give wrong weights in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.models.fields import Fields, ModelError, is_there, read_object, shown
from nanoflow.models.quantised_groups import block_sizes, compressed
from nanoflow.models.stored import Awq, Form, FormOf, Gptq, Mxfp4, Scaled

_FIELD = "quantization_config"
# Files of older tools, with the method if the file does not name one.
_FILES = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt"))
_BLOCK = (128, 128)
# Names of the field that says how numbers are packed; if several are there, they agree.
_VERSIONS_OF_AWQ, _VERSIONS_OF_GPTQ = ("version", "format", "checkpoint_format"), ("checkpoint_format", "format")
_SERVED = "FP8, AWQ, GPTQ, compressed-tensors, ModelOpt FP8, MXFP4 of gpt-oss and GGUF are"
# What can be done about methods that are not served; others have no special advice.
_ADVICE = {
    "bitsandbytes": "in transformers call dequantize() and save_pretrained() and give that folder",
    "mlx": "take the model that it was made from",
}
# What the tools say of AWQ and GPTQ alike: how they quantised.
_OF_TOOLS = frozenset(
    (
        *("sym", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path"),
        *("model_file_base_name", "meta", "lm_head", "dataset", "tokenizer", "block_name_to_quantize", "backend"),
        *("module_name_preceding_first_block", "modules_in_block_to_quantize", "batch_size", "pad_token_id"),
        *("use_cuda_fp16", "use_exllama", "exllama_config", "disable_exllama", "max_input_length", "model_seqlen"),
        *("cache_block_outputs", "pack_dtype", "mse", "act_group_aware", "quantizer"),
        *("adapter", "hyb_act", "is_marlin_format", "offload_to_disk", "pack_impl", "failsafe", "gptaq"),
    )
)
# Fields that do not change how stored numbers are read, by method.
_HARMLESS: Mapping[str, frozenset[str]] = {
    "fp8": frozenset(("activation_scheme", "fmt", "scale_fmt", "dequantize", "kv_cache_scheme", "activation_scale_ub")),
    "fbgemm_fp8": frozenset(("activation_scale_ub",)),
    "awq": _OF_TOOLS | {"desc_act", "do_fuse", "fuse_max_seq_len", "modules_to_fuse"},
    "gptq": _OF_TOOLS | {"version"},
    "mxfp4": frozenset(("dequantize",)),
    "modelopt": frozenset(("producer", "config_groups", "kv_cache_quant_algo", "kv_cache_scheme", "quantization")),
}
_COMMON = frozenset(("quant_method", "modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """How weights are stored.

    Attributes:
        title: For users, as "AWQ int4".
        form_of: The form of a module by its name; None if the checkpoint says that it is not quantised.
        origin: The file that says so.
    """

    title: str
    form_of: FormOf
    origin: str


def quantisation_of(folder: Path, values: Mapping[str, Any]) -> Quantisation | None:
    """How a folder's weights are quantised by its config.json or a file beside it; None if they are not.

    Raises:
        ModelError: By a method, or with a field, that is not served.
    """
    found = quantisation_in(values, origin=str(folder / "config.json"))
    if found is not None:
        return found
    for name, method in _FILES:
        if is_there(folder / name):
            fields = Fields(values=read_object(folder / name), origin=str(folder / name))
            return _read(fields, str(fields.values.get("quant_method") or method))
    return None


def quantisation_in(values: Mapping[str, Any], *, origin: str) -> Quantisation | None:
    """How weights are quantised by the fields of a config.json; None if they are not.

    Raises:
        ModelError: As `quantisation_of`.
    """
    fields = Fields(values=values, origin=origin)
    if values.get(_FIELD) is None:
        if values.get("quantization") is not None:
            raise _not_served(fields, "quantization", "MLX", fields.values["quantization"])
        return None
    given = values[_FIELD]
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if not isinstance(method, str) or method.lower() not in _METHODS:
        raise _not_served(fields, _FIELD, method, given)
    return _read(fields.nested(_FIELD), method)


def quant_method_of(values: Mapping[str, Any]) -> str | None:
    """The method that a config.json names, in lower case; None if it names none."""
    given = values.get(_FIELD)
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    return method.lower() if isinstance(method, str) else None


def has_mxfp4(quantization: str, quant_method: str | None) -> bool:
    """Whether experts are in MXFP4 with such an option: if it says so, and beside FP8 if they are stored so.

    Args:
        quantization: "none", "fp8" or "mxfp4".
        quant_method: As `quant_method_of`.
    """
    return quantization == "mxfp4" or (quantization == "fp8" and quant_method == "mxfp4")


def _read(fields: Fields, method: str) -> Quantisation:
    if method.lower() not in _METHODS:
        raise fields.problem(_advice(method))
    title, form_of = _METHODS[method.lower()](fields)
    return Quantisation(title=title, form_of=form_of, origin=fields.origin)


def _not_served(fields: Fields, name: str, method: object, given: object) -> ModelError:
    details = given if isinstance(given, Mapping) else {}
    if any(details.get(f"load_in_{count}bit") is True for count in (4, 8)):
        # bitsandbytes once named itself by these alone.
        method = "bitsandbytes"
    method = method or details.get("quant_algo")
    bits = next((details[key] for key in ("bits", "w_bit", "num_bits") if details.get(key) is not None), None)
    said = f" ({shown(bits)} bits)" if bits is not None else ""
    return fields.error(name, f"is set: {_advice(method, said)}")


def _advice(method: object, said: str = "") -> str:
    if not method:
        return (
            f"weights are quantised{said} by a method that it does not name; {_SERVED} served: use the original model"
        )
    name = shown(method).strip("'")
    advice = _ADVICE.get(name.lower(), "use the original model, or one in these forms")
    return f"weights quantised by {name.upper()}{said} are not served, {_SERVED}: {advice}"


def _check_fields(fields: Fields, method: str, *read: str) -> None:
    """Refuse fields that may change how numbers are read; empty ones say nothing."""
    for name, value in fields.values.items():
        known = name in _COMMON or name in _HARMLESS[method] or name in read
        if not known and value not in (None, False, "", [], {}):
            raise fields.error(name, "is not known; remove it if it says nothing on how the weights are stored")


def _constantly(form: Form) -> FormOf:
    return lambda module: form


def _fp8(fields: Fields) -> tuple[str, FormOf]:
    method = fields.text("quant_method", "fp8").lower()
    _check_fields(fields, method, "weight_block_size")
    block = None
    if fields.has("weight_block_size"):
        block = block_sizes(fields, "weight_block_size")
    return "FP8", _constantly(Scaled(dtype="F8_E4M3", block=block))


def _awq(fields: Fields) -> tuple[str, FormOf]:
    known = ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "dynamic", *_VERSIONS_OF_AWQ)
    _check_fields(fields, "awq", *known)
    bits = fields.positive_int("bits" if fields.has("bits") else "w_bit")
    if bits != 4:
        raise fields.error("bits", f"must be 4, as AWQ is served with 4 bits alone, got {bits}")
    name, version = _version(fields, _VERSIONS_OF_AWQ, "gemm")
    if version != "gemm":
        raise fields.error(name, f"must be 'gemm', got {shown(version)}: take a checkpoint of that version")
    if fields.text("backend", "").lower() == "llm-awq":
        raise fields.error("backend", "is 'llm-awq', which packs weights in another way: take one of version gemm")
    _refuse_overrides(fields)
    if not fields.flag("zero_point", default=True):
        raise fields.error("zero_point", "must be true: AWQ without zero points is not served")
    return "AWQ int4", _constantly(Awq(group_size=_group_size(fields)))


def _gptq(fields: Fields) -> tuple[str, FormOf]:
    _check_fields(fields, "gptq", "bits", "group_size", "desc_act", "dynamic", *_VERSIONS_OF_GPTQ)
    bits = fields.positive_int("bits")
    if bits not in (4, 8):
        raise fields.error("bits", f"must be 4 or 8, got {bits}: GPTQ with other numbers of bits is not served")
    name, version = _version(fields, _VERSIONS_OF_GPTQ, "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise fields.error(name, f"must be gptq or gptq_v2, got {shown(version)}: use one of these forms")
    if fields.flag("is_marlin_format", default=False):
        raise fields.error("is_marlin_format", "must be false: use a checkpoint of the form gptq or gptq_v2")
    _refuse_overrides(fields)
    form = Gptq(
        bits=bits,
        group_size=_group_size(fields),
        zero_offset=0 if version == "gptq_v2" else 1,
        is_ordered=fields.flag("desc_act", default=False),
    )
    return f"GPTQ int{bits}", _constantly(form)


def _version(fields: Fields, names: Sequence[str], default: str) -> tuple[str, str]:
    """The field among `names` that says in which order numbers are packed, and its value in lower case.

    Tools write it under one of these names or under several, which must agree.
    """
    said = {name: fields.text(name).lower() for name in names if fields.has(name)}
    name = next(iter(said), names[0])
    other = next((other for other, version in said.items() if version != said[name]), None)
    if other is not None:
        raise fields.error(other, f"is {shown(said[other])}, but {name} is {shown(said[name])}: they must agree")
    return name, said.get(name, default)


def _refuse_overrides(fields: Fields) -> None:
    """Refuse modules that are stored otherwise than the rest."""
    overrides = fields.nested("dynamic").values
    if any(not pattern.startswith("-") for pattern in overrides):
        raise fields.error("dynamic", "must only leave modules out ('-:'): other options for some are not served")


def _group_size(fields: Fields) -> int:
    """Columns of a group; -1 makes one group of all, however many there are."""
    name = "q_group_size" if fields.has("q_group_size") and not fields.has("group_size") else "group_size"
    size = fields.whole(name, most=2**20)
    if size == -1:
        return 2**31
    return fields.positive_int(name)


def _modelopt(fields: Fields) -> tuple[str, FormOf]:
    _check_fields(fields, "modelopt", "quant_algo", "producer", "group_size")
    inner = fields.nested("quantization") if fields.has("quantization") else fields
    algorithm = inner.text("quant_algo")
    blocks = {"FP8": None, "FP8_PER_CHANNEL_PER_TOKEN": None, "FP8_PB_WO": _BLOCK}
    if algorithm not in blocks:
        raise inner.error("quant_algo", f"must be one of {', '.join(blocks)}, got {shown(algorithm)}: {_SERVED} served")
    return "ModelOpt FP8", _constantly(Scaled(dtype="F8_E4M3", block=blocks[algorithm]))


def _mxfp4(fields: Fields) -> tuple[str, FormOf]:
    _check_fields(fields, "mxfp4")
    return "MXFP4", _constantly(Mxfp4())


_METHODS: Mapping[str, Callable[[Fields], tuple[str, FormOf]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": compressed,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
