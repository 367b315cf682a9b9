"""What grouped products of experts do with their sums before they are written: biases, and the clamped activation.

Functions of kernels, shared by the products of 16-bit weights (`triton_experts.py`) and of packed ones
(`triton_experts_mxfp4.py`). Rounding is that of the separate operations in `reference_experts.activate`.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.graph.experts import ClampedSwiglu, ExpertDims
from nanoflow.kernels.launch import Launch


def clamped_of(launch: Launch) -> ClampedSwiglu | None:
    """The activation of a first product; None for silu(gate) * up."""
    assert isinstance(launch.op.dims, ExpertDims)
    return launch.op.dims.clamped


def alpha_and_limit(clamped: ClampedSwiglu | None) -> tuple[float | None, float | None]:
    """The activation as constants of a kernel, which compiles it for these; None, None for silu(gate) * up."""
    return (None, None) if clamped is None else (clamped.alpha, clamped.limit)


@triton.jit
def bias_of(bias: tl.tensor, first: tl.tensor, columns: tl.tensor, num_columns: int) -> tl.tensor:
    """float32: the bias of these columns of a matrix whose biases begin at `first`; 0 behind the last column."""
    return tl.load(bias + first + columns, mask=columns < num_columns, other=0.0).to(tl.float32)


@triton.jit
def activated(
    gate: tl.tensor, up: tl.tensor, dtype: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr
) -> tl.tensor:
    """silu(gate) * up, or if there is a limit (up + 1) * gate * sigmoid(ALPHA * gate) of clamped values."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    if LIMIT is None:
        share = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        cells = share * up
    else:
        # The limit is rounded as an operation on tensors of the type would round it. NaN stays NaN.
        most = tl.full([], LIMIT, tl.float32).to(dtype).to(tl.float32)
        gate = tl.where(gate > most, most, gate)
        up = tl.where(up > most, most, tl.where(up < -most, -most, up))
        exponent = (gate * ALPHA).to(dtype).to(tl.float32)
        share = (1.0 / (1.0 + tl.exp(-exponent))).to(dtype).to(tl.float32)
        cells = (gate * share).to(dtype).to(tl.float32) * (up + 1.0).to(dtype).to(tl.float32)
    return cells.to(dtype)
