"""Reads the fields of config.json about a mixture of experts.

It knows fields alone. Which of them an architecture has is in `readings.py`; what experts compute is in `moe.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.models.fields import Fields, shown

# More experts than any model has; bounds memory.
_MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The experts of a model.

    Attributes:
        num_experts: Experts of a sparse layer.
        num_per_token: How many of them a token passes.
        intermediate_size: Width of one expert.
        is_normalised: Whether the probabilities of a token's experts are divided by their sum.
        sparse_layers: For each layer whether it has experts; others have one dense feed-forward block.
        shared_intermediate_size: Width of the shared expert, which every token passes; None if there is none.
    """

    num_experts: int
    num_per_token: int
    intermediate_size: int
    is_normalised: bool
    sparse_layers: tuple[bool, ...]
    shared_intermediate_size: int | None


def experts_of(fields: Fields, count_names: Sequence[str], num_layers: int) -> ExpertsConfig | None:
    """The experts that the fields describe; None for a dense architecture.

    Args:
        fields: All fields that the architecture has.
        count_names: Names of the field with the number of experts; the first one that is there counts. Empty for a
            dense architecture.
        num_layers: Layers of the model.

    Raises:
        ModelError: A field is invalid.
    """
    if not count_names:
        return None
    name = next((name for name in count_names if fields.has(name)), count_names[-1])
    num_experts = fields.positive_int(name, most=_MAX_EXPERTS)
    num_per_token = fields.positive_int("num_experts_per_tok")
    if num_per_token > num_experts:
        raise fields.error("num_experts_per_tok", f"must be at most {name} {num_experts}, got {num_per_token}")
    own = "moe_intermediate_size" if "moe_intermediate_size" in fields.values else "intermediate_size"
    shared = "shared_expert_intermediate_size"
    return ExpertsConfig(
        num_experts=num_experts,
        num_per_token=num_per_token,
        intermediate_size=fields.positive_int(own),
        # Without the field, as in Mixtral, they always are.
        is_normalised=fields.flag("norm_topk_prob", default=True),
        sparse_layers=_sparse_layers(fields, num_layers),
        shared_intermediate_size=fields.positive_int(shared) if shared in fields.values else None,
    )


def _sparse_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer, unless it is one of `mlp_only_layers`."""
    step = fields.positive_int("decoder_sparse_step", 1)
    dense = fields.raw("mlp_only_layers", [])
    if not isinstance(dense, list) or any(not isinstance(each, int) or isinstance(each, bool) for each in dense):
        raise fields.error("mlp_only_layers", f"must be a list of layers, got {shown(dense)}")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
