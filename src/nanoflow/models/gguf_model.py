"""What a GGUF file of llama.cpp says of its model: a config as transformers writes it, and names and forms of tensors.

`gguf_file.py` reads the file; the tokenizer in it is read by `engine/gguf_tokenizer.py`. What llama.cpp's converter did
to weights is undone by the forms: the order of rows of queries and keys in files of type llama, and 1 that was added to
Gemma's norms.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow.models.checkpoint import StoredTensor
from nanoflow.models.fields import Fields, ModelError, shown
from nanoflow.models.gguf_file import TYPES, GgufFile, read_gguf
from nanoflow.models.stored import Blocks

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
# Types whose models are served, but from safetensors alone.
_ELSEWHERE = frozenset(("qwen2moe", "qwen3moe", "gpt-oss"))
_TAKE_ANOTHER = "take the model that it was made from, in safetensors"
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OWN_NAMES: Mapping[str, Mapping[str, str]] = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "gemma3": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
# Tensors that are read with the config: divisors of the frequencies of rotary embeddings.
_DIVISORS, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
_MAX_DIVISORS = 2**16
_IN_LAYER = re.compile(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)")
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(?:weight|bias)")
# Keys of a model that are read, without the name of its type, and keys that change nothing.
_KNOWN = frozenset(
    (
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
        *("attention.key_length", "attention.value_length", "attention.sliding_window", "attention.causal"),
        *("attention.sliding_window_pattern", "attention.layer_norm_epsilon", "tensor_data_layout"),
        *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor"),
        *("rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned"),
    )
)
# llama.cpp has these numbers in its code.
_GEMMA_PATTERN, _GEMMA_LOCAL_BASE, _GEMMA_27B_LAYERS = 6, 10000.0, 62
_DEFAULT_BASE = 10000.0
_CONTROL = 3
# Ends of a turn, by name: files of chat models often name the end of a text alone.
_ENDS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """The model in a GGUF file.

    Attributes:
        kind: Its type in llama.cpp.
        tensors: By the names that checkpoints of transformers have.
        num_heads, num_kv_heads: Heads of queries, and of keys and values.
    """

    kind: str
    tensors: Mapping[str, StoredTensor]
    num_heads: int
    num_kv_heads: int

    def form_of(self, name: str, tensor: StoredTensor | None) -> Blocks:
        """How a tensor is stored."""
        dtype = "F32" if tensor is None else tensor.dtype
        rotated = _ROTATED.fullmatch(name) if self.kind == "llama" else None
        if rotated is not None:
            return Blocks(dtype=dtype, num_rotated_heads=self.num_heads if rotated[1] == "q" else self.num_kv_heads)
        is_shifted = self.kind == "gemma3" and name.endswith("norm.weight")
        return Blocks(dtype=dtype, shift=-1.0 if is_shifted else 0.0)


def open_gguf(path: Path) -> GgufModel:
    """The model of a file.

    Raises:
        ModelError: As `gguf_config`.
    """
    file = read_gguf(path)
    config = gguf_config(path)
    kind = file.metadata["general.architecture"]
    return GgufModel(
        kind=kind,
        tensors={
            _name(name, kind): tensor for name, tensor in file.tensors.items() if name not in (_DIVISORS, _SHORT, _LONG)
        },
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
    )


def gguf_config(path: Path) -> dict[str, Any]:
    """What config.json would say of the model in a GGUF file.

    Raises:
        ModelError: The file is damaged or incomplete, or metadata have a value that is not served.
    """
    file = read_gguf(path)
    fields = Fields(values=file.metadata, origin=str(path))
    kind = fields.text("general.architecture")
    if kind in _ELSEWHERE:
        raise fields.problem(f"is of type {shown(kind)}, which is not read from GGUF: {_TAKE_ANOTHER}")
    if kind not in _CLASSES:
        return {"model_type": kind}
    _refuse_others(fields, kind)
    own = Fields(
        values={key.removeprefix(f"{kind}."): value for key, value in file.metadata.items()},
        origin=f"{path}: {kind}",
    )
    if "token_embd.weight" not in file.tensors:
        raise fields.problem("lacks the tensor token_embd.weight")
    num_heads, hidden_size = own.positive_int("attention.head_count"), own.positive_int("embedding_length")
    head_dim = own.positive_int("attention.key_length", hidden_size // num_heads)
    if kind != "phi3" and (rotated := own.positive_int("rope.dimension_count", head_dim)) != head_dim:
        raise own.error("rope.dimension_count", f"must be the size of a head, {head_dim}, got {rotated}")
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": own.positive_int("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": own.positive_int("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": own.positive_int("feed_forward_length"),
        "max_position_embeddings": own.positive_int("context_length"),
        "rms_norm_eps": _shortest(own.positive("attention.layer_norm_rms_epsilon")),
        "rope_theta": own.positive("rope.freq_base", _DEFAULT_BASE),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": kind != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        "eos_token_id": _ends(fields, vocab_size),
        "dtype": _dtype(file),
        **_rope(file, own, head_dim),
    }
    more = {"gemma3": _gemma3, "phi3": _phi3}.get(kind)
    return config if more is None else {**config, **more(own, config)}


def _refuse_others(fields: Fields, kind: str) -> None:
    """Refuse files that are no whole model, and metadata that would change what it computes."""
    whole = fields.text("general.type", "model")
    if whole != "model":
        raise fields.problem(f"is of type {shown(whole)}, no model: give the file of the model")
    if fields.values.get("split.count", 1) not in (0, 1):
        raise fields.problem("is one of several files of a model: join them with llama-gguf-split --merge")
    for key, value in fields.values.items():
        name = key.removeprefix(f"{kind}.")
        if key.startswith(f"{kind}.") and name not in _KNOWN and value not in (0, 0.0, False, "", []):
            raise fields.problem(
                f"{shown(key)} is {shown(value)}: this kind of {kind} model is not read from GGUF; {_TAKE_ANOTHER}, if "
                "that is served"
            )
    if fields.values.get(f"{kind}.attention.causal", True) is not True:
        raise fields.problem("attends to later tokens too: only causal attention is served")


def _rope(file: GgufFile, own: Fields, head_dim: int) -> dict[str, Any]:
    """The fields on the scaling of rotary embeddings."""
    # As in llama.cpp, a factor without a type scales linearly.
    kind = own.text("rope.scaling.type", "linear" if own.has("rope.scaling.factor") else "none")
    parameters: dict[str, Any]
    factors = {name: _numbers(file, name) for name in (_DIVISORS, _SHORT, _LONG) if name in file.tensors}
    if factors.keys() != {_SHORT, _LONG} and own.values.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise own.error("rope.scaling.attn_factor", "must be 1: scores are not scaled here")
    if _DIVISORS in factors:
        if kind != "none" and own.values.get("rope.scaling.factor") != 1.0:
            raise own.error("rope.scaling.type", f"must be none beside {_DIVISORS}, got {shown(kind)}")
        # Llama 3.1: one divisor for each frequency, whatever the length.
        same = factors[_DIVISORS]
        length = own.positive_int("context_length")
        parameters = {"rope_type": "longrope", "short_factor": same, "long_factor": same}
        return {"rope_parameters": {**parameters, "original_max_position_embeddings": length}}
    if factors:
        if factors.keys() != {_SHORT, _LONG}:
            raise own.problem(f"lacks one of the tensors {_SHORT} and {_LONG}")
        parameters = {"rope_type": "longrope", "short_factor": factors[_SHORT], "long_factor": factors[_LONG]}
        if own.has("rope.scaling.attn_factor"):
            parameters["attention_factor"] = own.positive("rope.scaling.attn_factor")
        return {"rope_parameters": parameters}
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise own.error("rope.scaling.type", f"must be none, linear or yarn, got {shown(kind)}")
    parameters = {"rope_type": kind, "factor": own.positive("rope.scaling.factor")}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = own.positive_int("rope.scaling.original_context_length")
    return {"rope_scaling": parameters}


def _gemma3(own: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp scales scores by the size of heads, but in the largest model by that of a share of the width."""
    is_largest = config["num_hidden_layers"] == _GEMMA_27B_LAYERS
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": own.positive_int("attention.sliding_window"),
        "sliding_window_pattern": own.positive_int("attention.sliding_window_pattern", _GEMMA_PATTERN),
        "rope_local_base_freq": own.positive("rope.freq_base_swa", _GEMMA_LOCAL_BASE),
    }


def _phi3(own: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    length = own.positive_int("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {
        "original_max_position_embeddings": length,
        "partial_rotary_factor": own.positive_int("rope.dimension_count", config["head_dim"]) / config["head_dim"],
        "sliding_window": own.values.get("attention.sliding_window") or None,
    }


def _ends(fields: Fields, vocab_size: int) -> list[int]:
    """The tokens that end a text or a turn."""
    ids = [
        fields.values[key]
        for key in (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
        if isinstance(fields.values.get(key), int) and fields.values[key] < vocab_size
    ]
    lists = (fields.values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    tokens, kinds = (each if isinstance(each, list) else [] for each in lists)
    named = (
        i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == _CONTROL and token in _ENDS
    )
    return list(dict.fromkeys((*ids, *named)))


def _shortest(value: float) -> float:
    """The number with the fewest digits that is the same in float32: 1e-05, where metadata have 9.99999975e-06."""
    return float(str(np.float32(value)))


def _dtype(file: GgufFile) -> str:
    """The type to compute in: that of the matrices if they have one, else bfloat16."""
    dtypes = {tensor.dtype for tensor in file.tensors.values() if len(tensor.shape) > 1}
    plain = {"F32": "float32", "F16": "float16"}
    return plain.get(next(iter(dtypes)), "bfloat16") if len(dtypes) == 1 else "bfloat16"


def _numbers(file: GgufFile, name: str) -> list[float]:
    """The values of a small tensor."""
    tensor = file.tensors[name]
    count = (tensor.end - tensor.start) // TYPES["F32"].num_bytes
    if tensor.dtype != "F32" or len(tensor.shape) != 1 or count > _MAX_DIVISORS:
        raise ModelError(f"{file.path}: {name} must be a list of F32, is {tensor.dtype} of shape {shown(tensor.shape)}")
    with file.path.open("rb") as opened:
        opened.seek(tensor.start)
        return list(struct.unpack(f"<{count}f", opened.read(4 * count)))


def _name(name: str, kind: str) -> str:
    """The name in checkpoints of transformers; unchanged if there is none."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return name
    layer, part, end = match.groups()
    found = {**_LAYER_NAMES, **_OWN_NAMES.get(kind, {})}.get(part)
    return name if found is None else f"model.layers.{layer}.{found}.{end}"
