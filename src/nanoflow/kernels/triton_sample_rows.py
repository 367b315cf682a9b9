"""Reads a row of logits, block by block, with the adjustments that its request asks for, and computes weights.

Searches work on the bits of float32 logits as integers of the same order.
Shape legend: S rows, V vocabulary, G groups of a block, I logits of a group.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

# Offsets in a row's numbers, in units of 4 bytes, as laid out by `sample.NUMBERS`.
ROW, POSITION, SEED, SCALE, TOP_K, TOP_P, LOG_MIN_P = (tl.constexpr(place) for place in (0, 1, 2, 4, 5, 6, 7))
REPETITION, PRESENCE, FREQUENCY, FIRST_FREE_STOP = (tl.constexpr(place) for place in (8, 9, 10, 11))
NUM_EDITS, NUM_BIASES, HAS_PENALTIES = (tl.constexpr(place) for place in (12, 13, 14))
IS_RESTRICTED, MASK, NUM_FIELDS = (tl.constexpr(place) for place in (15, 16, 18))
# Largest count in the table of seen tokens. The next bit says that the prompt has the token, the sign that it is
# forbidden.
MAX_COUNT, IS_SEEN = (tl.constexpr(bits) for bits in ((1 << 14) - 1, (1 << 15) - 1))
# Entries of a row's list of edits that are read in one step.
_EDITS = tl.constexpr(256)


@triton.jit
def read(row: tl.tensor, first: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr) -> tl.tensor:
    """A block of logits as float32 [G, I]: infinity for NaN, -infinity outside the vocabulary."""
    columns = columns_of(first, BLOCK, INNER)
    exact = tl.load(row + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(exact == exact, exact, float("inf"))


@triton.jit
def columns_of(first: tl.tensor, BLOCK: tl.constexpr, INNER: tl.constexpr) -> tl.tensor:
    """Token ids of a block, [G, I]."""
    return first + tl.arange(0, BLOCK // INNER)[:, None] * INNER + tl.arange(0, INNER)[None, :]


@triton.jit
def first_column(
    is_wanted: tl.tensor, first: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr
) -> tl.tensor:
    """The lowest token id of a block where `is_wanted`; the last id of the vocabulary if there is none."""
    columns = columns_of(first, BLOCK, INNER)
    return tl.min(tl.min(tl.where(is_wanted, columns, VOCAB - 1), axis=1), axis=0)


@triton.jit
def adjusted(
    row: tl.tuple, first: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr
) -> tl.tensor:
    """`read`, with biases, then penalties applied, and -infinity for tokens that are forbidden or not in the mask."""
    logits, seen, edit_ids, edit_values, num_edits, is_held, looks_at_seen, penalties, ADJUSTS, _, mask, has_mask = row
    exact = read(logits, first, VOCAB, BLOCK, INNER)
    if ADJUSTS:
        columns = columns_of(first, BLOCK, INNER)
        if num_edits > 0:
            exact = _edited(exact, columns, first, edit_ids, edit_values, num_edits, is_held, VOCAB, BLOCK)
        if looks_at_seen:
            record = tl.load(seen + columns, mask=columns < VOCAB, other=0)
            exact = _penalised(exact, record.to(tl.int32), penalties)
        if has_mask:
            # A group of logits lies within a word.
            groups = first + tl.arange(0, BLOCK // INNER) * INNER
            words = tl.load(mask + groups // 32, mask=groups < VOCAB, other=0)[:, None]
            exact = tl.where(((words >> (columns % 32)) & 1) > 0, exact, float("-inf"))
    return exact


@triton.jit
def _edited(
    exact: tl.tensor,
    columns: tl.tensor,
    first: tl.tensor,
    edit_ids: tl.tensor,
    edit_values: tl.tensor,
    num_edits: tl.tensor,
    is_held: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Apply the edits within the block; the list is in the order of the vocabulary."""
    begin, end = first * 0, first * 0
    for at in range(0, num_edits, _EDITS):
        places = at + tl.arange(0, _EDITS)
        ids = tl.load(edit_ids + places, mask=places < num_edits, other=VOCAB + BLOCK)
        begin += tl.sum((ids < first).to(tl.int32), axis=0)
        end += tl.sum((ids < first + BLOCK).to(tl.int32), axis=0)
    for edit in range(begin, end):
        value = tl.load(edit_values + edit)
        is_stop = value == float("-inf")
        edited = tl.where(is_stop, float("-inf"), exact + value)
        exact = tl.where((columns == tl.load(edit_ids + edit)) & (is_held | (is_stop == 0)), edited, exact)
    return exact


@triton.jit
def _penalised(exact: tl.tensor, record: tl.tensor, penalties: tl.tuple) -> tl.tensor:
    """Apply penalties on seen tokens (without effect in a row that has none), and forbid tokens."""
    repetition, presence, frequency = penalties
    count = record & MAX_COUNT
    factor = tl.where((record & IS_SEEN) > 0, repetition, 1.0)
    exact = tl.where(exact > 0, tl.div_rn(exact, factor), exact * factor)
    # Converts the count to float32 by its bits: conversion instructions run at a quarter of the rate or less.
    number = (count | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    exact = exact - frequency * number
    exact = exact - tl.where(count > 0, presence, 0.0)
    return tl.where(record < 0, float("-inf"), exact)


@triton.jit
def weights_of(exact: tl.tensor, peak: tl.tensor, scale: tl.tensor, log_min_p: tl.tensor) -> tl.tensor:
    """Weights relative to that of the largest logit; 0 for tokens that min_p excludes."""
    logs = (exact - peak) * scale
    return tl.where(logs >= log_min_p, tl.exp2(logs), 0.0)


@triton.jit
def key_of(exact: tl.tensor) -> tl.tensor:
    """An int32 with the same order as the float32."""
    bits = exact.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def logit_of(key: tl.tensor) -> tl.tensor:
    """The inverse of `key_of`."""
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def on_grid(place: tl.tensor, grid_bits: tl.tensor) -> tl.tensor:
    """The logit whose `key_of` without its low bits is `place`; for a negative logit these bits are ones."""
    key = place << grid_bits
    return logit_of(tl.where(key < 0, key | ((1 << grid_bits) - 1), key))


@triton.jit
def uniform_of(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """A uniform number, equal to `sample.uniform`."""
    mixed = _mix(_mix(seed.to(tl.uint64, bitcast=True)) + position.to(tl.uint64) * 0x9E3779B97F4A7C15)
    return (mixed >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
