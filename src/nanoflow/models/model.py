"""A decoder-only transformer as data: what a config.json comes to, whatever its dialect."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.models.fields import INT32_MAX, Fields

# The longest context in units of what the model was trained on, where its rotary embedding stretches that by `factor`.
_STRETCHED = ("linear", "dynamic", "yarn")
# Rotary embeddings that are plain up to the trained length; a longer context changes them at every position.
_CHANGES_BEYOND = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding as config.json describes it; `rope.py` turns it into frequencies.

    Attributes:
        rope_type: "default", "linear", "dynamic", "llama3", "yarn", "longrope" or one that `rope.py` refuses.
        theta: Base of the frequencies.
        original_max_len: Positions the model was trained on before its context was stretched.
        rotary_dim: How many dimensions of a head are rotated, its first ones; an odd number is rounded up to pairs.
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
        rms_norm_eps: Added under the root of every norm.
        max_position_embeddings: Positions that config.json allows.
        hidden_act: Activation of the feed-forward block.
        rope: Rotary embedding.
        local_rope: That of layers with a sliding window, in architectures where it is another; None elsewhere.
        fields: Every field that exists for the architecture, for what no other architecture has.
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
    local_rope: RopeConfig | None = None
    fields: Fields = field(default=Fields(values={}, origin="config.json"), repr=False, compare=False)
    num_experts: int | None = None
    num_experts_per_token: int | None = None

    @property
    def max_context_len(self) -> int:
        """Longest sequence the model is made for.

        `linear`, `dynamic` and `yarn` rotary embeddings stretch the length by their factor; where a config.json states
        the stretched length as `max_position_embeddings`, as with `llama3`, or where windows have a rotary embedding of
        their own, that counts.
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
        """Longest sequence served if nothing else is asked for.

        A `dynamic` or `longrope` rotary embedding is one thing up to the trained length (of the former
        `max_position_embeddings`) and another, at all positions, for sequences beyond, so that a longer context has
        to be asked for.
        """
        if self.rope.rope_type not in _CHANGES_BEYOND:
            return self.max_context_len
        return min(self.rope.original_max_len, self.max_position_embeddings)
