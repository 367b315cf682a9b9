"""Decode attention inside products, for a whole Hopper card: products that carry a share of an attention each.

An attention is taken, carried by several products one after the other on one stream, and finished: what is left of it
is done by the same program without a product, and what several runs did of one head of a request is merged. Products
are twins of `linear`, `linear_add` and `linear_swiglu` in `reference.py`, the attention of `decode_attention`, rounded
at the same places. Which product carries what is decided elsewhere (`executor/inside.py`).

Shape legend: T tokens, K features in, N features out (rows of the weight), B rows with room for decodes, D head size.
"""

# mypy: allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoflow.graph.operation import AttentionDims, OpKind
from nanoflow.kernels import gluon_attention
from nanoflow.kernels.gluon_attention_programs import MAX_GROUP, PAGE_TOKENS, PANEL
from nanoflow.kernels.gluon_inside_attention import PARTS
from nanoflow.kernels.gluon_inside_product import ADD, PLAIN, ROWS, SWIGLU
from nanoflow.kernels.gluon_inside_programs import inside_program
from nanoflow.kernels.launch import SHARES, Launch
from nanoflow.kernels.triton_gemm import check_operands
from nanoflow.kernels.triton_merge import SCAN, merge_program_at

# Of a tile; narrow ones read more of shared memory for each product, and fill more programs.
TILE_ROWS, WIDE, NARROW = PARTS * ROWS, 256, 128
# K-steps in shared memory, by columns of a tile; blocks of keys and of values there, of either warpgroup.
NUM_STAGES, KV_STAGES = {WIDE: 3, NARROW: 4}, 1
# Registers of a thread of the second warpgroup; the first gets as many: 232 + 232 + 40 is three times 168.
WORKER_REGISTERS = 232
# K-steps of a wide tile that take as long as a block of keys for either warpgroup once no tile is left; the latency of
# memory, on one H200.
STEPS_A_BLOCK = 2.2
_LOG2_E = math.log2(math.e)
_KINDS = {OpKind.LINEAR: PLAIN, OpKind.LINEAR_ADD: ADD, OpKind.LINEAR_SWIGLU: SWIGLU}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How many tiles a product has, down and across, and the columns of each."""

    down: int
    across: int
    columns: int

    def most(self, num_sms: int) -> int:
        """Those of the busiest program."""
        return -(-self.down * self.across // num_sms)

    def steps(self, wide_steps: int) -> int:
        """K-steps that are as much work as so many of a wide tile."""
        return wide_steps * (WIDE // self.columns)


@dataclass(slots=True, kw_only=True)
class Taken:
    """An attention under way.

    Attributes:
        launch: The attention.
        steps: K-steps of a product in wide tiles to a block of keys.
        sums: float32 [4 P runs, MAX_GROUP, D], two places for either warpgroup of each program of each run.
        log_sums: float32 [4 P runs, MAX_GROUP], log2 of what those are divided by.
        begins: int32 [2 P runs], where the runs of warpgroups begin, in blocks of keys.
        num_runs: Launches so far.
        until: What they did, in `SHARES`.
    """

    launch: Launch
    steps: int
    sums: Tensor
    log_sums: Tensor
    begins: Tensor
    num_runs: int = 0
    until: int = 0


def can_carry(device: torch.device, dtype: torch.dtype, dims: AttentionDims) -> bool:
    """Whether decode attention of these heads runs inside products on this device."""
    return dtype is torch.bfloat16 and gluon_attention.can_attend(device, dtype, dims)


def rounds_of(num_tokens: int, num_columns: int, num_features: int, num_sms: int, steps: int) -> int:
    """Blocks of keys that a product carries in each warpgroup of its busiest program."""
    tiles = tiles_of(num_tokens, num_columns, num_sms)
    return tiles.most(num_sms) * (-(-num_features // PANEL) // tiles.steps(steps))


def tiles_of(num_tokens: int, num_columns: int, num_sms: int) -> Tiles:
    """Narrow tiles, half as much work each, if no program gets more of them than it would of wide ones.

    Anywhere else they are slower, for they make 0.75 of the multiply-adds a second (qkv, o and down, one H200).
    """
    wide, narrow = (
        Tiles(down=-(-num_tokens // TILE_ROWS), across=-(-num_columns // columns), columns=columns)
        for columns in (WIDE, NARROW)
    )
    return narrow if narrow.most(num_sms) <= wide.most(num_sms) else wide


def take(launch: Launch, max_runs: int, num_sms: int, steps: int) -> Taken:
    """An attention that at most so many runs are going to do, `finish` among them; queues nothing.

    Raises:
        ValueError: Tensors that are not contiguous, or another page size.
    """
    (q,), (out,), cache, dims = launch.reads, launch.writes, launch.cache, launch.op.dims
    assert cache is not None and isinstance(dims, AttentionDims)
    gluon_attention.check(q, out, cache)
    num_parts = PARTS * num_sms * max_runs
    return Taken(
        launch=launch,
        steps=steps,
        sums=torch.empty((2 * num_parts, MAX_GROUP, dims.head_dim), dtype=torch.float32, device=q.device),
        log_sums=torch.empty((2 * num_parts, MAX_GROUP), dtype=torch.float32, device=q.device),
        begins=torch.empty(num_parts, dtype=torch.int32, device=q.device),
    )


def carry(product: Launch, taken: Taken, until: int, num_sms: int) -> None:
    """A product, and inside it the attention from where the last run ended to so many of `SHARES`.

    Raises:
        ValueError: Tensors that TMA does not take (see `triton_gemm.run_linear`), an output with rows apart, or a share
            that is none.
    """
    (x, *_), (out,), (weight, *biases) = product.reads, product.writes, product.weights
    check_operands(x, weight, out)
    if not out.is_contiguous():
        raise ValueError(
            f"output {list(out.shape)} has rows every {out.stride(0)} elements; a carrier's must be contiguous"
        )
    kind, tiles = _KINDS[product.op.kind], tiles_of(len(x), len(weight), num_sms)
    _run(
        taken,
        until,
        num_sms,
        operands=(x, weight, biases[0] if biases else None, out),
        tiles=tiles,
        num_steps=-(-x.shape[1] // PANEL),
        second_rows=len(weight) // 2 if kind == SWIGLU else tiles.columns // 2,
        kind=kind,
    )


def finish(taken: Taken, num_sms: int) -> None:
    """What is left of the attention, and the result of all of it."""
    launch = taken.launch
    (q,), (out,), dims = launch.reads, launch.writes, launch.op.dims
    assert isinstance(dims, AttentionDims)
    if taken.until < SHARES:
        # No tiles, so these operands are never looked at.
        rows = q.view(-1, dims.head_dim)
        _run(
            taken,
            SHARES,
            num_sms,
            operands=(rows, rows, None, rows),
            tiles=Tiles(down=0, across=0, columns=WIDE),
            num_steps=0,
            second_rows=0,
            kind=PLAIN,
        )
    num_parts = taken.num_runs * PARTS * num_sms
    merge_program_at[(num_parts,)](
        out,
        taken.sums,
        taken.log_sums,
        taken.begins,
        launch.inputs.decodes.key_blocks,
        launch.tokens.start,
        len(q),
        GROUP=dims.num_heads // dims.num_kv_heads,
        KV_HEADS=dims.num_kv_heads,
        HEAD_DIM=dims.head_dim,
        MAX_GROUP=MAX_GROUP,
        SCAN=SCAN,
        num_warps=1,
    )


def _run(
    taken: Taken,
    until: int,
    num_sms: int,
    *,
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor],
    tiles: Tiles,
    num_steps: int,
    second_rows: int,
    kind: int,
) -> None:
    """One launch; it takes what comes after the last one's share."""
    if not taken.until <= until <= SHARES:
        raise ValueError(f"a share of attention from {taken.until} to {until}, of {SHARES}")
    launch, (x, weight, bias, out) = taken.launch, operands
    dims, cache, decodes = launch.op.dims, launch.cache, launch.inputs.decodes
    assert isinstance(dims, AttentionDims) and cache is not None
    (q,), (attended,) = launch.reads, launch.writes
    inside_program[(num_sms,)](
        _boxes(x, TILE_ROWS),
        _boxes(weight, tiles.columns // 2),
        bias,
        out,
        len(out),
        out.shape[1],
        tiles.down,
        tiles.across,
        num_steps,
        second_rows,
        # One head of one token a row.
        _boxes(q.view(-1, dims.head_dim), MAX_GROUP),
        _boxes(cache.keys.view(-1, dims.head_dim), PAGE_TOKENS),
        _boxes(cache.values.view(-1, dims.head_dim), PAGE_TOKENS),
        attended,
        taken.sums,
        taken.log_sums,
        taken.begins,
        decodes.page_tables,
        decodes.context_len,
        decodes.key_blocks,
        decodes.page_tables.stride(0),
        launch.tokens.start,
        len(q),
        dims.scale * _LOG2_E,
        taken.num_runs,
        taken.until,
        until,
        round(num_steps / tiles.steps(1) / STEPS_A_BLOCK),
        BLOCK_N=tiles.columns,
        STEPS=tiles.steps(taken.steps),
        STAGES=NUM_STAGES[tiles.columns],
        KV_STAGES=KV_STAGES,
        GROUP=dims.num_heads // dims.num_kv_heads,
        KV_HEADS=dims.num_kv_heads,
        HEAD_DIM=dims.head_dim,
        KIND=kind,
        HAS_BIAS=bias is not None,
        SCAN=SCAN,
        WORKER_REGISTERS=WORKER_REGISTERS,
        num_warps=4,
    )
    taken.num_runs, taken.until = taken.num_runs + 1, until


def _boxes(cells: Tensor, num_rows: int) -> TensorDescriptor:
    """Rows for TMA, which moves so many of them at once, 128 bytes of each."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(cells, [num_rows, PANEL], layout)
