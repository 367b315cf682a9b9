"""The fields of config.json about rotary embeddings: one for all layers, or one for each kind of layer.

`config_json.py` calls this; `rope.py` computes frequencies from the result.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from nanoflow.models.fields import Fields, ModelError, shown
from nanoflow.models.model import RopeConfig
from nanoflow.models.readings import Reading

logger = logging.getLogger(__name__)

# Keys of the two rotary embeddings, and the field for the base of the local one in older files.
_LOCAL, _GLOBAL, _LOCAL_THETA = "sliding_attention", "full_attention", "rope_local_base_freq"
# Types of rotary embeddings with a field for the trained length.
_WITH_TRAINED_LEN = ("llama3", "yarn", "longrope")


def rope_of(fields: Fields, reading: Reading, head_dim: int) -> RopeConfig:
    """The rotary embedding, of layers without a window if an architecture has two.

    Fields inside its object take precedence over those outside, except for the trained length.

    Raises:
        ModelError: A field is invalid, or its value is not supported.
    """
    options = _of_kind(fields, _GLOBAL) if _LOCAL_THETA in fields.values else _rope_options(fields, reading)
    return _rope_config(fields, options, reading, head_dim, fields.positive("rope_theta"))


def local_rope_of(fields: Fields, reading: Reading, head_dim: int) -> RopeConfig | None:
    """The rotary embedding of layers with a window; None unless the architecture has a separate one for them.

    Raises:
        ModelError: As `rope_of`.
    """
    if _LOCAL_THETA not in fields.values:
        return None
    return _rope_config(fields, _of_kind(fields, _LOCAL), reading, head_dim, fields.positive(_LOCAL_THETA))


def _of_kind(fields: Fields, kind: str) -> Fields:
    """`rope_parameters` of one kind of layer; for the global kind `rope_scaling` (transformers 4) is merged in."""
    parameters, scaling = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    if unknown := sorted(parameters.values.keys() - {_LOCAL, _GLOBAL}):
        raise parameters.error(unknown[0], f"is none of {_GLOBAL} and {_LOCAL}, of which each has its own")
    if kind == _GLOBAL and "type" in scaling.values and "rope_type" not in scaling.values:
        # transformers ignores the older name `type` here.
        raise scaling.error("type", "must be called rope_type")
    own = parameters.nested(kind)
    own = Fields(values={**own.values, **scaling.values}, origin=own.origin) if kind == _GLOBAL else own
    if own.values.get("truncate", True) is not True:
        # transformers looks for this field in another place and would ignore it.
        raise own.error("truncate", "must be true where layers have rotary embeddings of their own")
    return own


def _rope_config(fields: Fields, options: Fields, reading: Reading, head_dim: int, theta: float) -> RopeConfig:
    """A rotary embedding from `options`, or from `fields` where they have none; `theta` is the default base."""
    options.refuse_nulls("rope_type", "rope_theta")
    rope_type = _rope_type(options, reading)
    theta = options.positive("rope_theta", theta)
    if theta <= 1.0:
        raise fields.error("rope_theta", f"must exceed 1, got {theta:g}")
    original_max_len = max_position_embeddings = fields.positive_int("max_position_embeddings")
    if rope_type in _WITH_TRAINED_LEN:
        options.refuse_nulls("original_max_position_embeddings")
        # A value outside the object is the trained length itself and takes precedence, as in transformers.
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
    """Number of rotated dimensions of a head; a value in the rope parameters takes precedence over one outside."""
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


def _rope_options(fields: Fields, reading: Reading) -> Fields:
    """`rope_scaling` (transformers 4) or `rope_parameters` (5); the former if both exist, as in transformers."""
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    if reading.default_rope is not None and not fields.has("rope_parameters"):
        parameters = scaling if scaling.values else Fields(values=reading.default_rope, origin=fields.origin)
    if scaling.values and parameters.values and scaling.values != parameters.values:
        logger.warning("%s: rope_scaling and rope_parameters differ, rope_scaling is used", fields.origin)
    options = scaling if scaling.values else parameters
    if any(isinstance(value, Mapping) for value in options.values.values()) or options.values.keys() & {
        _LOCAL,
        _GLOBAL,
    }:
        raise ModelError(f"{options.origin}: rotary embeddings that differ between layers are not served")
    return options
