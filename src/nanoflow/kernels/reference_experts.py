"""Reference kernels of a mixture of experts in plain torch; `reference.py` has those of all other operations.

Shape legend: T tokens of a range, E experts, K experts of a token, H width of the model, I width of an expert. A range
has T x K rows; row r belongs to token r // K. Router and weighted sum compute in float32 and round once. Router, order
and sum run on the device alone; the grouped products read on the host where each expert's rows end, so a CUDA graph
cannot capture them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoflow.graph.experts import ClampedSwiglu, CombineDims, ExpertDims, RouterDims
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.launch import Kernel, Launch


def router(launch: Launch) -> None:
    """weights float32 [T, K], ids int32 [T, K]: the K largest of softmax(x [T, H] @ weight [E, H]^T (+ bias [E]))."""
    dims = launch.op.dims
    assert isinstance(dims, RouterDims)
    (x,), (weights, ids), (weight, *bias) = launch.reads, launch.writes, launch.weights
    probabilities = F.linear(x, weight, *bias).float().softmax(-1)
    largest, chosen = probabilities.topk(dims.routing.num_per_token, dim=-1)
    if dims.is_normalised:
        largest = largest / largest.sum(-1, keepdim=True)
    weights.copy_(largest)
    ids.copy_(chosen)


def expert_order(launch: Launch) -> None:
    """The T x K rows by expert, in order of tokens within an expert, of ids [T, K].

    Writes rows int32 [T, K] (seen as [T x K]: the row that is at each place), and into the first row of ends int32
    [T, E] the place at which each expert's rows end.
    """
    (ids,), (rows, ends) = launch.reads, launch.writes
    by_expert, order = ids.flatten().sort(stable=True)
    rows.copy_(order.view_as(rows))
    experts = torch.arange(ends.shape[1], dtype=ids.dtype, device=ids.device)
    ends[0].copy_(torch.searchsorted(by_expert, experts, right=True))


def experts_in(launch: Launch) -> None:
    """activation [T, K x I], seen as [T x K, I] in the experts' order: silu(gate) * up of x [T, H] of each row's token.

    The weight is [E, 2 I, H], a bias [E, 2 I]; each expert has gate rows, then up rows.
    """
    multiply_in(launch, _of_expert(launch))


def multiply_in(launch: Launch, factors: Callable[[int], tuple[Tensor, ...]]) -> None:
    """`experts_in` with the matrix of each expert, and perhaps its bias, from a function."""
    dims = launch.op.dims
    assert isinstance(dims, ExpertDims)
    (x, rows, ends), (activation,) = launch.reads, launch.writes
    per_token, out = rows.shape[1], activation.view(rows.numel(), -1)
    tokens = rows.flatten() // per_token
    for expert, places in parts_of_experts(ends):
        gate_up = F.linear(x[tokens[places]], *factors(expert))
        activate(gate_up, dims.clamped, out[places])


def activate(gate_up: Tensor, clamped: ClampedSwiglu | None, out: Tensor) -> None:
    """out [rows, I] = the activation of gate and up in gate_up [rows, 2 I], which it may overwrite."""
    gate, up = gate_up.chunk(2, dim=-1)
    if clamped is None:
        torch.mul(F.silu(gate, inplace=True), up, out=out)
        return
    gate.clamp_(max=clamped.limit)
    up.clamp_(-clamped.limit, clamped.limit)
    torch.mul(up.add_(1.0), gate.mul_(torch.sigmoid(gate * clamped.alpha)), out=out)


def experts_out(launch: Launch) -> None:
    """out [T, K x H], seen as [T x K, H] in the tokens' order: activation of each row @ weight [E, H, I]^T (+ bias)."""
    multiply_out(launch, _of_expert(launch))


def multiply_out(launch: Launch, factors: Callable[[int], tuple[Tensor, ...]]) -> None:
    """`experts_out` with the matrix of each expert, and perhaps its bias, from a function."""
    (activation, rows, ends), (out,) = launch.reads, launch.writes
    by_expert, by_token, places_of = activation.view(rows.numel(), -1), out.view(rows.numel(), -1), rows.flatten()
    for expert, places in parts_of_experts(ends):
        by_token[places_of[places]] = F.linear(by_expert[places], *factors(expert))


def _of_expert(launch: Launch) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda expert: tuple(weight[expert] for weight in launch.weights)


def parts_of_experts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and their places; waits for the device, as the ends are read on the host."""
    found = ends[0].tolist()
    for expert, (start, stop) in enumerate(itertools.pairwise((0, *found))):
        if stop > start:
            yield expert, slice(start, stop)


def combine(launch: Launch) -> None:
    """hidden [T, H] += the sum of the K rows out [T, K x H] of each token, times weights [T, K]."""
    dims = launch.op.dims
    assert isinstance(dims, CombineDims)
    (out, weights, _), (hidden,) = launch.reads, launch.writes
    rows = out.view(*weights.shape, dims.width).float()
    hidden.copy_(hidden.float() + (rows * weights[..., None]).sum(1))


def shared_gate(launch: Launch) -> None:
    """activation [T, I] *= sigmoid(x [T, H] @ weight [1, H]^T)."""
    (x, _), (activation,), (weight,) = launch.reads, launch.writes, launch.weights
    activation.mul_(torch.mm(x, weight.t()).sigmoid())


EXPERT_KERNELS: dict[OpKind, Kernel] = {
    OpKind.ROUTER: router,
    OpKind.EXPERT_ORDER: expert_order,
    OpKind.EXPERTS_IN: experts_in,
    OpKind.EXPERTS_OUT: experts_out,
    OpKind.COMBINE: combine,
    OpKind.SHARED_GATE: shared_gate,
}
