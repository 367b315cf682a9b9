"""Row-wise operations of a mixture of experts in Triton: routing, the order of rows by expert, sums of experts' rows.

Grids depend on shapes only and nothing is read on the host, so a CUDA graph serves any routing. The product of a router
is cuBLAS's. The grouped products are in `triton_experts.py`. The references are the functions of these names in
`reference_experts.py`, with the same rounding.

Shape legend: T tokens, E experts, K experts of a token, H width of the model, I width of a shared expert.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl

from nanoflow.graph.experts import CombineDims, RouterDims
from nanoflow.graph.operation import OpKind
from nanoflow.kernels.launch import Kernel, Launch
from nanoflow.kernels.triton_elementwise import _BLOCK, _num_warps

# Probabilities of a program of the router: a few rows, whose largest elements are found in turn.
_ROUTED = 1024
# Rows that a program of the order reads at once, few of them or many.
_FEW_ORDERED, _ORDERED = 512, 4096


def router(launch: Launch) -> None:
    """weights float32 [T, K], ids int32 [T, K]: the K largest of softmax(x [T, H] @ weight [E, H]^T (+ bias [E])).

    Equal probabilities go to the expert with the smaller number. A row that is not finite has NaN as weights, and
    different experts nevertheless, so that their order is one.
    """
    dims = launch.op.dims
    assert isinstance(dims, RouterDims)
    (x,), (weights, ids), (weight, *bias) = launch.reads, launch.writes, launch.weights
    logits = F.linear(x, weight, *bias)
    num_experts, per_token = len(weight), dims.routing.num_per_token
    experts = triton.next_power_of_2(num_experts)
    num_rows = max(_ROUTED // experts, 1)
    _choose[(triton.cdiv(len(x), num_rows),)](
        *(logits, weights, ids, len(x)),
        *(num_experts, experts, per_token, triton.next_power_of_2(per_token), num_rows, dims.is_normalised),
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _choose(
    logits: tl.tensor,
    weights: tl.tensor,
    ids: tl.tensor,
    num_tokens: int,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    experts, choices = tl.arange(0, EXPERTS)[None, :], tl.arange(0, CHOICES)[None, :]
    is_expert = experts < NUM_EXPERTS
    is_inside = (rows < num_tokens) & is_expert
    exact = tl.load(logits + rows * NUM_EXPERTS + experts, mask=is_inside, other=float("-inf")).to(tl.float32)
    exact = tl.exp(exact - tl.max(exact, 1)[:, None])
    exact /= tl.sum(exact, 1)[:, None]
    # NaN comes after all numbers; experts that were chosen before, and those that do not exist, are never chosen.
    ranks = tl.where(is_expert, tl.where(exact == exact, exact, -1.0), -2.0)
    chosen = tl.zeros([ROWS, CHOICES], tl.int32)
    largest = tl.zeros([ROWS, CHOICES], tl.float32)
    for choice in tl.static_range(PER_TOKEN):
        value, best = tl.max(ranks, 1, return_indices=True)
        is_now = choices == choice
        chosen = tl.where(is_now, best[:, None], chosen)
        largest = tl.where(is_now, tl.where(value < 0.0, float("nan"), value)[:, None], largest)
        ranks = tl.where(experts == best[:, None], -2.0, ranks)
    if IS_NORMALISED:
        largest /= tl.sum(largest, 1)[:, None]
    is_written = (rows < num_tokens) & (choices < PER_TOKEN)
    tl.store(weights + rows * PER_TOKEN + choices, largest, mask=is_written)
    tl.store(ids + rows * PER_TOKEN + choices, chosen, mask=is_written)


def expert_order(launch: Launch) -> None:
    """The T x K rows by expert, in order of tokens within an expert, of ids [T, K].

    Writes rows int32 [T, K] (seen as [T x K]: the row that is at each place), and into the first row of ends int32
    [T, E] the place at which each expert's rows end. One program an expert counts the rows of the experts before it,
    then writes its own.
    """
    (ids,), (rows, ends) = launch.reads, launch.writes
    block = _FEW_ORDERED if ids.numel() <= _FEW_ORDERED else _ORDERED
    _order[(ends.shape[1],)](ids, rows, ends, ids.numel(), block, num_warps=_num_warps(block))


@triton.jit(do_not_specialize=["num_rows"])
def _order(ids: tl.tensor, rows: tl.tensor, ends: tl.tensor, num_rows: int, BLOCK: tl.constexpr) -> None:
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    num_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_rows, BLOCK):
        row = start + lanes
        num_before += (tl.load(ids + row, mask=row < num_rows, other=expert) < expert).to(tl.int32)
    place = tl.sum(num_before)
    for start in range(0, num_rows, BLOCK):
        row = start + lanes
        is_own = (tl.load(ids + row, mask=row < num_rows, other=-1) == expert).to(tl.int32)
        tl.store(rows + place + tl.cumsum(is_own, 0) - 1, row, mask=is_own > 0)
        place += tl.sum(is_own)
    tl.store(ends + expert, place)


def combine(launch: Launch) -> None:
    """hidden [T, H] += the sum of the K rows out [T, K x H] of each token, times weights [T, K]; rounded once."""
    assert isinstance(launch.op.dims, CombineDims)
    (out, weights, _), (hidden,) = launch.reads, launch.writes
    num_tokens, width = hidden.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    _combine[(num_tokens, triton.cdiv(width, block))](
        out, weights, hidden, width, block, weights.shape[1], num_warps=_num_warps(block)
    )


@triton.jit
def _combine(
    out: tl.tensor,
    weights: tl.tensor,
    hidden: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    before = tl.load(hidden + token * WIDTH + columns, mask=is_inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(PER_TOKEN):
        row = token * PER_TOKEN + choice
        cells = tl.load(out + row * WIDTH + columns, mask=is_inside, other=0.0)
        total += cells.to(tl.float32) * tl.load(weights + row)
    tl.store(hidden + token * WIDTH + columns, (before.to(tl.float32) + total).to(before.dtype), mask=is_inside)


def shared_gate(launch: Launch) -> None:
    """activation [T, I] *= sigmoid(x [T, H] @ weight [1, H]^T). One program a token."""
    (x, _), (activation,), (weight,) = launch.reads, launch.writes, launch.weights
    num_tokens, width = activation.shape
    features = x.shape[1]
    block = min(_BLOCK, triton.next_power_of_2(max(features, width)))
    _shared_gate[(num_tokens,)](x, activation, weight, features, width, block, num_warps=_num_warps(block))


@triton.jit
def _shared_gate(
    x: tl.tensor,
    activation: tl.tensor,
    weight: tl.tensor,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, FEATURES, BLOCK):
        feature = start + lanes
        is_inside = feature < FEATURES
        cells = tl.load(x + token * FEATURES + feature, mask=is_inside, other=0.0).to(tl.float32)
        sums += cells * tl.load(weight + feature, mask=is_inside, other=0.0).to(tl.float32)
    dtype = activation.dtype.element_ty
    # Rounded after the product and after the sigmoid, as the separate operations are.
    exact = tl.sum(sums).to(dtype).to(tl.float32)
    gate = (1.0 / (1.0 + tl.exp(-exact))).to(dtype).to(tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + lanes
        target = activation + token * WIDTH + column
        cells = tl.load(target, mask=column < WIDTH, other=0.0).to(tl.float32)
        tl.store(target, (cells * gate).to(dtype), mask=column < WIDTH)


EXPERT_ROW_KERNELS: dict[OpKind, Kernel] = {
    OpKind.ROUTER: router,
    OpKind.EXPERT_ORDER: expert_order,
    OpKind.COMBINE: combine,
    OpKind.SHARED_GATE: shared_gate,
}
