"""Choosing tokens from logits in Triton: one launch, whatever the rows ask for. The reference is `sample.py`.

The same seed gives the same token as the reference, except where rounding decides: if a cumulative weight is within
about 1e-6 of the total from the drawn number, or from the border of top_p. Nothing here waits for the device.

Legend: S rows, V vocabulary, R rows of the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nanoflow.kernels import sample
from nanoflow.kernels import triton_sample_programs as programs
from nanoflow.kernels.sample import SampleTables


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlocks:
    """How a program reads its row.

    Attributes:
        block: Logits read at once, a power of two.
        num_warps: Warps of the program.
        max_registers: Most registers of a thread, so that several programs fit on an SM; None for no limit.
        room: Most logits that a search lists, a power of two.
    """

    block: int
    num_warps: int
    max_registers: int | None = None
    room: int = 2048


LARGEST = RowBlocks(block=8192, num_warps=16)
# The same block for all numbers of rows, because sums are rounded block by block.
CHOICE = RowBlocks(block=2048, num_warps=8, max_registers=64)
ADJUSTED = RowBlocks(block=CHOICE.block, num_warps=8, max_registers=128)
LOGPROBS = RowBlocks(block=4096, num_warps=8)
_INNER = 8
# For more tokens than this, sorting a row is faster than selecting one token after the other.
_MAX_ONE_BY_ONE = 128
# How many low bits are zero in a float32 converted from the dtype.
_GRID_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


def largest(logits: Tensor, blocks: RowBlocks = LARGEST) -> tuple[Tensor, Tensor]:
    """`choose` for rows that all take the largest logit without adjustments; logits [S, V] contiguous."""
    token_ids, best = _results(logits)
    if len(logits):
        programs.largest_program[(len(logits),)](
            logits, token_ids, best, logits.shape[1], num_warps=blocks.num_warps, **_sizes(logits, blocks)
        )
    return token_ids, best


def choose(
    logits: Tensor, numbers: Tensor, tables: SampleTables, *, adjusts: bool = True, blocks: RowBlocks | None = None
) -> tuple[Tensor, Tensor]:
    """See `sample.choose`; logits [S, V] contiguous. A row with NaN returns an infinite largest logit.

    Without `adjusts` no row may have penalties, forbidden tokens, or edits that apply; the program then needs fewer
    registers and draws the same.
    """
    blocks = blocks or (ADJUSTED if adjusts else CHOICE)
    token_ids, best = _results(logits)
    if len(logits):
        programs.choose_program[(len(logits),)](
            logits,
            numbers,
            numbers.view(torch.float32),
            numbers.view(torch.int64),
            tables.seen,
            tables.edit_ids,
            tables.edit_values,
            tables.masks,
            tables.edit_ids.shape[1],
            token_ids,
            best,
            best.new_empty(len(logits), blocks.room),
            logits.shape[1],
            ROOM=blocks.room,
            GRID_BITS=_GRID_BITS[logits.dtype],
            ADJUSTS=adjusts,
            num_warps=blocks.num_warps,
            **({} if blocks.max_registers is None else {"maxnreg": blocks.max_registers}),
            # Makes adjusted logits equal to the reference's to the last bit.
            enable_fp_fusion=False,
            **_sizes(logits, blocks),
        )
    return token_ids, best


def top_logprobs(
    logits: Tensor, places: Tensor, token_ids: Tensor, num_top: int, blocks: RowBlocks = LOGPROBS
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sample.top_logprobs`; logits [S, V] contiguous. Among equal logits lower ids come first."""
    assert logits.is_contiguous()
    if num_top > _MAX_ONE_BY_ONE:
        return sample.top_logprobs(logits, places, token_ids, num_top)
    num_rows, num_top = len(places), min(num_top, logits.shape[1])
    top_ids = logits.new_empty(num_rows, 1 + num_top, dtype=torch.int32)
    logprobs, ranks = logits.new_empty(top_ids.shape, dtype=torch.float32), top_ids.new_empty(num_rows)
    if num_rows:
        programs.top_logprobs_program[(num_rows,)](
            logits,
            places,
            token_ids,
            top_ids,
            logprobs,
            ranks,
            num_top,
            logits.shape[1],
            num_warps=blocks.num_warps,
            **_sizes(logits, blocks),
        )
    return top_ids, logprobs, ranks


def workspace_bytes(num_rows: int, _vocab_size: int) -> int:
    """Most device memory in bytes that `choose` needs beside its results."""
    return num_rows * CHOICE.room * 4


def _results(logits: Tensor) -> tuple[Tensor, Tensor]:
    assert logits.is_contiguous()
    num_rows = len(logits)
    return logits.new_empty(num_rows, dtype=torch.int64), logits.new_empty(num_rows, dtype=torch.float32)


def _sizes(logits: Tensor, blocks: RowBlocks) -> dict[str, int]:
    num_blocks = triton.next_power_of_2(triton.cdiv(logits.shape[1], blocks.block))
    return {"BLOCK": blocks.block, "INNER": _INNER, "NUM_BLOCKS": num_blocks}
