"""Chooses the kernel of each operation on a device: a fast one where it pays, else the reference kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.operation import AttentionDims, KvType, LinearDims, Operation, OpKind
from nanoflow.kernels import reference, reference_experts, reference_experts_fp8, sample
from nanoflow.kernels.cpu import CPU_KERNELS
from nanoflow.kernels.hopper import has_gluon
from nanoflow.kernels.launch import Kernel
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.reference_fp8 import FP8_KERNELS
from nanoflow.kernels.reference_mxfp4 import MXFP4_KERNELS

Kernels = dict[OpKind, Kernel]
# Elements to which rows, and the halves of gate_up, must be aligned for the tensor memory accelerator.
_TMA_MULTIPLE = 16
# Elements to which rows alone must be.
_ROW_MULTIPLE = 8
# First compute capability with instructions for 8-bit floating point (Ada).
_FP8_CAPABILITY = (8, 9)


def kernels_for(device: torch.device, dtype: torch.dtype, layer: tuple[Operation, ...]) -> Kernels:
    """The kernels of a device for a model's dtype and layer operations, one for each kind of operation.

    Fused kinds, which are two operations in one kernel, are included only where they pay.

    Raises:
        ValueError: The device is not supported, or has no kernel for an operation.
    """
    if device.type not in _KERNELS:
        raise ValueError(f"no kernels for device {device.type!r}; there are some for {', '.join(_KERNELS)}")
    kernels = _KERNELS[device.type](device, dtype, layer)
    if missing := sorted({op.kind for op in layer} - kernels.keys()):
        raise ValueError(f"no kernel for {', '.join(missing)} on device {device.type!r}: this model cannot run there")
    return kernels


def multiplies_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has fast products in FP8 for activations of this type; other devices emulate them slowly."""
    if device.type != "cuda" or dtype.itemsize != 2 or importlib.util.find_spec("triton") is None:
        return False
    from nanoflow.kernels import triton_gemm

    return triton_gemm.has_tma(device)


def unpacks_mxfp4(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has fast products of weights in MXFP4 for activations of this type."""
    return dtype == torch.bfloat16 and multiplies_fp8(device, dtype)


def are_capturable(kernels: Kernels, layer: tuple[Operation, ...]) -> bool:
    """Whether a CUDA graph can capture the kernels of these operations: none of them reads lengths on the host."""
    return not _READING_ON_HOST & {kernels[op.kind] for op in layer}


def _cpu_kernels(_device: torch.device, _dtype: torch.dtype, _layer: tuple[Operation, ...]) -> Kernels:
    return CPU_KERNELS


def _cuda_kernels(device: torch.device, dtype: torch.dtype, layer: tuple[Operation, ...]) -> Kernels:
    if importlib.util.find_spec("triton") is None:
        return {**REFERENCE_KERNELS, **FP8_KERNELS, **MXFP4_KERNELS}
    from nanoflow.kernels import triton_attention, triton_fp8_split, triton_gemm
    from nanoflow.kernels.triton_elementwise import ELEMENTWISE_KERNELS
    from nanoflow.kernels.triton_experts_fp8 import EXPERT_FP8_PRODUCT_KERNELS
    from nanoflow.kernels.triton_experts_mxfp4 import TRITON_MXFP4_KERNELS
    from nanoflow.kernels.triton_experts_rows import EXPERT_ROW_KERNELS
    from nanoflow.kernels.triton_fp8_rows import FP8_ROW_KERNELS

    attentions = [op.dims for op in layer if isinstance(op.dims, AttentionDims)]
    _require_kv_type(attentions, torch.cuda.get_device_capability(device))
    kernels = {**REFERENCE_KERNELS, **FP8_KERNELS, **MXFP4_KERNELS, **ELEMENTWISE_KERNELS, **EXPERT_ROW_KERNELS}
    if multiplies_fp8(device, dtype):
        kernels |= {**FP8_ROW_KERNELS, **triton_fp8_split.products(), **EXPERT_FP8_PRODUCT_KERNELS}
    if unpacks_mxfp4(device, dtype):
        kernels |= TRITON_MXFP4_KERNELS
    # Other models get the reference kernels.
    if all(triton_attention.can_attend(dims.head_dim) for dims in attentions):
        kernels[OpKind.DECODE_ATTENTION] = triton_attention.decode_attention
        kernels[OpKind.PREFILL_ATTENTION] = triton_attention.prefill_attention
    if has_gluon():
        from nanoflow.kernels.hopper import attention

        # It leaves layers with a window to the kernel in Triton.
        if all(attention.can_attend(device, dtype, replace(dims, window=None)) for dims in attentions):
            kernels[OpKind.DECODE_ATTENTION] = attention.decode_attention
    if dtype.itemsize == 2 and triton_gemm.has_tma(device):
        products = [op.dims for op in layer if isinstance(op.dims, LinearDims)]
        if not any(size % _TMA_MULTIPLE for dims in products for size in (dims.in_features, dims.out_features)):
            kernels[OpKind.LINEAR_SWIGLU] = triton_gemm.linear_swiglu
        kernels |= _grouped_products(layer)
    return kernels


def _grouped_products(layer: tuple[Operation, ...]) -> Kernels:
    """The products of experts in Triton, if the rows of all tensors are aligned."""
    from nanoflow.kernels import triton_experts

    # What one product reads is as wide as what the other writes.
    if any(op.dims.in_features % _ROW_MULTIPLE for op in layer if isinstance(op.dims, ExpertDims)):
        return {}
    return {OpKind.EXPERTS_IN: triton_experts.experts_in, OpKind.EXPERTS_OUT: triton_experts.experts_out}


def _require_kv_type(attentions: Sequence[AttentionDims], capability: tuple[int, int]) -> None:
    """Refuse keys and values in 8 bits on a GPU without instructions for them."""
    if capability < _FP8_CAPABILITY and any(dims.kv_type is KvType.FP8 for dims in attentions):
        raise ValueError(
            f"kv_cache_dtype fp8_e4m3 needs a GPU of compute capability {_said(_FP8_CAPABILITY)} or more, this one has "
            f"{_said(capability)}: use auto"
        )


def _said(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleKernels:
    """The functions that choose tokens, with the interfaces of `sample.py`.

    Attributes:
        largest, choose, top_logprobs: The functions.
        workspace_bytes: Most device memory that they need beside their results, by numbers of rows and of tokens.
    """

    largest: Callable[[Tensor], tuple[Tensor, Tensor]]
    choose: Callable[..., tuple[Tensor, Tensor]]
    top_logprobs: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    workspace_bytes: Callable[[int, int], int]


def sample_kernels_for(device: torch.device) -> SampleKernels:
    """The Triton functions on an NVIDIA GPU, else the reference implementation in torch."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from nanoflow.kernels import triton_sample

        return SampleKernels(
            largest=triton_sample.largest,
            choose=triton_sample.choose,
            top_logprobs=triton_sample.top_logprobs,
            workspace_bytes=triton_sample.workspace_bytes,
        )
    return SampleKernels(
        largest=sample.largest,
        choose=sample.choose,
        top_logprobs=sample.top_logprobs,
        workspace_bytes=sample.workspace_bytes,
    )


_READING_ON_HOST: frozenset[Kernel] = frozenset(
    (
        reference.decode_attention,
        reference.prefill_attention,
        reference_experts.experts_in,
        reference_experts.experts_out,
        *reference_experts_fp8.EXPERT_FP8_KERNELS.values(),
        *MXFP4_KERNELS.values(),
    )
)
_KERNELS: dict[str, Callable[[torch.device, torch.dtype, tuple[Operation, ...]], Kernels]] = {
    "cpu": _cpu_kernels,
    "cuda": _cuda_kernels,
}
