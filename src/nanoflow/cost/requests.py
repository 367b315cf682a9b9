"""What one request costs, in seconds of compute and of memory, so that requests can be put in an order."""

from __future__ import annotations

from nanoflow.batch_files.order import RequestCost
from nanoflow.cost.model import CostedModel
from nanoflow.hardware import ResourceRates

_FLOPS_A_PARAMETER = 2


def request_cost(model: CostedModel, rates: ResourceRates) -> RequestCost:
    """The costs of a token and of a key.

    Args:
        model: The model; a token passes its active parameters once, with a multiplication and an addition each.
        rates: Of the GPUs that share it.
    """
    return RequestCost(
        token_s=_FLOPS_A_PARAMETER * model.num_active_parameters / rates.compute_flops_per_s,
        key_s=model.kv_bytes(1.0) / rates.memory_bytes_per_s,
    )
