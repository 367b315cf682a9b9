"""Launches of operations in FP8 on random inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nanoflow.graph.layers import FP8_BLOCK, Fp8
from nanoflow.graph.operation import NormDims, OpKind, RowDims
from nanoflow.kernels import reference_fp8
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.reference_experts_fp8 import EXPERT_FP8_KERNELS
from nanoflow.models.fp8 import E4M3, quantise_rows
from tests.elementwise_cases import Cases
from tests.gemm_cases import linear_case


def row_case(cases: Cases, kind: OpKind, width: int, *, is_kept: bool = False) -> Launch:
    """An operation that quantises the rows it writes, which have `width` elements; `is_kept` keeps them as well."""
    launch = {
        OpKind.RMS_NORM_FP8: cases.rms_norm,
        OpKind.SWIGLU_FP8: cases.swiglu,
        OpKind.GEGLU_FP8: cases.geglu,
        OpKind.QUANTISE_FP8: cases.swiglu,
    }[kind](width)
    (rows,) = launch.writes
    dims = launch.op.dims if isinstance(launch.op.dims, NormDims) else RowDims(width=width)
    reads = (launch.reads[0][:, :width].contiguous(),) if kind is OpKind.QUANTISE_FP8 else launch.reads
    writes = (rows.new_empty(rows.shape, dtype=E4M3), rows.new_full((len(rows), 1), torch.nan, dtype=torch.float32))
    return replace(
        launch,
        op=replace(launch.op, kind=kind, dims=dims),
        reads=reads,
        writes=(*writes, rows) if is_kept else writes,
    )


def assert_rows(fast: Kernel, slow: Kernel, launch: Launch, *, moved: float) -> None:
    """Both kernels write the same scales, and the same numbers but for a part of them, which may be the next ones.

    Args:
        fast, slow: The kernels.
        launch: Their argument.
        moved: The part.
    """
    numbers, scales, *kept = launch.writes
    fast(launch)
    ours = [tensor.clone() for tensor in (numbers, scales, *kept)]
    slow(launch)
    torch.testing.assert_close(ours[1], scales, rtol=8e-3, atol=0.0)
    is_moved = ours[0].view(torch.uint8) != numbers.view(torch.uint8)
    assert is_moved.float().mean() <= moved
    for one, other in zip(ours[2:], kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def product_case(
    num_tokens: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_blocked: bool = False,
    has_bias: bool = False,
) -> Launch:
    """A product with a weight [N, K] = `shape`, whose scales differ widely; outputs are about 1, and NaN before."""
    launch = linear_case(num_tokens, shape, dtype, device, has_bias=has_bias)
    x, x_scales = quantise_rows(launch.reads[0])
    weight, row_scales = quantise_rows(launch.weights[0])
    scales = row_scales[:, 0].contiguous()
    if is_blocked:
        drawn = torch.rand(Fp8(block=FP8_BLOCK).scales_shape(shape), device=device)
        scales = drawn * float(scales.mean())
    return replace(launch, reads=(x, x_scales), weights=(weight, scales, *launch.weights[1:]))


def experts_case(launch: Launch, *, is_blocked: bool = False) -> Launch:
    """A grouped product of 16-bit numbers (`expert_cases.py`) in FP8; scales of blocks are drawn, and differ widely."""
    x, *order = launch.reads
    (weight,) = launch.weights
    is_first = launch.op.kind is OpKind.EXPERTS_IN
    numbers, x_scales = quantise_rows(x if is_first else x.view(order[0].numel(), -1))
    quantised, row_scales = quantise_rows(weight)
    scales = row_scales[..., 0].contiguous()
    if is_blocked:
        drawn = torch.rand(Fp8(block=FP8_BLOCK).scales_shape(tuple(weight.shape)), device=weight.device)
        scales = (drawn + 0.1) * float(scales.mean())
    kind = OpKind.EXPERTS_IN_FP8 if is_first else OpKind.EXPERTS_OUT_FP8
    return replace(
        launch,
        op=replace(launch.op, kind=kind),
        reads=(numbers.view_as(x), x_scales if is_first else x_scales.view_as(order[0]), *order),
        weights=(quantised, scales),
    )


def exact_experts(launch: Launch) -> Tensor:
    """A grouped product in FP8 by its reference kernel."""
    out = torch.empty_like(launch.writes[0])
    EXPERT_FP8_KERNELS[launch.op.kind](replace(launch, writes=(out,)))
    return out


def assert_experts(launch: Launch, num_rows: int) -> None:
    """What was written is the reference's, row by row: tensor cores that sum fast keep about 13 bits of what they add.

    A wrong scale, expert, row or column is far beyond that.
    """
    out, exact = (each.float().view(num_rows, -1) for each in (launch.writes[0], exact_experts(launch)))
    assert out.isfinite().all()
    errors = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors.max() < 3e-2 and errors.mean() < 1e-2, (float(errors.max()), float(errors.mean()))


def added_to(launch: Launch) -> Launch:
    """The product added to random rows."""
    hidden = torch.randn_like(launch.writes[0])
    return replace(launch, reads=(*launch.reads, hidden), writes=(hidden,))


def gated(launch: Launch) -> Launch:
    """The product [T, 2 I] with SwiGLU of its halves as the output."""
    half = launch.writes[0].shape[1] // 2
    op = replace(launch.op, kind=OpKind.LINEAR_SWIGLU_FP8)
    return replace(launch, op=op, writes=(launch.writes[0][:, :half].contiguous(),))


def assert_gated(out: Tensor, expected: Tensor) -> None:
    """SwiGLU of products that tensor cores have summed fast: of numbers about 1, two errors of `assert_product`."""
    torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(out.dtype).eps, atol=0.15)
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert error < 2e-2


def carried_case(kind: str, num_tokens: int, shape: tuple[int, int], device: torch.device) -> tuple[Launch, Tensor]:
    """`attention_cases.carrier_case` in FP8: a product, and its result in float32 (SwiGLU's in bfloat16)."""
    launch = product_case(num_tokens, shape, torch.bfloat16, device, has_bias=kind == "bias")
    if kind == "add":
        launch = replace(added_to(launch), op=replace(launch.op, kind=OpKind.LINEAR_ADD_FP8))
    elif kind == "swiglu":
        launch = gated(launch)
        expected = torch.empty_like(launch.writes[0])
        reference_fp8.linear_swiglu_fp8(replace(launch, writes=(expected,)))
        return launch, expected
    else:
        launch = replace(launch, op=replace(launch.op, kind=OpKind.LINEAR_FP8))
    return launch, exact_product(launch)


def exact_product(launch: Launch) -> Tensor:
    """By the reference kernel, in float32, rounded once."""
    exact = launch.writes[0].float()
    kernel = reference_fp8.linear_add_fp8 if len(launch.reads) > 2 else reference_fp8.linear_fp8
    kernel(replace(launch, reads=(*launch.reads[:2], exact), writes=(exact,)))
    return exact


def assert_product(out: Tensor, exact: Tensor, *, has_fast_sums: bool) -> None:
    """Equal up to rounding; tensor cores that sum fast keep about 13 bits of what they add."""
    step = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.float(), exact, rtol=step, atol=5e-2 if has_fast_sums else 2e-3)
    error = (out.float() - exact).norm() / exact.norm()
    assert error < (1e-2 if has_fast_sums else 0.0) + step / 2
