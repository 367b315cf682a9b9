"""What a model's config.json says, in one form whatever version of transformers wrote it.

Knows field names and their history, not what an architecture makes of them (`llama.py`) nor which are known
(`registry.py`). A missing or nonsensical field is one line that names the field and the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
_LAYER_TYPES = ("full_attention", "sliding_attention")


class ModelError(ValueError):
    """A model folder cannot be served; one line that says which file or field is wrong and what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A JSON object whose values are checked as they are read.

    `null` counts as absent. Every reader raises ModelError for a value that makes no sense, and, if it is given no
    default, for an absent one.

    Attributes:
        values: The object.
        origin: Where it stands, for messages: a file, or a file and a field.
    """

    values: Mapping[str, Any]
    origin: str

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self.values.get(name) is not None

    def error(self, name: str, problem: str) -> ModelError:
        """The error to raise about a field."""
        return ModelError(f"{self.origin}: field {name!r} {problem}")

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it stands."""
        value = self.values.get(name)
        if value is None and default is None:
            raise self.error(name, "is missing")
        return default if value is None else value

    def positive_int(self, name: str, default: int | None = None) -> int:
        """A whole number from 1."""
        value = self.raw(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(name, f"must be a positive integer, got {value!r}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.raw(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(name, f"must be a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or False."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self.raw(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, got {value!r}")
        return value

    def nested(self, name: str) -> Fields:
        """An object in this one; empty if absent."""
        value = self.raw(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be an object, got {value!r}")
        return Fields(values=value, origin=f"{self.origin}: {name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding as config.json describes it; `rope.py` turns it into frequencies.

    Attributes:
        rope_type: "default", "linear", "dynamic", "llama3", "yarn" or one that `rope.py` refuses.
        theta: Base of the frequencies.
        original_max_len: Positions the model was trained on before its context was stretched.
        options: The other fields, which depend on the type.
    """

    rope_type: str
    theta: float
    original_max_len: int
    options: Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
        architecture: Name of the class in transformers, e.g. "LlamaForCausalLM".
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size: Sizes.
        rms_norm_eps: Added under the root of every norm.
        max_position_embeddings: Positions that config.json allows.
        hidden_act: Activation of the feed-forward block.
        rope: Rotary embedding.
        layer_windows: Sliding window of each layer in tokens, None without.
        tie_word_embeddings: The output projection is the embedding.
        attention_bias, mlp_bias: Whether config.json asks for biases; an architecture may have some of its own accord.
        eos_token_ids: End of sequence, of config.json first, then of generation_config.json.
        dtype: "float32", "bfloat16" or "float16".
        num_experts, num_experts_per_token: Feed-forward blocks of a layer in a mixture of experts, and how many of them
            a token goes through; None in a dense model.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    hidden_act: str
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    dtype: str
    num_experts: int | None = None
    num_experts_per_token: int | None = None

    @property
    def max_context_len(self) -> int:
        """Longest sequence the model is made for; YaRN stretches the trained length, whatever the limit says."""
        if self.rope.rope_type != "yarn" or not self.rope.options.has("factor"):
            return self.max_position_embeddings
        stretched = int(self.rope.original_max_len * self.rope.options.positive("factor"))
        return max(self.max_position_embeddings, stretched)


def load(folder: Path) -> ModelConfig:
    """Read config.json, and generation_config.json for further ends of sequence.

    Raises:
        ModelError: A file is missing or no JSON object, or a field makes no sense.
    """
    config = parse(_read_object(folder / "config.json"), origin=str(folder / "config.json"))
    path = folder / "generation_config.json"
    if not path.exists():
        return config
    more = _eos_token_ids(Fields(values=_read_object(path), origin=str(path)), config.vocab_size)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def parse(config: Mapping[str, Any], *, origin: str = "config.json") -> ModelConfig:
    """Read the fields of a config.json, of transformers 4 or 5.

    Args:
        config: The JSON object.
        origin: Its file, for messages.

    Raises:
        ModelError: A field is missing or makes no sense, or the weights are quantised.
    """
    architecture = _architecture(Fields(values=config, origin=origin))
    fields = Fields(values=config, origin=f"{origin} ({architecture})")
    if fields.has("quantization_config"):
        raise fields.error("quantization_config", "is set: quantised weights are not served, use the original model")
    num_heads = fields.positive_int("num_attention_heads")
    num_layers = fields.positive_int("num_hidden_layers")
    vocab_size = fields.positive_int("vocab_size")
    max_position_embeddings = fields.positive_int("max_position_embeddings")
    num_experts, num_experts_per_token = _experts(fields)
    return ModelConfig(
        architecture=architecture,
        hidden_size=fields.positive_int("hidden_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, num_heads),
        head_dim=_head_dim(fields, num_heads),
        intermediate_size=fields.positive_int("intermediate_size"),
        vocab_size=vocab_size,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        max_position_embeddings=max_position_embeddings,
        hidden_act=fields.text("hidden_act", "silu"),
        rope=_rope(fields, max_position_embeddings),
        layer_windows=_layer_windows(fields, num_layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=fields.flag("attention_bias", default=False),
        mlp_bias=fields.flag("mlp_bias", default=False),
        eos_token_ids=_eos_token_ids(fields, vocab_size),
        dtype=_dtype(fields),
        num_experts=num_experts,
        num_experts_per_token=num_experts_per_token,
    )


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder needs one") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def _architecture(fields: Fields) -> str:
    names = fields.raw("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise fields.error("architectures", f"must be a list with the model's class, got {names!r}")
    return names[0]


def _num_kv_heads(fields: Fields, num_heads: int) -> int:
    num_kv_heads = fields.positive_int("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads {num_heads}, got {num_kv_heads}")
    return num_kv_heads


def _experts(fields: Fields) -> tuple[int | None, int | None]:
    """Experts of a layer and of a token: `num_local_experts` in Mixtral, `num_experts` in Qwen."""
    name = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
    if not fields.has(name):
        return None, None
    num_experts, num_per_token = fields.positive_int(name), fields.positive_int("num_experts_per_tok")
    if num_per_token > num_experts:
        raise fields.error("num_experts_per_tok", f"must be at most {name} {num_experts}, got {num_per_token}")
    return num_experts, num_per_token


def _head_dim(fields: Fields, num_heads: int) -> int:
    hidden_size = fields.positive_int("hidden_size")
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.error("num_attention_heads", f"must divide hidden_size {hidden_size}, got {num_heads}")
    head_dim = fields.positive_int("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for the rotary embedding, got {head_dim}")
    return head_dim


def _rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (4); inner values win over outer."""
    options = fields.nested("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    if any(isinstance(value, Mapping) for value in options.values.values()):
        raise ModelError(f"{options.origin}: rotary embeddings that differ between layers are not served")
    for holder in (options, fields):
        if holder.positive("partial_rotary_factor", 1.0) != 1.0:
            raise holder.error("partial_rotary_factor", "must be 1: partly rotated heads are not served")
    theta = options.positive("rope_theta", fields.positive("rope_theta", 10000.0))
    if theta <= 1.0:
        raise fields.error("rope_theta", f"must exceed 1, got {theta:g}")
    # A value outside the rope parameters is the trained length itself and wins, as in transformers.
    holder = fields if fields.has("original_max_position_embeddings") else options
    return RopeConfig(
        rope_type=options.text("rope_type", options.text("type", "default")),
        theta=theta,
        original_max_len=holder.positive_int("original_max_position_embeddings", max_position_embeddings),
        options=options,
    )


def _layer_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """The window goes to the layers that `layer_types` says, else to those from `max_window_layers` on, else to all."""
    window = None
    if fields.flag("use_sliding_window", default=True) and fields.has("sliding_window"):
        window = fields.positive_int("sliding_window")
    if fields.has("layer_types"):
        return tuple(
            window if kind == "sliding_attention" else None for kind in _layer_types(fields, num_layers, window)
        )
    first = fields.raw("max_window_layers", 0)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise fields.error("max_window_layers", f"must be a whole number from 0, got {first!r}")
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _layer_types(fields: Fields, num_layers: int, window: int | None) -> list[str]:
    kinds = fields.raw("layer_types")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"must list {num_layers} layers, got {kinds!r}")
    for kind in kinds:
        if kind not in _LAYER_TYPES:
            raise fields.error("layer_types", f"may hold {' and '.join(_LAYER_TYPES)}, got {kind!r}")
    if window is None and "sliding_attention" in kinds:
        raise fields.error("sliding_window", "is missing, but layer_types asks for sliding_attention")
    return kinds


def _eos_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    ids = fields.raw("eos_token_id", [])
    ids = ids if isinstance(ids, list) else [ids]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise fields.error("eos_token_id", f"must be token ids below {vocab_size}, got {token!r}")
    return tuple(ids)


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    dtype = fields.text(name, "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise fields.error(name, f"must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype
