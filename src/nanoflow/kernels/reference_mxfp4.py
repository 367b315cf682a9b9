"""Reference kernels of experts in MXFP4 in plain torch: each expert with rows is unpacked, then multiplied as usual.

Shape legend: T tokens, E experts, K experts of a token, H width of the model, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nanoflow.graph.operation import OpKind
from nanoflow.kernels import reference_experts
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.models.mxfp4 import numbers_of


def experts_in_mxfp4(launch: Launch) -> None:
    """`reference_experts.experts_in` with words int32 [E, 2 I, H / 8] and scales uint8 [E, H / 32, 2 I]."""
    reference_experts.multiply_in(launch, _of_expert(launch, is_gated=True))


def experts_out_mxfp4(launch: Launch) -> None:
    """`reference_experts.experts_out` with words int32 [E, H, I / 8] and scales uint8 [E, I / 32, H]."""
    reference_experts.multiply_out(launch, _of_expert(launch, is_gated=False))


def _of_expert(launch: Launch, *, is_gated: bool) -> Callable[[int], tuple[Tensor, ...]]:
    """The matrix of an expert, in the type of the rows, and its bias if it has one."""
    words, scales, *biases = launch.weights
    dtype = launch.reads[0].dtype

    def factors(expert: int) -> tuple[Tensor, ...]:
        numbers = numbers_of(words[expert], scales[expert], is_gated=is_gated)
        return (numbers.to(dtype), *(bias[expert] for bias in biases))

    return factors


MXFP4_KERNELS: dict[OpKind, Kernel] = {
    OpKind.EXPERTS_IN_MXFP4: experts_in_mxfp4,
    OpKind.EXPERTS_OUT_MXFP4: experts_out_mxfp4,
}
