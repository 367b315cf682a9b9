"""What config.json says about rotary embeddings: one, or one for layers with a window and one for the others.

What the fields mean in all is `config.py`'s; which frequencies come of them, `rope.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from nanoflow.models.fields import Fields, ModelError, shown
from nanoflow.models.model import RopeConfig
from nanoflow.models.readings import Reading

logger = logging.getLogger(__name__)

# Rotary embeddings of an architecture with two of them, and where the base of the first stands in older files.
_LOCAL, _GLOBAL, _LOCAL_THETA = "sliding_attention", "full_attention", "rope_local_base_freq"
# Types of rotary embeddings that have a length the model was trained on.
_WITH_TRAINED_LEN = ("llama3", "yarn", "longrope")


def rope_of(fields: Fields, reading: Reading, head_dim: int) -> RopeConfig:
    """The rotary embedding; values inside its object win over those outside, but for the trained length.

    Of an architecture with two of them it is that of layers without a window.

    Raises:
        ModelError: A field makes no sense, or asks for what is not served.
    """
    options = _of_kind(fields, _GLOBAL) if _LOCAL_THETA in fields.values else _rope_options(fields)
    return _rope_config(fields, options, reading, head_dim, fields.positive("rope_theta"))


def local_rope_of(fields: Fields, reading: Reading, head_dim: int) -> RopeConfig | None:
    """That of layers with a window, where the architecture has another one for them; None elsewhere.

    Raises:
        ModelError: As `rope_of`.
    """
    if _LOCAL_THETA not in fields.values:
        return None
    return _rope_config(fields, _of_kind(fields, _LOCAL), reading, head_dim, fields.positive(_LOCAL_THETA))


def _of_kind(fields: Fields, kind: str) -> Fields:
    """`rope_parameters` of one kind of layer; `rope_scaling` (transformers 4) adds to those of the global one."""
    parameters, scaling = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    if unknown := sorted(parameters.values.keys() - {_LOCAL, _GLOBAL}):
        raise parameters.error(unknown[0], f"is none of {_GLOBAL} and {_LOCAL}, of which each has its own")
    if kind == _GLOBAL and "type" in scaling.values and "rope_type" not in scaling.values:
        # transformers takes no notice of it here.
        raise scaling.error("type", "must be called rope_type")
    own = parameters.nested(kind)
    own = Fields(values={**own.values, **scaling.values}, origin=own.origin) if kind == _GLOBAL else own
    if own.values.get("truncate", True) is not True:
        # transformers looks for it where it does not stand.
        raise own.error("truncate", "must be true where layers have rotary embeddings of their own")
    return own


def _rope_config(fields: Fields, options: Fields, reading: Reading, head_dim: int, theta: float) -> RopeConfig:
    """What `options` say, or where they do not, `fields`; `theta` is the base if they have none."""
    options.refuse_nulls("rope_type", "rope_theta")
    rope_type = _rope_type(options, reading)
    theta = options.positive("rope_theta", theta)
    if theta <= 1.0:
        raise fields.error("rope_theta", f"must exceed 1, got {theta:g}")
    original_max_len = max_position_embeddings = fields.positive_int("max_position_embeddings")
    if rope_type in _WITH_TRAINED_LEN:
        options.refuse_nulls("original_max_position_embeddings")
        # A value outside is the trained length itself and wins, as in transformers.
        holder = fields if fields.has("original_max_position_embeddings") else options
        original_max_len = holder.positive_int("original_max_position_embeddings", max_position_embeddings)
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        original_max_len=original_max_len,
        rotary_dim=_rotary_dim(fields, options, reading, head_dim),
        options=options,
    )


def _rope_type(options: Fields, reading: Reading) -> str:
    rope_type = options.text("rope_type", options.text("type", "default"))
    if reading.rope_types is None:
        return rope_type
    if rope_type not in reading.rope_types:
        raise options.error("rope_type", f"must be one of {', '.join(reading.rope_types)}, got {shown(rope_type)}")
    return reading.rope_types[rope_type]


def _rotary_dim(fields: Fields, options: Fields, reading: Reading, head_dim: int) -> int:
    """Dimensions of a head that are rotated; what the rope parameters say of them wins over what stands outside."""
    name = "partial_rotary_factor"
    if not reading.can_rotate_in_part:
        for holder in (options, fields):
            if (given := holder.raw(name, 1.0)) != 1.0:
                problem = f"must be 1, as models of type {reading.model_type} rotate whole heads, got {shown(given)}"
                raise holder.error(name, problem)
        return head_dim
    holder = options if name in options.values else fields
    holder.refuse_nulls(name)
    factor = holder.positive(name)
    rotary_dim = int(head_dim * factor) if factor <= 1.0 else 0
    if rotary_dim == 0:
        raise holder.error(name, f"must be at most 1 and rotate some of a head's {head_dim} dimensions, got {factor}")
    return rotary_dim


def _rope_options(fields: Fields) -> Fields:
    """`rope_scaling` (transformers 4) or `rope_parameters` (5); of both the former, as transformers does."""
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    if scaling.values and parameters.values and scaling.values != parameters.values:
        logger.warning("%s: rope_scaling and rope_parameters differ, rope_scaling is used", fields.origin)
    options = scaling if scaling.values else parameters
    if any(isinstance(value, Mapping) for value in options.values.values()) or options.values.keys() & {
        _LOCAL,
        _GLOBAL,
    }:
        raise ModelError(f"{options.origin}: rotary embeddings that differ between layers are not served")
    return options
