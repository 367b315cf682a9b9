"""A decoder-only transformer as data: the description that every config.json is converted to."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.models.expert_fields import ExpertsConfig
from nanoflow.models.fields import INT32_MAX, Fields

# Types of rotary embeddings that multiply the trained context length by their `factor`.
_STRETCHED = ("linear", "dynamic", "yarn")
# Types of rotary embeddings that are plain up to the trained length; a longer context changes them at every position.
_CHANGES_BEYOND = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding as config.json describes it; `rope.py` turns it into frequencies.

    Attributes:
        rope_type: "default", "linear", "dynamic", "llama3", "yarn", "longrope", or another one, which `rope.py`
        refuses.
        theta: Base of the frequencies.
        original_max_len: Positions that the model was trained on before its context was extended.
        rotary_dim: How many first dimensions of a head are rotated; an odd number is rounded up to pairs.
        options: The other fields, which depend on the type.
    """

    rope_type: str
    theta: float
    original_max_len: int
    rotary_dim: int
    options: Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
        architecture: Name of the class in transformers, e.g. "LlamaForCausalLM".
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size: Sizes.
        rms_norm_eps: Added under the root in every norm.
        max_position_embeddings: Number of positions by config.json.
        hidden_act: Activation of the feed-forward block.
        rope: Rotary embedding.
        local_rope: Rotary embedding of layers with a sliding window, if it differs from `rope`; else None.
        fields: Every field that the architecture has; used for fields that no other architecture has.
        layer_windows: Sliding window of each layer in tokens; None for a layer without one.
        tie_word_embeddings: Whether the output projection is the embedding.
        attention_bias, mlp_bias: Whether config.json asks for biases; some architectures always have some.
        eos_token_ids: End-of-sequence tokens, those of config.json first, then those of generation_config.json.
        dtype: "float32", "bfloat16" or "float16".
        experts: What it says of experts; None for a dense model.
        quant_method: How it says that weights are stored, e.g. "mxfp4"; None for plain numbers.
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
    local_rope: RopeConfig | None = None
    fields: Fields = field(default=Fields(values={}, origin="config.json"), repr=False, compare=False)
    experts: ExpertsConfig | None = None
    quant_method: str | None = None

    @property
    def max_context_len(self) -> int:
        """Longest sequence in tokens that the model supports.

        `linear`, `dynamic` and `yarn` rotary embeddings multiply the length by their factor. `max_position_embeddings`
        is the limit if it already includes that (as with `llama3`), or if layers with windows have their own rotary
        embedding.
        """
        rope = self.rope
        if self.local_rope is not None:
            return self.max_position_embeddings
        if rope.rope_type not in _STRETCHED or not rope.options.has("factor"):
            return self.max_position_embeddings
        trained = rope.original_max_len if rope.rope_type == "yarn" else self.max_position_embeddings
        stretched = int(min(trained * rope.options.positive("factor"), INT32_MAX))
        return max(self.max_position_embeddings, stretched)

    @property
    def default_context_len(self) -> int:
        """Longest sequence in tokens if the user sets none.

        `dynamic` and `longrope` rotary embeddings change at all positions beyond the trained length (for `dynamic` that
        is `max_position_embeddings`). So a longer context must be asked for.
        """
        if self.rope.rope_type not in _CHANGES_BEYOND:
            return self.max_context_len
        return min(self.rope.original_max_len, self.max_position_embeddings)
