"""Reads a model's config.json into a `ModelConfig`, whichever version of transformers wrote it.

`readings.py` says which fields an architecture has and what absent ones mean; this file interprets them. A missing or
invalid field is an error of one line that names the field and the file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanoflow.models.checkpoint import differ, peek
from nanoflow.models.expert_fields import experts_of
from nanoflow.models.fields import Fields, ModelError, is_there, read_object, shown
from nanoflow.models.formats import refuse_adapter
from nanoflow.models.generation import GENERATION_CONFIG
from nanoflow.models.gguf_file import is_gguf
from nanoflow.models.gguf_model import gguf_config
from nanoflow.models.model import ModelConfig, RopeConfig
from nanoflow.models.parts import EMBEDDING, OUTPUT
from nanoflow.models.quantised import quant_method_of, quantisation_in, quantisation_of
from nanoflow.models.readings import Reading
from nanoflow.models.registry import reading_of, refusal, served_as
from nanoflow.models.rope_fields import local_rope_of, rope_of

__all__ = [
    "DTYPES",
    "Fields",
    "ModelConfig",
    "ModelError",
    "RopeConfig",
    "load",
    "parse",
    "read_config",
    "refuse_unknown",
]

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DTYPE_ALIASES = {"float": "float32", "half": "float16"}
# More layers than any model has; bounds memory.
_MAX_LAYERS = 10_000
_MAX_HEAD_DIM = 2**16
# Names of layer types, and whether such a layer has a sliding window. "attention" is the older "full_attention".
_LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}
# Fields that would change what a model computes, with the values that are accepted and the error for others.
_NOT_SERVED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "per_layer_config": ((None,), "is set: layers of different sizes are not served"),
    "is_causal": ((True,), "must be true: only causal attention is served"),
}
# Names of the field for the feed-forward block's activation, by architecture.
_ACTIVATIONS = ("hidden_act", "hidden_activation")


def load(folder: Path, generation_config: Path | None = None) -> ModelConfig:
    """Read config.json, with more end-of-sequence tokens from generation_config.json, and two facts from the weights.

    The metadata of a GGUF file say the same and more.

    One is the dtype if config.json has none. The other is whether the output projection is really tied: a checkpoint
    may store one that differs from the embedding although config.json ties them. Then both are used, as in
    transformers.

    Args:
        folder: The model's folder, or a GGUF file.
        generation_config: A file that replaces the folder's generation_config.json.

    Raises:
        ModelError: The architecture is unknown (checked first), the folder is not a complete model, a file is missing
            or not a JSON object, or a field is invalid.
    """
    values, origin = read_config(folder)
    _architecture(Fields(values=values, origin=origin))
    refuse_adapter(folder)
    config = parse(values, origin=origin)
    quantisation_of(folder, values)
    own = folder / GENERATION_CONFIG
    recommended = generation_config or (own if is_there(own) else None)
    if recommended is not None:
        config = replace(config, eos_token_ids=_all_eos_token_ids(recommended, config, values))
    if folder.is_file():
        return config
    has_dtype = any(values.get(name) is not None for name in ("dtype", "torch_dtype"))
    return config if has_dtype and not config.tie_word_embeddings else _as_stored(config, folder, has_dtype=has_dtype)


def read_config(folder: Path) -> tuple[Mapping[str, Any], str]:
    """The content of config.json, or what it would be for a GGUF file; and the name of the file.

    Raises:
        ModelError: The file is missing or damaged.
    """
    if is_gguf(folder):
        return gguf_config(folder), str(folder)
    return read_object(folder / "config.json"), str(folder / "config.json")


def refuse_unknown(folder: Path) -> None:
    """Raise ModelError if a folder is not a complete model, or its architecture is not served.

    For callers that read other files of a folder first. `load` checks the fields.
    """
    values, origin = read_config(folder)
    fields = Fields(values=values, origin=origin)
    if any(values.get(name) for name in ("architectures", "model_type", "_class_name")):
        _architecture(fields)
    refuse_adapter(folder)
    quantisation_of(folder, values)


def parse(config: Mapping[str, Any], *, origin: str = "config.json") -> ModelConfig:
    """Read the fields of a config.json, of transformers 4 or 5.

    Args:
        config: The JSON object.
        origin: Name of the file, for messages.

        Raises:
        ModelError: The architecture is unknown (checked first), a field is missing or invalid, or weights are
            quantised by a method that is not served.
    """
    architecture = _architecture(Fields(values=config, origin=origin))
    reading = reading_of(architecture)
    fields = _as_the_architecture_sees_it(config, architecture, reading, origin)
    num_heads = fields.positive_int("num_attention_heads")
    num_layers = fields.positive_int("num_hidden_layers", most=_MAX_LAYERS)
    vocab_size = fields.positive_int("vocab_size")
    max_position_embeddings = fields.positive_int("max_position_embeddings")
    head_dim = _head_dim(fields, num_heads)
    return ModelConfig(
        architecture=architecture,
        hidden_size=fields.positive_int("hidden_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, num_heads),
        head_dim=head_dim,
        intermediate_size=fields.positive_int("intermediate_size"),
        vocab_size=vocab_size,
        rms_norm_eps=fields.positive("rms_norm_eps"),
        max_position_embeddings=max_position_embeddings,
        hidden_act=fields.text(next(name for name in _ACTIVATIONS if name in fields.values)),
        rope=rope_of(fields, reading, head_dim),
        local_rope=local_rope_of(fields, reading, head_dim),
        fields=fields,
        layer_windows=_layer_windows(fields, reading, num_layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=fields.flag("attention_bias", default=False),
        mlp_bias=fields.flag("mlp_bias", default=False),
        eos_token_ids=_eos_token_ids(fields, vocab_size, is_given="eos_token_id" in config),
        dtype=_dtype(fields),
        experts=experts_of(fields, reading.expert_counts, num_layers),
        quant_method=quant_method_of(config),
    )


def _architecture(fields: Fields) -> str:
    """The model's class, by name or by `model_type`; an error if the two contradict each other."""
    names, model_type = fields.values.get("architectures"), fields.values.get("model_type")
    if not names and isinstance(model_type, str) and model_type:
        served = served_as(model_type)
        if served is None:
            raise fields.problem(refusal(None, model_type, fields.values) or "")
        return served
    names = _names(fields)
    if (reason := refusal(names[0], model_type, fields.values)) is not None:
        raise fields.problem(reason)
    reading = reading_of(names[0])
    if model_type is not None and model_type != reading.model_type:
        problem = f"is {shown(model_type)}, but architectures has {names[0]!r}, which is {reading.model_type!r}"
        raise fields.error("model_type", problem)
    return names[0]


def _names(fields: Fields) -> list[str]:
    """Classes that config.json names; at least one, or an error."""
    if not fields.has("architectures") and isinstance(fields.values.get("_class_name"), str):
        kind = shown(fields.values["_class_name"])
        raise fields.problem(f"is of diffusers ({kind}), which makes no text: only language models are served")
    names = fields.raw("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise fields.error("architectures", f"must be a list with the model's class, got {shown(names)}")
    return names


def _as_the_architecture_sees_it(config: Mapping[str, Any], architecture: str, reading: Reading, origin: str) -> Fields:
    """The fields that the architecture has, with defaults for absent ones; others are dropped."""
    origin = f"{origin} ({architecture})"
    given = Fields(values=config, origin=origin)
    quantisation_in(config, origin=origin)
    for name, (served, problem) in _NOT_SERVED.items():
        if name in config and config[name] not in served:
            raise given.error(name, problem)
    given.refuse_nulls(*(name for name in reading.fields if name not in reading.nullable))
    return Fields(values=reading.complete(config), origin=origin)


def _num_kv_heads(fields: Fields, num_heads: int) -> int:
    num_kv_heads = fields.positive_int("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads {num_heads}, got {num_kv_heads}")
    return num_kv_heads


def _head_dim(fields: Fields, num_heads: int) -> int:
    hidden_size = fields.positive_int("hidden_size")
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.error("num_attention_heads", f"must divide hidden_size {hidden_size}, got {num_heads}")
    derived = hidden_size // num_heads
    if not fields.has("head_dim") and derived > _MAX_HEAD_DIM:
        raise fields.error("hidden_size", f"makes heads of {derived} dimensions, at most {_MAX_HEAD_DIM} are served")
    head_dim = fields.positive_int("head_dim", derived, most=_MAX_HEAD_DIM)
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for the rotary embedding, got {head_dim}")
    return head_dim


def _layer_windows(fields: Fields, reading: Reading, num_layers: int) -> tuple[int | None, ...]:
    """Window of each layer: as in `layer_types`; else from layer `max_window_layers` on, or in every other before."""
    window = None
    if fields.flag("use_sliding_window", default=True) and fields.has("sliding_window"):
        window = fields.positive_int("sliding_window")
    if fields.has("layer_types"):
        return tuple(window if slides else None for slides in _sliding_layers(fields, num_layers, window))
    if fields.has("sliding_window_pattern") or reading.window_pattern is not None:
        pattern = fields.positive_int("sliding_window_pattern", reading.window_pattern)
        if window is None and pattern > 1:
            asks = "sliding_window_pattern asks" if fields.has("sliding_window_pattern") else "the architecture asks"
            raise fields.error("sliding_window", f"is missing, but {asks} for windows")
        return tuple(window if (layer + 1) % pattern else None for layer in range(num_layers))
    first = fields.raw("max_window_layers", 0)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise fields.error("max_window_layers", f"must be a whole number from 0, got {shown(first)}")
    if reading.has_early_windows:
        return tuple(window if layer < first and layer % 2 == 0 else None for layer in range(num_layers))
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _sliding_layers(fields: Fields, num_layers: int, window: int | None) -> list[bool]:
    kinds = fields.raw("layer_types")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"must list {num_layers} layers, got {shown(kinds)}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _LAYER_TYPES:
            raise fields.error("layer_types", f"may hold full_attention and sliding_attention, got {shown(kind)}")
    if window is None and "sliding_attention" in kinds:
        raise fields.error("sliding_window", "is missing, but layer_types asks for sliding_attention")
    return [_LAYER_TYPES[kind] for kind in kinds]


def _eos_token_ids(fields: Fields, vocab_size: int, *, is_given: bool) -> tuple[int, ...]:
    """End-of-sequence tokens; the architecture's default is used only if the vocabulary has it."""
    default = fields.values["eos_token_id"]
    if not is_given and isinstance(default, int) and default >= vocab_size:
        return ()
    return fields.token_ids("eos_token_id", vocab_size)


def _all_eos_token_ids(path: Path, config: ModelConfig, values: Mapping[str, Any]) -> tuple[int, ...]:
    """Those of config.json, then those of generation_config.json; the architecture's default if there are none."""
    more = Fields(values=read_object(path), origin=str(path)).token_ids("eos_token_id", config.vocab_size)
    own = config.eos_token_ids if "eos_token_id" in values or not more else ()
    return tuple(dict.fromkeys((*own, *more)))


def _as_stored(config: ModelConfig, folder: Path, *, has_dtype: bool) -> ModelConfig:
    """The model with the dtype of its weights if it has none, and untied if the stored output projection differs."""
    stored = peek(folder)
    if not has_dtype:
        dtypes = (_STORED_DTYPES.get(tensor.dtype) for tensor in stored.values())
        config = replace(config, dtype=next(filter(None, dtypes), config.dtype))
    if config.tie_word_embeddings and differ(stored.get(EMBEDDING), stored.get(OUTPUT)):
        logger.warning("%s ties the output to the embedding, but the weights differ: they are not tied", folder)
        config = replace(config, tie_word_embeddings=False)
    return config


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    given = fields.text(name, "float32").removeprefix("torch.")
    dtype = _DTYPE_ALIASES.get(given, given)
    if dtype not in DTYPES:
        raise fields.error(name, f"must be one of {', '.join(DTYPES)}, got {shown(given)}")
    return dtype
