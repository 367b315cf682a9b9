"""The operations of a sparse layer's experts as work to measure: launches on random numbers, FLOPs and bytes.

`experts.py` measures them; sizes are those of published models.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.experts import CombineDims, ExpertDims, OrderDims, RoutedDims, RouterDims, Routing
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import Operation, OpKind, Resource, RowDims
from nanoflow.kernels import reference_experts as reference
from nanoflow.kernels import triton_experts, triton_experts_rows
from nanoflow.kernels.launch import BatchInputs, Kernel, Launch
from nanoflow.profiler.site import equal_requests

DTYPE = torch.bfloat16
_ITEM_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of a sparse layer: E, K, H and I."""

    num_experts: int
    per_token: int
    width: int
    inner: int

    def routing(self, skew: float) -> Routing:
        """How tokens choose experts."""
        return Routing(num_experts=self.num_experts, num_per_token=self.per_token, skew=skew)

    def weights(self, device: torch.device) -> list[Tensor]:
        """Random matrices of EXPERTS_IN, EXPERTS_OUT and ROUTER; outputs are about 1."""
        shapes = (
            (self.num_experts, 2 * self.inner, self.width),
            (self.num_experts, self.width, self.inner),
            (self.num_experts, self.width),
        )
        # In place, as copies of a Mixtral's in float32 would not be small.
        return [torch.empty(shape, dtype=DTYPE, device=device).normal_(0.0, shape[-1] ** -0.5) for shape in shapes]


MODELS = {
    "mixtral-8x7b": Model(num_experts=8, per_token=2, width=4096, inner=14336),
    "qwen3-30b-a3b": Model(num_experts=128, per_token=8, width=2048, inner=768),
}


class Form(enum.StrEnum):
    """The numbers that a product multiplies: 16 bits, or FP8 with scales of rows or of blocks of the weight."""

    PLAIN = "16 bits"
    FP8 = "FP8"
    FP8_BLOCKS = "FP8 in blocks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An operation with its launch, kernel and reference, and what it computes and moves at least."""

    launch: Launch
    kernel: Kernel
    reference: Kernel
    flops: float
    num_bytes: float
    with_tiles: Callable[..., None] | None = None
    form: Form = Form.PLAIN


def works_of(model: Model, num_tokens: int, skew: float, weights: Sequence[Tensor]) -> dict[str, Work]:
    """The operations of a sparse block on random tokens, all on one routing."""
    routing, device = model.routing(skew), weights[0].device
    popularity = torch.tensor(routing.popularity, device=device)
    ids = torch.multinomial(popularity.expand(num_tokens, -1), model.per_token).int()
    rows = torch.empty((num_tokens, model.per_token), dtype=torch.int32, device=device)
    ends = torch.empty((num_tokens, model.num_experts), dtype=torch.int32, device=device)
    order = launch_of(OpKind.EXPERT_ORDER, OrderDims(routing=routing), (ids,), (rows, ends))
    reference.expert_order(order)
    ordered = Work(
        launch=order,
        kernel=triton_experts_rows.expert_order,
        reference=reference.expert_order,
        flops=0.0,
        num_bytes=4 * (2 * ids.numel() + model.num_experts),
    )
    row_wise = row_works(model, num_tokens, routing, weights[2])
    products = product_works(model, order, num_different(ids), weights)
    return {"router": row_wise["router"], "expert_order": ordered, **products, "combine": row_wise["combine"]}


def product_works(model: Model, order: Launch, num_touched: int, weights: Sequence[Tensor]) -> dict[str, Work]:
    """Both grouped products on the rows of an order."""
    num_tokens, num_rows, matrix = order.tokens.num_tokens, order.writes[0].numel(), model.width * model.inner
    device = weights[0].device
    x, activation, out = (
        torch.randn((num_tokens, width), device=device).to(DTYPE)
        for width in (model.width, model.per_token * model.inner, model.per_token * model.width)
    )
    first_dims = ExpertDims(
        in_features=model.width, out_features=2 * model.inner, routing=model.routing(0.0), is_gated=True
    )
    second_dims = replace(first_dims, in_features=model.inner, out_features=model.width, is_gated=False)
    written = torch.empty_like(activation)
    return {
        "experts_in": Work(
            launch=launch_of(OpKind.EXPERTS_IN, first_dims, (x, *order.writes), (written,), (weights[0],)),
            kernel=triton_experts.experts_in,
            reference=reference.experts_in,
            flops=first_dims.flops(num_tokens),
            num_bytes=_ITEM_BYTES * (2 * num_touched * matrix + num_tokens * model.width + num_rows * model.inner),
            with_tiles=triton_experts.run_experts_in,
        ),
        "experts_out": Work(
            launch=launch_of(OpKind.EXPERTS_OUT, second_dims, (activation, *order.writes), (out,), (weights[1],)),
            kernel=triton_experts.experts_out,
            reference=reference.experts_out,
            flops=second_dims.flops(num_tokens),
            num_bytes=_ITEM_BYTES * (num_touched * matrix + num_rows * (model.width + model.inner)),
            with_tiles=triton_experts.run_experts_out,
        ),
    }


def row_works(model: Model, num_tokens: int, routing: Routing, weight: Tensor) -> dict[str, Work]:
    """Router and weighted sum."""
    device = weight.device
    x, hidden, out = (
        torch.randn((num_tokens, width), device=device).to(DTYPE)
        for width in (model.width, model.width, model.per_token * model.width)
    )
    shares = torch.rand((num_tokens, model.per_token), device=device)
    ids = torch.empty_like(shares, dtype=torch.int32)
    router = RouterDims(in_features=model.width, routing=routing, is_normalised=True)
    combine = CombineDims(width=model.width, routing=routing)
    return {
        "router": Work(
            launch=launch_of(OpKind.ROUTER, router, (x,), (torch.empty_like(shares), ids), (weight,)),
            kernel=triton_experts_rows.router,
            reference=reference.router,
            flops=router.flops(num_tokens),
            num_bytes=_ITEM_BYTES * router.elements(num_tokens),
        ),
        "combine": Work(
            launch=launch_of(OpKind.COMBINE, combine, (out, shares, hidden), (hidden,)),
            kernel=triton_experts_rows.combine,
            reference=reference.combine,
            flops=combine.flops(num_tokens),
            num_bytes=_ITEM_BYTES * combine.elements(num_tokens),
        ),
    }


def num_different(ids: Tensor) -> int:
    """Experts that some token chose."""
    return len({*ids.flatten().tolist()})


def launch_of(
    kind: OpKind,
    dims: RoutedDims | RowDims,
    reads: tuple[Tensor, ...],
    writes: tuple[Tensor, ...],
    weights: tuple[Tensor, ...] = (),
) -> Launch:
    """A launch on these tensors."""
    return Launch(
        op=Operation(name=kind, kind=kind, resource=Resource.MEMORY, reads=(), writes=(), dims=dims),
        layer=0,
        tokens=TokenRange(start=0, stop=len(reads[0])),
        reads=reads,
        writes=writes,
        weights=weights,
        inputs=inputs_on(reads[0].device),
        cache=None,
    )


@functools.cache
def inputs_on(device: torch.device) -> BatchInputs:
    """Index tensors, which these operations do not read."""
    return InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=1, device=device).build(equal_requests(1, 0, 1, 16))
