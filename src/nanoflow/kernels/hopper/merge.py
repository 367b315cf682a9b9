"""Merges the parts of a head that several programs computed, after the Hopper kernels of decode attention.

In those kernels each program has a run of blocks of keys across requests and KV heads, so runs begin and end within
heads. A run's part of a head is stored as mean values and log2 of the sum of weights. Each run has two entries for
parts: the odd one for a head that it begins and does not end, the even one for any other part. There is one program for
each border between runs; the program at the end of the run that begins a head merges that head.

Shape legend: B rows that may be decodes, K KV heads, D head size, S runs.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow.graph.operation import AttentionDims
from nanoflow.kernels.launch import Launch

# Rows of the batch that are searched in one step.
SCAN = 512


def run_merge(
    launch: Launch,
    parts: Tensor,
    log_sums: Tensor,
    num_runs: int,
    *,
    begins: Tensor | None = None,
    scan: int = SCAN,
) -> None:
    """Merge the results of a decode attention's runs into its output.

    Args:
        launch: The attention.
        parts: float32 [2 S, MAX_GROUP, D], or with more rows.
        log_sums: float32 [2 S, MAX_GROUP], or with more rows.
        num_runs: S.
        begins: int32 [S] or more, the first block of keys of each run; None if all runs have equal lengths.
        scan: Rows of the batch that are searched in one step.
    """
    (out,), dims = launch.writes, launch.op.dims
    assert isinstance(dims, AttentionDims)
    merge_program[(num_runs,)](
        *(out, parts, log_sums, begins, launch.inputs.decodes.key_blocks, launch.tokens.start, len(out)),
        GROUP=dims.num_heads // dims.num_kv_heads,
        KV_HEADS=dims.num_kv_heads,
        HEAD_DIM=dims.head_dim,
        MAX_GROUP=parts.shape[1],
        SCAN=scan,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def merge_program(
    out: tl.tensor,
    parts: tl.tensor,
    log_sums: tl.tensor,
    begins: tl.tensor | None,
    key_blocks: tl.tensor,
    first_row: int,
    num_rows: int,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_GROUP: tl.constexpr,
    SCAN: tl.constexpr,
) -> None:
    """Merge parts [2 S, MAX_GROUP, D] and log_sums [2 S, MAX_GROUP] of S runs into out [B, K x GROUP, D].

    Run s begins at block begins[s] of keys and may be empty; without `begins` all runs have equal lengths.
    """
    owner, num_runs = tl.program_id(0), tl.num_programs(0)
    # The last run ends with its head, so nothing is to be merged.
    if begins is not None and owner + 1 == num_runs:
        return
    base = tl.load(key_blocks + first_row)
    num_blocks = (tl.load(key_blocks + first_row + num_rows) - base) * KV_HEADS
    per_run = tl.cdiv(num_blocks, num_runs)
    if begins is None:
        border, is_empty = (owner + 1) * per_run, False
    else:
        first, border = tl.load(begins + owner), tl.load(begins + owner + 1)
        is_empty = first == border
    if is_empty | (border >= num_blocks):
        return
    row, head, begin, stop = _head_at(border, key_blocks, base, first_row, num_rows, KV_HEADS, SCAN)
    if begins is None:
        first = owner * per_run
    # Only a head that this run began, and that does not begin exactly at the border, is merged here.
    if (begin == border) | (begin < first):
        return
    acc = tl.zeros([MAX_GROUP, HEAD_DIM], tl.float32)
    total, peak = tl.zeros([MAX_GROUP], tl.float32), tl.full([MAX_GROUP], -1e30, tl.float32)
    if begins is None:
        for run in range(owner, (stop - 1) // per_run + 1):
            acc, total, peak = _with_part(acc, total, peak, parts, log_sums, run, run == owner, MAX_GROUP, HEAD_DIM)
    else:
        run, at = owner, first
        while at < stop:
            after = tl.load(begins + tl.minimum(run + 1, num_runs - 1))
            after = tl.where(run + 1 < num_runs, after, num_blocks)
            if after > at:
                acc, total, peak = _with_part(acc, total, peak, parts, log_sums, run, run == owner, MAX_GROUP, HEAD_DIM)
            run += 1
            at = after
    _write(out, acc, total, row * KV_HEADS + head, GROUP, MAX_GROUP, HEAD_DIM)


@triton.jit
def _head_at(
    block: tl.tensor,
    key_blocks: tl.tensor,
    base: tl.tensor,
    first_row: int,
    num_rows: int,
    KV_HEADS: tl.constexpr,
    SCAN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Row and head of a block of keys, and the first and last + 1 block of that head."""
    row = block * 0
    for at in range(0, num_rows, SCAN):
        rows = at + tl.arange(0, SCAN)
        ends = tl.load(key_blocks + first_row + tl.minimum(rows, num_rows - 1) + 1) - base
        row += tl.sum(((ends * KV_HEADS <= block) & (rows < num_rows)).to(tl.int32), 0)
    before = tl.load(key_blocks + first_row + row) - base
    blocks = tl.load(key_blocks + first_row + row + 1) - base - before
    head = (block - before * KV_HEADS) // blocks
    begin = before * KV_HEADS + head * blocks
    return row, head, begin, begin + blocks


@triton.jit
def _with_part(
    acc: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    parts: tl.tensor,
    log_sums: tl.tensor,
    run: tl.tensor,
    begins_head: tl.tensor,
    MAX_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a run's part of the head to the weighted mean."""
    places = (2 * run + begins_head.to(tl.int32)) * MAX_GROUP + tl.arange(0, MAX_GROUP)
    log_sum = tl.load(log_sums + places)
    part = tl.load(parts + places[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :])
    new_peak = tl.maximum(peak, log_sum)
    weight, decay = tl.exp2(log_sum - new_peak), tl.exp2(peak - new_peak)
    return acc * decay[:, None] + part * weight[:, None], total * decay + weight, new_peak


@triton.jit
def _write(
    out: tl.tensor,
    acc: tl.tensor,
    total: tl.tensor,
    kv_head: tl.tensor,
    GROUP: tl.constexpr,
    MAX_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> None:
    """Write the result for the queries of one KV head of one request."""
    heads, dims = tl.arange(0, MAX_GROUP), tl.arange(0, HEAD_DIM)
    cells = (kv_head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + cells, (acc / total[:, None]).to(out.dtype.element_ty), mask=(heads < GROUP)[:, None])
