"""Reads the quantisation of compressed-tensors: groups of modules, each with a form of its own.

`quantised.py` has the other methods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.models.fields import Fields, shown
from nanoflow.models.stored import Form, FormOf, Packed, Scaled

_KNOWN = (
    *("quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status", "version"),
    *("global_compression_ratio", "sparsity_config", "transform_config", "run_compressed"),
)
_KNOWN_OF_WEIGHTS = (
    *("num_bits", "type", "strategy", "symmetric", "group_size", "block_structure", "actorder", "dynamic"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")
# Orders in which columns were quantised for which the group of each is stored.
_ORDERED = ("group", "dynamic")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Modules that are stored alike: names, kinds of modules, or patterns that begin with `re:`."""

    targets: Sequence[str]
    form: Form
    title: str


def compressed(fields: Fields) -> tuple[str, FormOf]:
    """The title of the forms, and the form of each module; None for a module that is left out.

    Raises:
        ModelError: A format or field is not served.
    """
    _refuse_unknown(fields, _KNOWN)
    for name, harmless in (("sparsity_config", (None, "dense")), ("transform_config", (None,))):
        options = fields.nested(name)
        if options.values and (name != "sparsity_config" or options.values.get("format") not in harmless):
            raise fields.error(name, "must be empty: weights that are sparse or transformed are not served")
    groups = fields.nested("config_groups")
    if not groups.values:
        raise fields.error("config_groups", "is empty: it must say how weights are stored")
    form = fields.text("format", "pack-quantized")
    read = [_group(groups.nested(name), form) for name in groups.values]
    ignored = _names(fields, "ignore")

    def form_of(module: str) -> Form | None:
        if _is_among(module, ignored):
            return None
        return next((group.form for group in read if _is_among(module, group.targets)), None)

    titles = dict.fromkeys(group.title for group in read)
    return f"compressed-tensors {' and '.join(titles)}", form_of


def _group(fields: Fields, outer_format: str) -> _Group:
    _refuse_unknown(fields, ("targets", "weights", "input_activations", "output_activations", "format"))
    weights, stored_as = fields.nested("weights"), fields.text("format", outer_format)
    _refuse_unknown(weights, _KNOWN_OF_WEIGHTS)
    if stored_as not in _FORMATS:
        raise fields.error("format", f"must be one of {', '.join(_FORMATS)}, got {shown(stored_as)}: it is not served")
    bits, kind = weights.positive_int("num_bits"), weights.text("type", "int")
    strategy = weights.text("strategy", "group" if weights.has("group_size") else "tensor")
    if strategy not in _STRATEGIES:
        raise weights.error("strategy", f"must be one of {', '.join(_STRATEGIES)}, got {shown(strategy)}")
    block = _block(weights, strategy)
    has_zeros = not weights.flag("symmetric", default=True)
    form: Form
    if kind == "float" and bits == 8 and stored_as != "pack-quantized" and not has_zeros:
        form, title = Scaled(dtype="F8_E4M3", block=block), "FP8"
    elif kind == "int" and bits == 8 and stored_as in ("int-quantized", "naive-quantized"):
        if has_zeros and block is not None:
            raise weights.error("symmetric", "must be true where rows are in groups or blocks")
        form, title = Scaled(dtype="I8", block=block, has_zeros=has_zeros), "int8"
    elif kind == "int" and bits in (4, 8) and stored_as == "pack-quantized" and strategy != "block":
        size = None if block is None else block[1]
        is_ordered = weights.values.get("actorder") in _ORDERED
        form = Packed(bits=bits, group_size=size, has_zeros=has_zeros, is_ordered=is_ordered)
        title = f"int{bits}"
    else:
        raise fields.error("weights", f"has {bits} bits of type {shown(kind)} as {stored_as}, which is not served")
    return _Group(targets=_names(fields, "targets"), form=form, title=title)


def _block(weights: Fields, strategy: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if a row or all rows do."""
    if strategy == "group":
        return 1, weights.positive_int("group_size")
    if strategy == "block":
        return block_sizes(weights, "block_structure")
    return None


def block_sizes(fields: Fields, name: str) -> tuple[int, int]:
    """Rows and columns of a block, from a list of two whole numbers."""
    height, width = sizes = fields.positives(name, 2)
    if not (height.is_integer() and width.is_integer()):
        raise fields.error(name, f"must be two whole numbers, got {shown(sizes)}")
    return int(height), int(width)


def _names(fields: Fields, name: str) -> Sequence[str]:
    names = fields.raw(name, [])
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise fields.error(name, f"must be a list of names, got {shown(names)}")
    for each in names:
        try:
            re.compile(each.removeprefix("re:"))
        except re.error as error:
            if each.startswith("re:"):
                raise fields.error(name, f"has {shown(each)}, which is no pattern: {error}") from None
    return names


def _is_among(module: str, targets: Sequence[str]) -> bool:
    """Whether a module, which is a linear layer, is meant by one of these names, kinds or patterns."""
    for target in targets:
        if target == "Linear" or module == target or (target.startswith("re:") and re.match(target[3:], module)):
            return True
    return False


def _refuse_unknown(fields: Fields, known: Sequence[str]) -> None:
    for name, value in fields.values.items():
        if name not in known and value not in (None, False, "", [], {}):
            raise fields.error(name, "is not known; remove it if it says nothing on how the weights are stored")
