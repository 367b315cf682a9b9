"""Frequencies of rotary embeddings with scaling applied, from a `RopeConfig` to what a kernel needs.

Everything is computed once, in float64, with the formulas of transformers (modeling_rope_utils). Sources: linear
(kaiokendev), dynamic NTK (bloc97, emozilla), YaRN (arXiv 2309.00071), Llama 3.1, LongRoPE (arXiv 2402.13753). They
depend on the number of rotated dimensions, which may be less than the head's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nanoflow.graph.graph import RopeSpec
from nanoflow.models.fields import shown
from nanoflow.models.model import ModelConfig

Float64 = NDArray[np.float64]
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def rope_spec(config: ModelConfig, max_model_len: int | None) -> RopeSpec:
    """Frequencies and attention factor of a model.

    In transformers, `dynamic` and `longrope` scaling depend on the length of the sequence, so cached keys would have to
    be rotated again as it grows. Here they are fixed for the served length. `dynamic` is plain if `max_model_len` is at
    most `max_position_embeddings`; otherwise its theta is that of transformers for a sequence of `max_model_len`.
    `longrope` uses the short factors if `max_model_len` is at most the trained length, otherwise the long ones.

    Args:
        config: The model.
        max_model_len: Longest sequence served; None is `config.default_context_len`.

    Returns:
        Angular frequencies in radians per position, one for each pair of rotated dimensions, and the attention factor.

        Raises:
        ModelError: The rope type is unknown, or a field that it needs is missing.
    """
    rope = config.rope
    if rope.rope_type not in _RULES:
        raise rope.options.error("rope_type", f"must be one of {', '.join(_RULES)}, got {shown(rope.rope_type)}")
    try:
        with np.errstate(all="ignore"):
            inv_freq, attention_factor = _RULES[rope.rope_type](config, max_model_len or config.default_context_len)
    except ArithmeticError:
        inv_freq, attention_factor = np.full(1, np.nan), 1.0
    # Kernels rotate in float32.
    if not (np.append(inv_freq, attention_factor) < _FLOAT32_MAX).all():
        raise rope.options.error("rope_type", f"{rope.rope_type!r} gives no finite frequencies with these values")
    return RopeSpec(inv_freq=tuple(inv_freq.tolist()), attention_factor=attention_factor)


def _frequencies(theta: float, dim: int) -> Float64:
    powers: Float64 = np.arange(0, dim, 2, dtype=np.float64) / dim
    return theta**-powers


def _default(config: ModelConfig, max_model_len: int) -> tuple[Float64, float]:
    return _frequencies(config.rope.theta, config.rope.rotary_dim), 1.0


def _linear(config: ModelConfig, max_model_len: int) -> tuple[Float64, float]:
    return _frequencies(config.rope.theta, config.rope.rotary_dim) / config.rope.options.positive("factor"), 1.0


def _dynamic(config: ModelConfig, max_model_len: int) -> tuple[Float64, float]:
    factor, dim = config.rope.options.positive("factor"), config.rope.rotary_dim
    stretch = max(max_model_len / config.max_position_embeddings, 1.0)
    theta = config.rope.theta * (factor * stretch - (factor - 1.0)) ** (dim / (dim - 2))
    return _frequencies(theta, dim), 1.0


def _llama3(config: ModelConfig, max_model_len: int) -> tuple[Float64, float]:
    """Divide low frequencies by `factor`, keep high ones, and interpolate in between."""
    options = config.rope.options
    low, high = options.positive("low_freq_factor"), options.positive("high_freq_factor")
    if high <= low:
        raise options.error("high_freq_factor", f"must exceed low_freq_factor {low}, got {high}")
    inv_freq = _frequencies(config.rope.theta, config.rope.rotary_dim)
    num_rotations = config.rope.original_max_len * inv_freq / (2.0 * math.pi)
    kept = np.clip((num_rotations - low) / (high - low), 0.0, 1.0)
    return inv_freq * (kept + (1.0 - kept) / options.positive("factor")), 1.0


def _yarn(config: ModelConfig, max_model_len: int) -> tuple[Float64, float]:
    """Keep dimensions that rotate more than `beta_fast` times in the trained length; interpolate below `beta_slow`."""
    options, dim = config.rope.options, config.rope.rotary_dim
    factor = options.positive("factor", config.max_position_embeddings / config.rope.original_max_len)
    low = _yarn_dimension(options.positive("beta_fast", 32.0), config)
    high = _yarn_dimension(options.positive("beta_slow", 1.0), config)
    options.refuse_nulls("truncate")
    if options.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, dim - 1.0)
    # As in transformers: a ramp of width 0 gets width 0.001.
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
    inv_freq = _frequencies(config.rope.theta, dim)
    return inv_freq * (interpolated / factor + (1.0 - interpolated)), _yarn_attention_factor(config, factor)


def _yarn_dimension(num_rotations: float, config: ModelConfig) -> float:
    """The (fractional) dimension that rotates `num_rotations` times in the trained length (YaRN, section 3.2)."""
    wavelength = config.rope.original_max_len / num_rotations
    return config.rope.rotary_dim * math.log(wavelength / (2.0 * math.pi)) / (2.0 * math.log(config.rope.theta))


def _yarn_attention_factor(config: ModelConfig, factor: float) -> float:
    options = config.rope.options
    if options.has("attention_factor"):
        return options.positive("attention_factor")
    # DeepSeek gives two mscales; only one, or one that is 0, counts as absent.
    if options.values.get("mscale") and options.values.get("mscale_all_dim"):
        return _mscale(factor, options.positive("mscale")) / _mscale(factor, options.positive("mscale_all_dim"))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _longrope(config: ModelConfig, max_model_len: int) -> tuple[Float64, float]:
    """Divide each frequency by its own factor; there is one list of factors for short and one for long sequences."""
    options, rope = config.rope.options, config.rope
    inv_freq = _frequencies(rope.theta, rope.rotary_dim)
    short, long = (np.array(options.positives(name, len(inv_freq))) for name in ("short_factor", "long_factor"))
    factor = options.positive("factor", config.max_position_embeddings / rope.original_max_len)
    factors = long if max_model_len > rope.original_max_len else short
    return inv_freq / factors, _longrope_attention_factor(config, factor)


def _longrope_attention_factor(config: ModelConfig, factor: float) -> float:
    """Compensates the change of the scores' spread in a context `factor` times the trained one (as in transformers)."""
    options = config.rope.options
    if options.has("attention_factor"):
        return options.positive("attention_factor")
    return 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(config.rope.original_max_len))


_RULES: dict[str, Callable[[ModelConfig, int], tuple[Float64, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
