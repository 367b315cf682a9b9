"""Launches of the operations of experts on random inputs with a routing of any kind, and their expected results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.experts import (
    ClampedSwiglu,
    CombineDims,
    ExpertDims,
    OrderDims,
    RoutedDims,
    RouterDims,
    Routing,
    SharedGateDims,
)
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import Operation, OpKind, Resource
from nanoflow.kernels import reference_experts
from nanoflow.kernels.launch import Launch
from tests.graphs import batch_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCase:
    """A sparse layer's experts and tokens that are routed to them; the tensors that are written are NaN or -77.

    Attributes:
        num_experts, per_token: E and K.
        width, inner: Of the model and of an expert.
        ids: int32 [T, K], different experts of each token.
        dtype: Of numbers.
        has_biases: Whether router and experts have biases.
        clamped: The activation; None for SwiGLU.
    """

    num_experts: int
    per_token: int
    width: int
    inner: int
    ids: Tensor
    dtype: torch.dtype
    has_biases: bool = False
    clamped: ClampedSwiglu | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.ids.device

    @property
    def routing(self) -> Routing:
        """E and K."""
        return Routing(num_experts=self.num_experts, num_per_token=self.per_token)

    def random(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that is to be written."""
        dtype = dtype or self.dtype
        return torch.full(shape, torch.nan if dtype.is_floating_point else -77, dtype=dtype, device=self.device)

    def launch(
        self,
        kind: OpKind,
        reads: tuple[Tensor, ...],
        writes: tuple[Tensor, ...],
        weights: tuple[Tensor, ...] = (),
        dims: RoutedDims | None = None,
    ) -> Launch:
        """A launch of one operation."""
        dims = dims or OrderDims(routing=self.routing)
        return Launch(
            op=Operation(name=kind, kind=kind, resource=Resource.MEMORY, reads=(), writes=(), dims=dims),
            layer=0,
            tokens=TokenRange(start=0, stop=self.num_tokens),
            reads=reads,
            writes=writes,
            weights=weights,
            inputs=_INPUTS.build(batch_of([(0, 1)], 1, 8, 0)),
            cache=None,
        )

    def order(self) -> Launch:
        """EXPERT_ORDER of the ids."""
        rows = self.poisoned(self.num_tokens, self.per_token, dtype=torch.int32)
        ends = self.poisoned(self.num_tokens, self.num_experts, dtype=torch.int32)
        return self.launch(OpKind.EXPERT_ORDER, (self.ids,), (rows, ends))

    def ordered(self) -> tuple[Tensor, Tensor]:
        """Rows and ends, by the reference."""
        launch = self.order()
        reference_experts.expert_order(launch)
        rows, ends = launch.writes
        return rows, ends

    def first(self) -> Launch:
        """EXPERTS_IN; some gates are far from 0 on both sides."""
        weight = self.random(self.num_experts, 2 * self.inner, self.width).mul_(self.width**-0.5)
        weight[:, : self.inner : 7] *= 20.0
        activation = self.poisoned(self.num_tokens, self.per_token * self.inner)
        x = self.random(self.num_tokens, self.width)
        weights = (weight, *self._bias(self.num_experts, 2 * self.inner))
        return self.launch(OpKind.EXPERTS_IN, (x, *self.ordered()), (activation,), weights, self.dims(is_gated=True))

    def second(self) -> Launch:
        """EXPERTS_OUT."""
        weight = self.random(self.num_experts, self.width, self.inner).mul_(self.inner**-0.5)
        out = self.poisoned(self.num_tokens, self.per_token * self.width)
        activation = self.random(self.num_tokens, self.per_token * self.inner)
        weights = (weight, *self._bias(self.num_experts, self.width))
        dims = self.dims(is_gated=False)
        return self.launch(OpKind.EXPERTS_OUT, (activation, *self.ordered()), (out,), weights, dims)

    def dims(self, *, is_gated: bool) -> ExpertDims:
        """Sizes of EXPERTS_IN, or of EXPERTS_OUT."""
        return ExpertDims(
            in_features=self.width if is_gated else self.inner,
            out_features=2 * self.inner if is_gated else self.width,
            routing=self.routing,
            is_gated=is_gated,
            has_bias=self.has_biases,
            clamped=self.clamped if is_gated else None,
        )

    def _bias(self, *shape: int) -> tuple[Tensor, ...]:
        return (self.random(*shape),) if self.has_biases else ()

    def router(self, *, is_normalised: bool) -> Launch:
        """ROUTER; the ids of the case are not used."""
        dims = RouterDims(in_features=self.width, routing=self.routing, is_normalised=is_normalised)
        weights = self.poisoned(self.num_tokens, self.per_token, dtype=torch.float32)
        ids = self.poisoned(self.num_tokens, self.per_token, dtype=torch.int32)
        weight = self.random(self.num_experts, self.width).mul_(2 * self.width**-0.5)
        x, parameters = self.random(self.num_tokens, self.width), (weight, *self._bias(self.num_experts))
        return self.launch(OpKind.ROUTER, (x,), (weights, ids), parameters, dims)

    def combine(self) -> Launch:
        """COMBINE."""
        dims = CombineDims(width=self.width, routing=self.routing)
        hidden = self.random(self.num_tokens, self.width)
        shares = torch.rand((self.num_tokens, self.per_token), device=self.device)
        out = self.random(self.num_tokens, self.per_token * self.width)
        return self.launch(OpKind.COMBINE, (out, shares, hidden), (hidden,), dims=dims)

    def shared_gate(self) -> Launch:
        """SHARED_GATE; the gates are far from 0 and 1 for most tokens."""
        dims = SharedGateDims(in_features=self.width, width=self.inner)
        activation = self.random(self.num_tokens, self.inner)
        weight = self.random(1, self.width).mul_(self.width**-0.5)
        x = self.random(self.num_tokens, self.width)
        return self.launch(OpKind.SHARED_GATE, (x, activation), (activation,), (weight,), dims)


_INPUTS = InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=1, device=torch.device("cpu"))


def balanced(num_tokens: int, num_experts: int, per_token: int, device: torch.device) -> Tensor:
    """Random experts."""
    return torch.rand(num_tokens, num_experts, device=device).topk(per_token).indices.int()


def skewed(num_tokens: int, num_experts: int, per_token: int, device: torch.device) -> Tensor:
    """Expert i is the more popular the smaller i is, and the last half has no rows."""
    popularity = torch.arange(1, num_experts + 1, device=device).pow(-1.0)
    popularity[max(num_experts // 2, per_token) :] = 0.0
    return torch.multinomial(popularity.expand(num_tokens, -1), per_token).int()


def same(num_tokens: int, num_experts: int, per_token: int, device: torch.device) -> Tensor:
    """Every token passes the last K experts."""
    return torch.arange(num_experts - per_token, num_experts, device=device).int().repeat(num_tokens, 1)


ROUTINGS: dict[str, Callable[[int, int, int, torch.device], Tensor]] = {
    "balanced": balanced,
    "skewed": skewed,
    "same": same,
}


def exact(launch: Launch) -> Tensor:
    """The reference of a grouped product, summed in float32 and rounded once to its dtype."""
    out, dims = launch.writes[0], launch.op.dims
    assert isinstance(dims, ExpertDims)
    floats = tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in launch.reads)
    whole = replace(launch, reads=floats, weights=tuple(weight.float() for weight in launch.weights))
    if not dims.is_gated:
        wide = torch.empty_like(out, dtype=torch.float32)
        reference_experts.experts_out(replace(whole, writes=(wide,)))
        return wide.to(out.dtype)
    rows, ends = launch.reads[1:]
    gate_up = out.new_empty((rows.numel(), launch.weights[0].shape[1]), dtype=torch.float32)
    tokens = rows.flatten() // rows.shape[1]
    for expert, places in reference_experts.parts_of_experts(ends):
        gate_up[places] = torch.nn.functional.linear(
            floats[0][tokens[places]], *(each[expert] for each in whole.weights)
        )
    activated = out.new_empty((rows.numel(), gate_up.shape[1] // 2))
    reference_experts.activate(gate_up.to(out.dtype), dims.clamped, activated)
    return activated.view_as(out)
